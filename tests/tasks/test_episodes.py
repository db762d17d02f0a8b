"""Episodes: what a task is made of depends on its place alone; splits and classes are checked."""

import subprocess
import sys
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metaplug.errors import RequestError
from metaplug.tasks import ArrayTasks, ClassImages, ImageEpisodes, TaskBatch
from metaplug.tasks.draws import distinct, draw, uniform

SEEDS = st.integers(-(2**70), 2**70)


def stream(
    *,
    seed: int = 0,
    split: str = "train",
    ways: int = 3,
    shots: int = 2,
    queries: int = 4,
    styles: bool = False,
) -> ImageEpisodes:
    """Six classes of 6 to 11 images of 2 pixels: the class, and the image's place in it."""
    counts = (6, 7, 8, 9, 10, 11)
    pixels = np.array(
        [[label, image] for label, count in enumerate(counts) for image in range(count)], np.uint8
    )
    groups = pixels[:, 1].astype(np.int64) % 3 if styles else None
    classes = ClassImages(
        tuple("abcdef"), torch.from_numpy(pixels).reshape(-1, 1, 1, 2), counts, groups
    )
    return ImageEpisodes(classes, split=split, ways=ways, shots=shots, queries=queries, seed=seed)


def fields(batch: TaskBatch) -> list[torch.Tensor]:
    return [batch.support_x, batch.support_y, batch.query_x, batch.query_y]


def same(one: TaskBatch, other: TaskBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(fields(one), fields(other), strict=True))


def pick(batch: TaskBatch, task: int) -> TaskBatch:
    return TaskBatch(*(field[task : task + 1] for field in fields(batch)))


def identity(images: torch.Tensor) -> np.ndarray:
    """(tasks, examples, 2): the class and the place of every image."""
    return (images * 255).round().long().flatten(2).numpy()


@given(
    SEEDS,
    st.integers(0, 10**12),
    st.lists(st.integers(0, 10**9), min_size=1, max_size=6),
    st.booleans(),
)
def test_a_task_does_not_depend_on_its_batch_mates(
    seed: int, iteration: int, indices: list[int], styles: bool
) -> None:
    tasks = stream(seed=seed, styles=styles)
    batch = tasks.batch(iteration, indices)
    for place, index in enumerate(indices):
        assert same(pick(batch, place), tasks.batch(iteration, [index]))
    assert same(tasks.batch(iteration, indices), batch)


@given(SEEDS, st.booleans())
def test_a_task_is_well_formed(seed: int, styles: bool) -> None:
    batch = stream(seed=seed, styles=styles).batch(7, range(5))
    assert batch.support_x.shape == (5, 6, 1, 1, 2)
    assert batch.query_x.shape == (5, 12, 1, 1, 2)
    assert batch.support_x.dtype == batch.query_x.dtype == torch.float32
    assert torch.equal(batch.support_y, torch.tensor([0, 0, 1, 1, 2, 2]).repeat(5, 1))
    assert torch.equal(batch.query_y, torch.arange(3).repeat_interleave(4).repeat(5, 1))
    for support, query in zip(identity(batch.support_x), identity(batch.query_x), strict=True):
        chosen = [{tuple(image) for image in images} for images in (support, query)]
        assert len(chosen[0]) == 6
        assert len(chosen[1]) == 12
        assert not chosen[0] & chosen[1]
        labels = support[::2, 0]
        assert len(set(labels)) == 3
        assert (support[:, 0] == labels.repeat(2)).all()
        assert (query[:, 0] == labels.repeat(4)).all()


def test_seed_split_iteration_and_index_each_make_another_task() -> None:
    reference = stream().batch(0, range(8))
    assert not same(stream(seed=1).batch(0, range(8)), reference)
    assert not same(stream(split="val").batch(0, range(8)), reference)
    assert not same(stream().batch(1, range(8)), reference)
    assert not same(stream().batch(0, range(8, 16)), reference)


def test_a_task_is_the_same_in_another_process() -> None:
    script = "from metaplug.tasks.draws import draw; print(draw(3, 'train', 5, [2, 9], 4).tolist())"
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == str(draw(3, "train", 5, [2, 9], 4).tolist())


