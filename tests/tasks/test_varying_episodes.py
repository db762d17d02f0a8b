"""Episodes whose ways and shots differ from task to task: sizes, padding, and a task's own draw."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metaplug.contract.task_batch import FIELDS, TaskBatch
from metaplug.contract.task_sizes import IGNORED, TaskSize
from metaplug.errors import RequestError
from metaplug.tasks import ArrayTasks, ClassImages, EpisodeOptions, ImageEpisodes

SEEDS = st.integers(-(2**70), 2**70)
OPTIONS = st.fixed_dictionaries(
    {
        "within": st.booleans(),
        "rotate": st.booleans(),
        "flip": st.booleans(),
        "shift": st.integers(0, 2),
        "train_ways": st.sampled_from([None, (2, 4)]),
        "train_shots": st.just((1, 3)),
        "vary": st.just("task"),
    }
)


def stream(
    *, seed: int = 0, styles: bool = False, outputs: int | None = None, **options: Any
) -> ImageEpisodes:
    """Ten classes of 7 to 9 images of 3 x 3 pixels, the middle one the class and never 0."""
    counts = (7, 8, 9, 7, 8, 9, 7, 8, 9, 7)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(20, 256, (sum(counts), 1, 3, 3), dtype=torch.uint8, generator=generator)
    images[:, 0, 1, 1] = torch.arange(1, 11, dtype=torch.uint8).repeat_interleave(
        torch.tensor(counts)
    )
    classes = ClassImages(
        tuple("abcdefghij"),
        images,
        counts,
        np.arange(sum(counts)) % 3 if styles else None,
        ("x",) * 4 + ("y",) * 6,
    )
    return ImageEpisodes(
        classes,
        split="train",
        ways=3,
        shots=2,
        queries=2,
        seed=seed,
        options=EpisodeOptions(**options),
        outputs=outputs,
    )


def sizes_of(batch: TaskBatch, ways: int) -> tuple[TaskSize, ...]:
    full = TaskSize(batch.support_y.shape[1], batch.query_y.shape[1], ways)
    return batch.sizes or (full,) * batch.num_tasks


def fields(batch: TaskBatch) -> list[torch.Tensor]:
    return [getattr(batch, name) for name in FIELDS]


@given(OPTIONS, SEEDS, st.booleans(), st.lists(st.integers(0, 10**6), min_size=2, max_size=5))
def test_a_varying_task_equals_itself_alone_padded_as_from_tasks_pads(
    options: dict[str, Any], seed: int, styles: bool, indices: list[int]
) -> None:
    tasks = stream(seed=seed, styles=styles, **options)
    whole = tasks.batch(3, indices)
    alone = [tasks.batch(3, [index]) for index in indices]
    joined = TaskBatch.from_tasks(alone)
    for one, other in zip(fields(whole), fields(joined), strict=True):
        assert torch.equal(one, other)
    assert sizes_of(whole, tasks.most_ways) == joined.sizes


@given(SEEDS)
def test_a_varying_task_is_well_formed(seed: int) -> None:
    tasks = stream(seed=seed, train_ways=(2, 4), train_shots=(1, 3), vary="task", styles=True)
    batch = tasks.batch(0, range(6))
    for task, size in enumerate(sizes_of(batch, 4)):
        assert 2 <= size.ways <= 4
        shots, rest = divmod(size.support, size.ways)
        assert (1 <= shots <= 3, rest, size.query) == (True, 0, 2 * size.ways)
        for x, y, count, each in (
            (batch.support_x, batch.support_y, size.support, shots),
            (batch.query_x, batch.query_y, size.query, 2),
        ):
            labels = torch.arange(size.ways).repeat_interleave(each)
            assert torch.equal(y[task, :count], labels)
            assert (y[task, count:] == IGNORED).all()
            assert (x[task, count:] == 0).all()
            classes = x[task, :count, 0, 1, 1].unflatten(0, (size.ways, each))
            assert (classes == classes[:, :1]).all()
            assert len(set(classes[:, 0].tolist())) == size.ways
        images = [*batch.support_x[task, : size.support], *batch.query_x[task, : size.query]]
        assert len({tuple(image.flatten().tolist()) for image in images}) == len(images)


def test_every_size_is_as_likely_and_drawn_for_each_task() -> None:
    tasks = stream(train_ways=(2, 4), train_shots=(1, 3), vary="task")
    batch = tasks.batch(0, range(900))
    assert batch.sizes is not None
    drawn = [(size.ways, size.support // size.ways) for size in batch.sizes]
    counts = [drawn.count((ways, shots)) for ways in (2, 3, 4) for shots in (1, 2, 3)]
    # 100 expected of each; 26.1 is the 99.9 % quantile of chi-square with 8 degrees of freedom.
    assert sum((count - 100) ** 2 / 100 for count in counts) < 26.1
    assert sum(counts) == 900


def test_a_batch_of_fewer_ways_says_so_and_one_of_all_ways_says_nothing() -> None:
    tasks = stream(train_ways=(2, 4))
    seen = set()
    for iteration in range(20):
        batch = tasks.batch(iteration, range(2))
        ways = int(batch.support_y.max()) + 1
        full = TaskSize(2 * ways, 2 * ways, ways)
        assert batch.sizes == (None if ways == 4 else (full, full))
        seen.add(ways)
    assert seen == {2, 3, 4}
    assert stream().batch(0, range(2)).sizes is None
    assert stream(outputs=5).batch(0, [0]).sizes == (TaskSize(6, 6, 3),)


def arrays(**options: Any) -> ArrayTasks:
    splits = {
        split: {
            f"{split}/{index}": torch.randint(1, 256, (6, 1, 2, 2), dtype=torch.uint8)
            for index in range(5)
        }
        for split in ("train", "val", "test")
    }
    return ArrayTasks(**splits, ways=2, shots=1, queries=2, **options)


def test_validation_and_test_tasks_vary_only_where_that_is_asked_for() -> None:
    bounds = {"train_ways": (2, 4), "train_shots": (1, 3)}
    fixed = arrays(**bounds, vary="task")
    assert fixed.outputs == 4
    assert fixed.test.batch(0, range(20)).sizes == (TaskSize(2, 4, 2),) * 20
    for vary in ("batch", "task"):
        varied = arrays(**bounds, vary=vary, varied_evaluation=True)
        for split in (varied.val, varied.test):
            sizes = split.batch(0, range(60)).sizes
            assert sizes is not None
            assert {size.ways for size in sizes} == {2, 3, 4}
            assert {size.support // size.ways for size in sizes} == {1, 2, 3}
    sizes = varied.train.batch(0, range(60)).sizes
    assert sizes is not None
    assert len(set(sizes)) == 9


@pytest.mark.parametrize(
    ("options", "name"),
    [({"vary": "task"}, "vary = task"), ({"varied_evaluation": True}, "varied_evaluation")],
)
def test_bounds_must_be_there_to_draw_in(options: dict[str, Any], name: str) -> None:
    with pytest.raises(RequestError) as error:
        arrays(**options)
    assert str(error.value) == (
        f"array tasks: {name} draws ways and shots for each task, but has no bounds to draw in: "
        "give train_ways or train_shots"
    )
