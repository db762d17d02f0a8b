"""Options of episodes: super-classes, augmentations, sizes; none lets a split see another."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metaplug.contract.task_batch import FIELDS
from metaplug.errors import RequestError
from metaplug.tasks import ArrayTasks, ClassImages, EpisodeOptions, ImageEpisodes, TaskBatch
from metaplug.tasks.images.augmentations import rotated, shifted
from metaplug.tasks.images.class_images import allocate

SEEDS = st.integers(-(2**70), 2**70)
SIDE = 5
COUNT = 7
CLASSES = 12


def stream(
    *,
    split: str = "train",
    ways: int = 3,
    shots: int = 2,
    queries: int = 3,
    seed: int = 0,
    **options: Any,
) -> ImageEpisodes:
    """Twelve classes of seven 5 x 5 images, in super-classes of 3, 4 and 5.

    The middle pixel is the class, every other one is its own.
    """
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(
        100, 256, (CLASSES * COUNT, 1, SIDE, SIDE), dtype=torch.uint8, generator=generator
    )
    images[:, 0, SIDE // 2, SIDE // 2] = torch.arange(CLASSES, dtype=torch.uint8).repeat_interleave(
        COUNT
    )
    names = tuple(f"class {index}" for index in range(CLASSES))
    classes = ClassImages(
        names, images, (COUNT,) * CLASSES, superclasses=("a",) * 3 + ("b",) * 4 + ("c",) * 5
    )
    return ImageEpisodes(
        classes,
        split=split,
        ways=ways,
        shots=shots,
        queries=queries,
        seed=seed,
        options=EpisodeOptions(**options),
    )


def same(one: TaskBatch, other: TaskBatch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def images_of(batch: TaskBatch, ways: int) -> torch.Tensor:
    """(T, ways, examples, 1, 5, 5), support first."""
    return torch.cat([x.unflatten(1, (ways, -1)) for x in (batch.support_x, batch.query_x)], 2)


def classes_of(batch: TaskBatch, ways: int) -> np.ndarray:
    """(T, ways): the class of each label, read off the middle pixel that its images share."""
    middle = (images_of(batch, ways)[..., 0, SIDE // 2, SIDE // 2] * 255).round().long()
    assert bool((middle == middle[..., :1]).all())
    return middle[..., 0].numpy()


@given(SEEDS, st.integers(0, 1000))
def test_classes_of_a_task_come_from_one_superclass(seed: int, iteration: int) -> None:
    classes = classes_of(stream(seed=seed, within=True).batch(iteration, range(8)), 3)
    group = np.searchsorted([3, 7], classes, side="right")
    assert (group == group[:, :1]).all()
    assert all(len(set(row)) == 3 for row in classes)


def test_every_superclass_that_is_large_enough_is_drawn_from() -> None:
    for ways, groups in ((3, {0, 1, 2}), (4, {1, 2}), (5, {2})):
        classes = classes_of(stream(within=True, ways=ways).batch(0, range(60)), ways)
        assert set(np.searchsorted([3, 7], classes[:, 0], side="right")) == groups


@given(SEEDS)
def test_rotation_turns_a_class_as_a_whole_and_changes_nothing_else(seed: int) -> None:
    plain, turned = (
        images_of(stream(seed=seed, rotate=rotate).batch(2, range(4)), 3)
        for rotate in (False, True)
    )
    for task in range(4):
        for way in range(3):
            quarters = [
                quarter
                for quarter in range(4)
                if torch.equal(torch.rot90(plain[task, way], quarter, (-2, -1)), turned[task, way])
            ]
            assert len(quarters) == 1


def test_all_four_rotations_and_both_mirrors_occur() -> None:
    plain = images_of(stream().batch(0, range(40)), 3)
    turned, mirrored = (
        images_of(stream(**{option: True}).batch(0, range(40)), 3) for option in ("rotate", "flip")
    )
    shares = [
        float((torch.rot90(plain, quarter, (-2, -1)) == turned).flatten(2).all(2).float().mean())
        for quarter in range(4)
    ]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0.12
    kept = (plain == mirrored).flatten(2).all(2)
    assert 0.35 < float(kept.float().mean()) < 0.65
    assert torch.equal(mirrored[~kept], plain[~kept].flip(-1))


def test_shifts_are_each_images_own_and_stay_within_their_bound() -> None:
    plain, moved = (
        images_of(stream(shift=shift).batch(0, range(6)), 3).flatten(0, 2) for shift in (0, 2)
    )
    seen = set()
    for before, after in zip(plain, moved, strict=True):
        fits = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if torch.equal(shifted(before[None], torch.tensor([[down, right]]))[0], after)
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) > 15


def test_shifted_moves_down_and_right_and_lets_zeros_in() -> None:
    image = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)
    expected = torch.tensor([[0.0, 0, 0], [0, 1, 2], [0, 4, 5]]).reshape(1, 1, 3, 3)
    assert torch.equal(shifted(image, torch.tensor([[1, 1]])), expected)
    assert torch.equal(shifted(image, torch.tensor([[-3, 0]])), torch.zeros_like(image))
    assert torch.equal(shifted(image, torch.tensor([[0, 0]])), image)


def test_rotated_turns_counter_clockwise() -> None:
    images = torch.arange(4.0).reshape(1, 1, 1, 1, 2, 2).expand(1, 2, 1, 1, 2, 2)
    turned = rotated(images, torch.tensor([[0, 1]]))
    assert turned.flatten().tolist() == [0, 1, 2, 3, 1, 3, 0, 2]


@given(SEEDS, st.integers(0, 50))
def test_sizes_within_bounds_are_one_for_a_batch_and_depend_on_the_iteration_alone(
    seed: int, iteration: int
) -> None:
    tasks = stream(seed=seed, train_ways=(2, 4), train_shots=(1, 3))
    batch = tasks.batch(iteration, range(3))
    ways, shots = int(batch.support_y.max()) + 1, int((batch.support_y[0] == 0).sum())
    assert 2 <= ways <= 4
    assert 1 <= shots <= 3
    assert batch.support_x.shape[:2] == (3, ways * shots)
    assert batch.query_x.shape[:2] == (3, ways * 3)
    assert same(
        tasks.batch(iteration, [2]),
        TaskBatch(*(getattr(batch, name)[2:] for name in FIELDS)),
    )


def test_every_size_within_bounds_occurs() -> None:
    tasks = stream(train_ways=(2, 4), train_shots=(1, 3))
    sizes = set()
    for iteration in range(80):
        labels = tasks.batch(iteration, [0]).support_y[0]
        sizes.add((int(labels.max()) + 1, int((labels == 0).sum())))
    assert sizes == {(ways, shots) for ways in (2, 3, 4) for shots in (1, 2, 3)}


OPTIONS = st.fixed_dictionaries(
    {
        "within": st.booleans(),
        "rotate": st.booleans(),
        "flip": st.booleans(),
        "shift": st.integers(0, 3),
        "train_ways": st.sampled_from([None, (2, 3), (3, 3)]),
        "train_shots": st.sampled_from([None, (1, 2)]),
    }
)


@given(OPTIONS, SEEDS, st.integers(0, 1000))
def test_a_task_depends_on_its_place_alone_whatever_the_options(
    options: dict[str, Any], seed: int, iteration: int
) -> None:
    tasks = stream(seed=seed, **options)
    whole = tasks.batch(iteration, [5, 0, 9])
    for place, index in enumerate([5, 0, 9]):
        assert same(
            tasks.batch(iteration, [index]),
            TaskBatch(*(getattr(whole, name)[place : place + 1] for name in FIELDS)),
        )
    assert same(stream(seed=seed, **options).batch(iteration, [5, 0, 9]), whole)
    assert not same(
        stream(seed=seed + 1, **options).batch(iteration, range(6)),
        tasks.batch(iteration, range(6)),
    )


@given(OPTIONS, SEEDS, st.integers(0, 1000))
def test_no_class_of_one_split_appears_in_another_whatever_the_options(
    options: dict[str, Any], seed: int, iteration: int
) -> None:
    """A split's images have its own brightness, which no augmentation changes but to zero."""
    level = {"train": 50, "val": 100, "test": 200}
    splits = {
        split: {
            f"{split}/{index}": torch.full((6, 1, 4, 4), value, dtype=torch.uint8)
            for index in range(4)
        }
        for split, value in level.items()
    }
    if options["within"]:
        options = {**options, "within": False}  # arrays have no super-classes
    tasks = ArrayTasks(**splits, ways=2, shots=1, queries=2, seed=seed, **options)
    for split, value in level.items():
        batch = getattr(tasks, split).batch(iteration, range(3))
        for images in (batch.support_x, batch.query_x):
            assert set((images * 255).round().long().unique().tolist()) <= {0, value}
            assert value in (images * 255).round().long()