def test_the_random_words_are_these() -> None:
    assert draw(0, "train", 0, [0, 1], 2).tolist() == [
        [1931510677099946742, 13952230937797949725],
        [1310450752915722271, 12950259575709781838],
    ]


def test_a_class_of_just_enough_images_gives_them_all() -> None:
    tasks = stream(ways=6, shots=2, queries=4)
    batch = tasks.batch(0, range(20))
    for support, query in zip(identity(batch.support_x), identity(batch.query_x), strict=True):
        images = np.concatenate([support, query])
        assert set(images[images[:, 0] == 0][:, 1]) == set(range(6))


@given(SEEDS)
def test_queries_have_other_styles_where_there_are_enough(seed: int) -> None:
    batch = stream(seed=seed, shots=1, queries=4, styles=True).batch(0, range(4))
    counts = np.arange(6, 12)
    for support, query in zip(identity(batch.support_x), identity(batch.query_x), strict=True):
        for label in range(3):
            (group, style), own = support[label], query[4 * label : 4 * label + 4, 1] % 3
            others = counts[group] - len(range(style % 3, counts[group], 3))
            assert (own != style % 3).sum() == min(4, others)


@given(st.integers(0, 2**32), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_distinct_draws_are_distinct(seed: int, sizes: list[int]) -> None:
    drawn = distinct(draw(seed, "train", 0, range(len(sizes)), 9), np.array(sizes))
    for row, size in zip(drawn, sizes, strict=True):
        assert sorted(row[:size]) == list(range(size))
        assert (row[size:] >= size).all()


def test_every_ordered_choice_is_as_likely() -> None:
    drawn = distinct(draw(0, "train", 0, range(24_000), 3), np.full(24_000, 4))
    counts = [int((drawn == choice).all(1).sum()) for choice in permutations(range(4), 3)]
    # 24 choices, 1,000 expected of each; 49.7 is the 99.9 % quantile of chi-square with 23 degrees
    # of freedom.
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 49.7


def test_uniform_numbers_fill_their_range() -> None:
    numbers = uniform(draw(0, "train", 0, range(10), 1000), -5, 5)
    assert numbers.min() >= -5
    assert numbers.max() < 5
    assert abs(numbers.mean()) < 0.1


def test_float_images_are_given_as_they_are() -> None:
    images = torch.rand(4 * 8, 3, 2, 2)
    tasks = ImageEpisodes(
        ClassImages(tuple("abcd"), images, (8,) * 4),
        split="test",
        ways=2,
        shots=1,
        queries=2,
        seed=0,
    )
    drawn = tasks.batch(0, range(3)).query_x.flatten(0, 1)
    assert all((images == image).flatten(1).all(1).any() for image in drawn)


def test_a_moved_stream_makes_the_same_tasks_there() -> None:
    tasks = stream()
    assert same(tasks.to("cpu").batch(0, range(3)), tasks.batch(0, range(3)))
    assert tasks.to("meta").batch(0, range(3)).device.type == "meta"
    assert tasks.classes.images.device.type == "cpu"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"ways": 7},
            "7-way tasks need 7 classes, but the train split has 6: lower ways, or give that split "
            "more classes",
        ),
        (
            {"shots": 3},
            "3 shots and 4 queries need 7 images of every class, but the class 'a' of the train "
            "split has 6: "
            "lower shots or queries, or leave that class out",
        ),
        ({"ways": 1}, "tasks: ways = 1: input should be greater than or equal to 2"),
        ({"queries": 0}, "tasks: queries = 0: input should be greater than or equal to 1"),
    ],
)
def test_sizes_that_the_classes_cannot_give_are_refused(
    sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(RequestError) as error:
        stream(**sizes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("names", "images", "counts", "message"),
    [
        (
            "ab",
            torch.zeros(3, 1, 2, 2),
            (1, 1),
            "class images: 2 names and 2 images in 2 counts do not fit images of shape (3, 1, 2, "
            "2): "
            "give one count a class and images (N, channels, height, width)",
        ),
        (
            "aa",
            torch.zeros(2, 1, 2, 2),
            (1, 1),
            "class images: the class 'a' stands twice in one split: join its images or rename one",
        ),
        (
            "ab",
            torch.zeros(2, 1, 2, 2, dtype=torch.int64),
            (1, 1),
            "class images: the dtype torch.int64 is not known: give uint8 (0 to 255), or float32 "
            "(0 to 1)",
        ),
        (
            "ab",
            torch.full((2, 1, 2, 2), 1.5),
            (1, 1),
            "class images: float32 images go beyond 0 to 1: scale them, or give uint8 (0 to 255)",
        ),
    ],
)
def test_class_images_that_do_not_fit_are_refused(
    names: str, images: torch.Tensor, counts: tuple[int, ...], message: str
) -> None:
    with pytest.raises(RequestError) as error:
        ClassImages(tuple(names), images, counts)
    assert str(error.value) == message


def test_styles_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RequestError) as error:
        ClassImages(("a",), torch.zeros(2, 1, 2, 2), (2,), np.zeros(3, np.int64))
    assert (
        str(error.value)
        == "class images: styles of shape (3,) for 2 images: give one style an image"
    )


