"""TaskBatch checks its tensors against each other, and the sizes of its tasks."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from metaplug import MetaLearner, Plugin, hookimpl
from metaplug.contract.inner_step import InnerStep
from metaplug.contract.task_batch import TaskSize
from metaplug.contract.task_groups import alike
from metaplug.errors import RequestError, RunError
from metaplug.tasks import TaskBatch


def parts(**changed: object) -> dict[str, object]:
    return {
        "support_x": torch.zeros(2, 3, 4),
        "support_y": torch.zeros(2, 3, dtype=torch.int64),
        "query_x": torch.zeros(2, 5, 4),
        "query_y": torch.zeros(2, 5, dtype=torch.int64),
    } | changed


def test_a_batch_knows_its_tasks_and_device() -> None:
    batch = TaskBatch(**parts())
    assert batch.num_tasks == 2
    assert batch.device == torch.device("cpu")
    assert batch.to("cpu") is batch


def test_moving_a_batch_moves_all_of_it() -> None:
    moved = TaskBatch(**parts()).to("meta")
    assert {
        moved.support_x.device.type,
        moved.support_y.device.type,
        moved.query_x.device.type,
        moved.query_y.device.type,
    } == {"meta"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"query_y": [1]},
            "TaskBatch: query_y is a list, not a tensor: give torch.as_tensor(query_y)",
        ),
        (
            {"support_y": torch.zeros(2)},
            "TaskBatch: support_y has shape (2,): give (tasks, examples, ...) with at least one "
            "task and one example",
        ),
        (
            {"query_x": torch.zeros(2, 0, 4)},
            "TaskBatch: query_x has shape (2, 0, 4): give (tasks, examples, ...) with at least one "
            "task and one example",
        ),
        (
            {"query_x": torch.zeros(3, 5, 4)},
            "TaskBatch: support_x is float32 of shape (2, 3, 4) and query_x float32 of shape (3, "
            "5, 4), "
            "which do not fit: "
            "every field must stack the same number of tasks",
        ),
        (
            {"support_y": torch.zeros(2, 4, dtype=torch.int64)},
            "TaskBatch: support_x is float32 of shape (2, 3, 4) and support_y int64 of shape (2, "
            "4), "
            "which do not fit: give one target for every example",
        ),
        (
            {"query_x": torch.zeros(2, 5, 6)},
            "TaskBatch: support_x is float32 of shape (2, 3, 4) and query_x float32 of shape (2, "
            "5, 6), "
            "which do not fit: "
            "support and query examples must have one input shape",
        ),
        (
            {"query_y": torch.zeros(2, 5, 1, dtype=torch.int64)},
            "TaskBatch: support_y is int64 of shape (2, 3) and query_y int64 of shape (2, 5, 1), "
            "which do not fit: "
            "support and query examples must have one target shape",
        ),
        (
            {"query_x": torch.zeros(2, 5, 4, dtype=torch.float64)},
            "TaskBatch: support_x is float32 of shape (2, 3, 4) and query_x float64 of shape (2, "
            "5, 4), "
            "which do not fit: convert one of them",
        ),
        (
            {"query_y": torch.zeros(2, 5)},
            "TaskBatch: support_y is int64 of shape (2, 3) and query_y float32 of shape (2, 5), "
            "which do not fit: "
            "give integer labels in both, or floating-point targets in both",
        ),
        (
            {"query_y": torch.zeros(2, 5, dtype=torch.int64, device="meta")},
            "TaskBatch: query_y is on meta, support_x on cpu: move all to one device",
        ),
    ],
)
def test_a_part_that_does_not_fit_is_named(changed: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as error:
        TaskBatch(**parts(**changed))
    assert str(error.value) == message


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_found(bad: float) -> None:
    query_x = torch.zeros(2, 5, 4)
    query_x[1, 4, 2] = bad
    with pytest.raises(RunError) as error:
        TaskBatch(**parts(query_x=query_x)).check_values(None)
    assert (
        str(error.value)
        == "query_x of task 1 holds NaN or Inf, on which no loss is defined: clean the data of "
        "that task"
    )


def test_targets_that_are_not_finite_are_found() -> None:
    support_y = torch.full((2, 3), float("nan"))
    with pytest.raises(RunError, match=r"^support_y of task 0 holds NaN or Inf"):
        TaskBatch(**parts(support_y=support_y, query_y=torch.zeros(2, 5))).check_values(5)


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_out_of_range_are_found(label: int) -> None:
    query_y = torch.zeros(2, 5, dtype=torch.int64)
    query_y[1, 1] = label
    batch = TaskBatch(**parts(query_y=query_y))
    batch.check_values(None)
    with pytest.raises(RequestError) as error:
        batch.check_values(5)
    assert str(error.value) == (
        f"labels out of range: query_y has the label {label}, but the model has 5 outputs, for the "
        "labels 0 to 4: "
        "give the model more outputs, or the tasks fewer ways"
    )


def test_batches_are_stacked_in_their_order_and_unequal_sizes_refused() -> None:
    one, other = TaskBatch(**parts()), TaskBatch(**parts(support_x=torch.ones(2, 3, 4)))
    stacked = TaskBatch.stack([one, other])
    assert stacked.num_tasks == 4
    assert torch.equal(stacked.support_x, torch.cat([one.support_x, other.support_x]))
    larger = TaskBatch(
        **parts(query_x=torch.zeros(2, 6, 4), query_y=torch.zeros(2, 6, dtype=torch.int64))
    )
    with pytest.raises(RequestError) as error:
        TaskBatch.stack([one, larger])
    assert str(error.value) == (
        "TaskBatch.stack: query_x of batch 1 is float32 of shape (6, 4) on cpu for a task, of "
        "batch 0 float32 of shape (5, 4) on cpu: join tasks of other sizes by TaskBatch.from_tasks"
    )
    with pytest.raises(
        RequestError, match=r"^TaskBatch.stack: there is no task: give at least one$"
    ):
        TaskBatch.stack([])


# Several inputs, by name or place.

X, Y, NUMBERS = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)
NAMED = {"tokens": X, "mask": NUMBERS}


def test_inputs_by_name_and_place_go_everywhere_together() -> None:
    for x in (NAMED, (X, NUMBERS)):
        batch = TaskBatch(x, Y, x, Y)
        assert batch.num_tasks == 2
        assert len(batch.tensors()) == 6
        assert batch.map(lambda each: each + 1).tasks(slice(1, 2)).num_tasks == 1
        assert batch.to("meta").device.type == "meta"
    given = dict(NAMED)
    batch = TaskBatch(given, Y, given, Y)
    given.clear()
    assert [*batch.support_x] == ["tokens", "mask"]


@pytest.mark.parametrize(
    ("support_x", "query_x", "message"),
    [
        ({}, {}, "support_x is empty: give at least one tensor"),
        ((X,), (), "query_x is empty: give at least one tensor"),
        (
            NAMED,
            {"tokens": X},
            "support_x has the inputs 'support_x['tokens']', 'support_x['mask']' and query_x "
            "'query_x['tokens']': give both parts the same, in one order",
        ),
        (
            (X, X),
            X,
            "support_x has the inputs 'support_x[0]', 'support_x[1]' and query_x 'query_x': give "
            "both parts the same, in one order",
        ),
        (
            NAMED,
            {**NAMED, "mask": [1]},
            "query_x['mask'] is a list, not a tensor: give torch.as_tensor(query_x['mask'])",
        ),
        (
            {**NAMED, "mask": torch.zeros(3, 3)},
            NAMED,
            "support_x['tokens'] is float32 of shape (2, 3, 4) and support_x['mask'] float32 of "
            "shape (3, 3), which do not fit: every field must stack the same number of tasks",
        ),
        (
            {**NAMED, "mask": torch.zeros(2, 4)},
            NAMED,
            "support_x['mask'] is float32 of shape (2, 4) and support_y int64 of shape (2, 3), "
            "which do not fit: give one target for every example",
        ),
        (
            {**NAMED, "mask": NUMBERS.long()},
            NAMED,
            "support_x['mask'] is int64 of shape (2, 3) and query_x['mask'] float32 of shape (2, "
            "3), which do not fit: convert one of them",
        ),
    ],
)
def test_several_inputs_that_do_not_fit_are_named(
    support_x: object, query_x: object, message: str
) -> None:
    with pytest.raises(RequestError) as error:
        TaskBatch(support_x, Y, query_x, Y)
    assert str(error.value) == f"TaskBatch: {message}"


# Tasks of other sizes.


def of(support: int, query: int, label: int, **changed: object) -> TaskBatch:
    """One task, whose highest label is in its query set."""
    x, y = torch.ones(1, support + query, 4), torch.zeros(1, support + query, dtype=torch.int64)
    y[0, -1] = label
    given = {
        "support_x": x[:, :support],
        "support_y": y[:, :support],
        "query_x": x[:, support:],
        "query_y": y[:, support:],
    }
    return TaskBatch(**given | changed)


def test_tasks_are_padded_and_say_their_sizes() -> None:
    batch = TaskBatch.from_tasks([of(1, 2, 4), of(3, 1, 0)])
    assert batch.sizes == (TaskSize(1, 2, 5), TaskSize(3, 1, 1))
    assert batch.support_y.tolist() == [[0, -100, -100], [0, 0, 0]]
    assert batch.query_y.tolist() == [[0, 4], [0, -100]]
    assert batch.support_x[0].sum() == 4  # padded with 0
    assert TaskBatch.from_tasks([batch, of(3, 2, 1)]).sizes == (*batch.sizes, TaskSize(3, 2, 2))
    assert batch.tasks(slice(1, 2)).sizes == (TaskSize(3, 1, 1),)
    assert [(group.rows, group.ways) for group in alike(batch, "support")] == [([0], 5), ([1], 1)]


def test_ways_are_read_of_class_indices_alone() -> None:
    labels = torch.zeros(1, 2, 3, dtype=torch.int64)  # dense
    floats = torch.zeros(1, 2, 3)
    x = torch.zeros(1, 2, 4)
    for y in (labels, floats):
        task = TaskBatch(x, y, x, y)
        other = TaskBatch(x[:, :1], y[:, :1], x, y)
        assert TaskBatch.from_tasks([task, other]).sizes == (TaskSize(2, 2), TaskSize(1, 2))
    assert TaskBatch.from_tasks([of(1, 2, 4)] * 2, ways=[None, None]).sizes is None
    ignored = of(1, 1, 0, query_y=torch.tensor([[-100]]), support_y=torch.tensor([[-100]]))
    assert TaskBatch.from_tasks([ignored]).sizes == (TaskSize(1, 1, 1),)


def test_sizes_may_be_plain_tuples() -> None:
    batch = TaskBatch(X, Y, X, Y, sizes=[(2, 3, 2), (3, 3)])
    assert batch.sizes == (TaskSize(2, 3, 2), TaskSize(3, 3, None))


@pytest.mark.parametrize(
    "sizes",
    [
        (TaskSize(3, 3),),
        (TaskSize(3, 3), TaskSize(4, 3)),
        (TaskSize(3, 3), TaskSize(3, 0)),
        (TaskSize(3, 3, 0), TaskSize(3, 3)),
        (TaskSize(3, 3, -1), TaskSize(3, 3)),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[TaskSize, ...]) -> None:
    with pytest.raises(RequestError) as error:
        TaskBatch(X, Y, X, Y, sizes=sizes)
    said = ", ".join(f"'{size}'" for size in sizes)
    assert str(error.value) == (
        f"TaskBatch: sizes is {said}, but the batch has 2 tasks of at most 3 support and 3 query "
        "examples: give one size for each task, or make the batch by TaskBatch.from_tasks"
    )


@pytest.mark.parametrize(
    ("tasks", "ways", "message"),
    [
        ([], None, "TaskBatch.from_tasks: there is no task: give at least one"),
        (
            [of(1, 1, 0)],
            [2, 2],
            "TaskBatch.from_tasks: 2 ways for 1 tasks: give one number for each",
        ),
        (
            [of(1, 1, 0), of(1, 2, 2)],
            [2, 2],
            "labels out of range: query_y of task 1 has the label 2, but the task has 2 ways, for "
            "the labels 0 to 1: correct its labels or its ways",
        ),
        (
            [TaskBatch(X, Y, X, Y), TaskBatch(NAMED, Y, NAMED, Y)],
            None,
            "TaskBatch.from_tasks: batch 1 has 'support_x['tokens']', 'support_x['mask']', "
            "'support_y', 'query_x['tokens']', 'query_x['mask']', 'query_y', batch 0 'support_x', "
            "'support_y', 'query_x', 'query_y': give all tasks the same inputs",
        ),
        (
            [TaskBatch(X, Y, X, Y), TaskBatch(X[..., :2], Y, X[..., :2], Y)],
            None,
            "TaskBatch.from_tasks: support_x of batch 1 is float32 of shape (2,) on cpu for an "
            "example, of batch 0 float32 of shape (4,) on cpu: pad the examples of all tasks to "
            "one shape",
        ),
        (
            [TaskBatch(X, Y, X, Y), TaskBatch(X, NUMBERS, X, NUMBERS)],
            None,
            "TaskBatch.from_tasks: support_y of batch 1 is float32 of shape () on cpu for an "
            "example, of batch 0 int64 of shape () on cpu: convert or move one of them",
        ),
    ],
)
def test_tasks_that_cannot_be_joined_are_refused(
    tasks: list[TaskBatch], ways: list[int] | None, message: str
) -> None:
    with pytest.raises(RequestError) as error:
        TaskBatch.from_tasks(tasks, ways=ways)
    assert str(error.value) == message


def test_more_ways_than_outputs_are_refused() -> None:
    batch = TaskBatch.from_tasks([of(1, 1, 4), of(1, 1, 1)])
    with pytest.raises(RequestError) as error:
        batch.check_labels(3)
    assert str(error.value) == (
        "a task has 5 ways, but the model has 3 outputs: give the model more outputs, or the tasks "
        "fewer ways"
    )


def test_a_step_gives_predictions_by_task_without_padding() -> None:
    seen = []

    def shape(predictions: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(predictions.shape))
        return predictions.flatten(1).sum(1)

    step = InnerStep(
        0,
        1,
        1,
        0,
        0,
        True,
        support_predictions=torch.ones(3, 4, 5),
        sizes=(TaskSize(4, 1, 2), TaskSize(2, 1, 5), TaskSize(4, 1, 2)),
        class_axis=2,
    )
    assert step.by_task(shape).tolist() == [8.0, 10.0, 8.0]
    assert seen == [(2, 4, 2), (1, 2, 5)]
    queries = torch.ones(3, 1, 5)
    assert step.by_task(shape, predictions=queries, part="query").tolist() == [2.0, 5.0, 2.0]
    last = InnerStep(
        0,
        1,
        1,
        0,
        0,
        True,
        support_predictions=torch.ones(2, 4, 3, 5),
        sizes=(TaskSize(1, 1, 2), TaskSize(4, 1)),
        class_axis=3,
    )
    assert last.by_task(shape).tolist() == [6.0, 60.0]


def test_a_start_is_made_of_predictions_by_task_without_padding() -> None:
    """In initialize_parameters there is no pass yet whose predictions a step could have."""
    seen: list[Any] = []
    refused: dict[str, str] = {}

    class Looks(Plugin):
        transductive = True

        @hookimpl
        def initialize_parameters(self, parameters, step):
            def counted(predictions, targets=None):
                seen.append((tuple(predictions.shape), None if targets is None else targets.shape))
                return predictions.flatten(1).sum(1)

            support, query = step.forward(parameters)[1], step.forward(parameters, "query")
            step.by_task(counted, step.targets, predictions=support)
            step.by_task(counted, predictions=query, part="query")
            for name, given in {
                "other": {"predictions": support, "part": "query"},
                "none": {"part": "query"},
            }.items():
                with pytest.raises(RequestError) as error:
                    step.by_task(counted, **given)
                refused[name] = str(error.value)

    x = torch.ones(1, 3, 2)
    small = TaskBatch(x[:, :1], torch.tensor([[1]]), x[:, :2], torch.tensor([[0, 1]]))
    large = TaskBatch(x[:, :2], torch.tensor([[2, 0]]), x, torch.tensor([[2, 1, 0]]))
    learner = MetaLearner(torch.nn.Linear(2, 4), plugins=[Looks()], inner_steps=1)
    learner.meta_gradients(TaskBatch.from_tasks([small, large]))
    assert seen[-4:] == [
        ((1, 1, 2), (1, 1)),
        ((1, 2, 3), (1, 2)),
        ((1, 2, 2), None),
        ((1, 3, 3), None),
    ]
    assert refused == {
        "other": "plugin 'looks' gives by_task predictions of the shape (2, 2, 4), but these tasks "
        "have 3 query examples, which axis 1 holds: give predictions as forward returns them, and "
        'those of support examples with part="support"',
        "none": "plugin 'looks' asks by_task for query examples, of which a step has no "
        'predictions of its own: give predictions=step.forward(parameters, "query")',
    }


def test_an_outcome_gives_predictions_and_targets_by_task_without_padding() -> None:
    seen = []

    class Looks(Plugin):
        @hookimpl
        def transform_outer_losses(self, losses, outcome):
            def counted(predictions, targets):
                seen.append((tuple(predictions.shape), targets.tolist()))
                return predictions.flatten(1).sum(1)

            for part in ("support", "query"):
                _, predictions = outcome.forward(outcome.initial_parameters, part)
                targets = getattr(outcome.batch, f"{part}_y")
                outcome.by_task(counted, targets, predictions=predictions, part=part)
            assert outcome.class_axis == 2
            return losses

    x = torch.ones(1, 3, 2)
    small = TaskBatch(x[:, :1], torch.tensor([[1]]), x[:, :2], torch.tensor([[0, 1]]))
    large = TaskBatch(x[:, :2], torch.tensor([[2, 0]]), x, torch.tensor([[2, 1, 0]]))
    learner = MetaLearner(torch.nn.Linear(2, 4), plugins=[Looks()], inner_steps=1)
    learner.meta_gradients(TaskBatch.from_tasks([small, large]))
    assert seen == [
        ((1, 1, 2), [[1]]),
        ((1, 2, 3), [[2, 0]]),
        ((1, 2, 2), [[0, 1]]),
        ((1, 3, 3), [[2, 1, 0]]),
    ]


def test_transformed_tasks_may_have_probabilities_of_all_the_model_s_outputs() -> None:
    seen = []

    class Softens(Plugin):
        @hookimpl
        def transform_tasks(self, batch, outputs):
            seen.append(outputs)
            soft = [
                torch.nn.functional.one_hot(y, outputs).float()
                for y in (batch.support_y, batch.query_y)
            ]
            return replace(batch, support_y=soft[0], query_y=soft[1])

    x, y = torch.randn(2, 3, 2), torch.tensor([[0, 1, 2], [2, 1, 1]])
    model = torch.nn.Linear(2, 4)
    plain, ours = (
        MetaLearner(copy.deepcopy(model), plugins=chain).meta_gradients(TaskBatch(x, y, x, y))
        for chain in ([], [Softens()])
    )
    assert seen == [4]
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient)