def test_validation_and_test_tasks_are_not_augmented_and_keep_their_size() -> None:
    splits = {
        split: {
            f"{split}/{index}": torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8)
            for index in range(4)
        }
        for split in ("train", "val", "test")
    }
    plain, augmented = (
        ArrayTasks(**splits, ways=2, shots=1, queries=2, **options)
        for options in (
            {},
            {"rotate": True, "flip": True, "shift": 1, "train_ways": (2, 4), "train_shots": (1, 3)},
        )
    )
    for split in ("val", "test"):
        assert same(*(getattr(tasks, split).batch(3, range(4)) for tasks in (plain, augmented)))
    assert (plain.outputs, augmented.outputs) == (2, 4)
    assert not same(*(tasks.train.batch(3, range(4)) for tasks in (plain, augmented)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"within": True, "ways": 6},
            "6-way tasks within one super-class need 6 classes of one, but the largest of the "
            "train split, 'c', has 5: "
            "lower ways, or leave within out",
        ),
        (
            {"train_ways": (2, 13)},
            "13-way tasks need 13 classes, but the train split has 12: lower ways, or give that "
            "split more classes",
        ),
        (
            {"train_shots": (1, 5)},
            "5 shots and 3 queries need 8 images of every class, but the class 'class 0' of the "
            "train split has 7: "
            "lower shots or queries, or leave that class out",
        ),
    ],
)
def test_options_that_the_classes_cannot_meet_are_refused(
    options: dict[str, Any], text: str
) -> None:
    with pytest.raises(RequestError) as error:
        stream(**options)
    assert str(error.value) == text