def arrays(names: str) -> dict[str, np.ndarray]:
    return {name: np.full((6, 1, 4, 4), ord(name), np.uint8) for name in names}


def test_arrays_become_a_source() -> None:
    source = ArrayTasks(
        train=arrays("abcd"), val=arrays("ef"), test=arrays("gh"), ways=2, shots=1, queries=5
    )
    assert (source.kind, source.input_shape, source.outputs) == ("classification", (1, 4, 4), 2)
    assert [stream.split for stream in (source.train, source.val, source.test)] == [
        "train",
        "val",
        "test",
    ]
    batch = source.test.batch(0, range(2))
    assert set((batch.support_x * 255).round().unique().tolist()) == {ord("g"), ord("h")}
    assert source.describe() == {
        "kind": "classification",
        "input_shape": [1, 4, 4],
        "outputs": 2,
        "origin": "arrays given in Python",
        "licence": "not stated",
        "splits": {
            "train": {"classes": 4, "images": 24},
            "val": {"classes": 2, "images": 12},
            "test": {"classes": 2, "images": 12},
        },
    }


def test_a_class_in_two_splits_is_refused() -> None:
    with pytest.raises(RequestError) as error:
        ArrayTasks(train=arrays("abc"), val=arrays("de"), test=arrays("bf"), ways=2, queries=5)
    assert str(error.value) == (
        "the class 'b' stands in the train and in the test split, so it would not be new to the "
        "model: keep it in one of them"
    )


def test_splits_of_different_shape_are_refused() -> None:
    wide = {name: np.zeros((6, 1, 4, 5), np.uint8) for name in "gh"}
    with pytest.raises(RequestError) as error:
        ArrayTasks(train=arrays("abc"), val=arrays("de"), test=wide, ways=2, queries=5)
    assert str(error.value) == (
        "images of the train split have shape (1, 4, 4), of the test split (1, 4, 5), but one "
        "model takes one shape: resize them"
    )


def test_an_array_unlike_the_first_is_refused() -> None:
    with pytest.raises(RequestError) as error:
        ArrayTasks(
            train=arrays("ab") | {"c": np.zeros((6, 4, 4), np.uint8)},
            val=arrays("de"),
            test=arrays("fg"),
            ways=2,
            queries=5,
        )
    assert str(error.value) == (
        "the class 'c' of the train split has torch.uint8 images of shape (6, 4, 4), the class 'a' "
        "torch.uint8 images of (6, 1, 4, 4): "
        "give every class (n, channels, height, width) of one size and dtype"
    )


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(RequestError) as error:
        ArrayTasks(train=arrays("ab"), val={}, test=arrays("fg"), ways=2, queries=5)
    assert (
        str(error.value)
        == "the val split has no class: give at least as many as the ways of a task"
    )
