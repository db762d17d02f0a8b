"""TaskBatch checks its four tensors against each other."""

import pytest
import torch

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