def test_options_of_the_wrong_form_are_refused() -> None:
    images = {f"{index}": torch.zeros(4, 1, 2, 3, dtype=torch.uint8) for index in range(12)}
    names = list(images)
    splits = {
        split: {name: images[name] for name in names[start::3]}
        for start, split in enumerate(("train", "val", "test"))
    }
    for options, text in (
        (
            {"rotate": True},
            "rotate turns images by multiples of 90 degrees, but they have 3 x 2 pixels: make them "
            "square, or leave rotate out",
        ),
        (
            {"within": True},
            "within draws tasks from one super-class, but the classes of the train split have "
            "none: leave it out, "
            "or give classes that stand in folders of their super-class",
        ),
        (
            {"train_ways": (4, 2)},
            "array tasks: train_ways = [4, 2]: give the fewest first, at least 2",
        ),
        ({"rotates": True}, "array tasks: unknown field 'rotates': did you mean 'rotate'?"),
        ({"shift": -1}, "array tasks: shift = -1: input should be greater than or equal to 0"),
    ):
        with pytest.raises(RequestError) as error:
            ArrayTasks(**splits, ways=2, shots=1, queries=2, **options)
        assert str(error.value) == text


def test_images_beyond_the_budget_are_mapped_from_a_file_and_draw_the_same_tasks() -> None:
    small, large = allocate((3, 2**18), 1), allocate((5, 2**18), 1)
    assert not isinstance(small, np.memmap)
    assert isinstance(large, np.memmap)
    large[:] = np.arange(5, dtype=np.uint8)[:, None]
    assert torch.equal(torch.from_numpy(large)[:, 0], torch.arange(5, dtype=torch.uint8))
    assert large.sum() == 10 * 2**18
