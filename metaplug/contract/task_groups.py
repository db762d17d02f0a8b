"""The tasks of a batch by size: those of one size are computed together, without their padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metaplug.contract.inputs import Inputs, tensors_of, with_tensors
from metaplug.contract.task_batch import FIELDS, TaskBatch
from metaplug.contract.task_sizes import Part, TaskSize
from metaplug.errors import RequestError


class Alike(NamedTuple):
    """The tasks of a batch that have one size: their places, and one part of their examples."""

    rows: list[int]
    x: Inputs
    y: Tensor
    ways: int | None


def alike(batch: TaskBatch, part: Part) -> list[Alike]:
    """Return the support or query examples of the tasks, those of one size together, unpadded.

    >>> y = torch.zeros(1, 2, dtype=torch.long)
    >>> batch = TaskBatch.from_tasks([TaskBatch(y, y, y, y), TaskBatch(*[y[:, :1]] * 4)])
    >>> [(group.rows, tuple(group.x.shape)) for group in alike(batch, "query")]
    [([0], (1, 2)), ([1], (1, 1))]
    """
    x, y = getattr(batch, f"{part}_x"), getattr(batch, f"{part}_y")
    if batch.sizes is None:
        return [Alike([*range(batch.num_tasks)], x, y, None)]
    return [
        Alike(rows, with_tensors(x, own), own_y, ways)
        for rows, ways, (*own, own_y) in grouped(batch.sizes, part, *tensors_of(x), y)
    ]


def uniform(batch: TaskBatch) -> TaskBatch:
    """Return the most tasks that have one size, unpadded; the batch itself where all have."""
    if batch.sizes is None:
        return batch
    most = max(batch.sizes, key=batch.sizes.count)
    rows = [row for row, size in enumerate(batch.sizes) if size == most]
    fields = []
    for name in FIELDS:
        count = most.support if name.startswith("support") else most.query
        value = getattr(batch, name)
        own = [rows_of(each, rows)[:, :count] for each in tensors_of(value)]
        fields.append(with_tensors(value, own))
    return TaskBatch(*fields)


def targets_of(batch: TaskBatch, part: Part) -> Tensor:
    """Return the targets of a part, without the last places that are of no task of this batch."""
    targets = batch.support_y if part == "support" else batch.query_y
    if batch.sizes is None:
        return targets
    return targets[:, : max(size.examples(part) for size in batch.sizes)]


def check_part(predictions: Tensor, count: int, part: Part, owner: str) -> None:
    """Refuse a plugin's predictions of another number of examples than those of the part.

    Raises:
        RequestError: they would be cut by the counts of other examples.
    """
    if predictions.shape[1:2] != (count,):
        other = "query" if part == "support" else "support"
        raise RequestError(
            f"plugin '{owner}' gives by_task predictions of the shape {tuple(predictions.shape)}, "
            f"but these tasks have {count} {part} examples, which axis 1 holds: give predictions "
            f'as forward returns them, and those of {other} examples with part="{other}"'
        )


def by_size(
    function: Callable[..., Tensor],
    predictions: Tensor,
    *others: Tensor,
    sizes: tuple[TaskSize, ...] | None,
    part: Part,
    class_axis: int | None = 2,
) -> Tensor:
    """Return what `function` gives of the predictions of tasks of one size, row by row.

    Args:
        function: (tasks, n, *output) → (tasks, ...), of every size the same form; it gets the same
            rows of `others` as well.
        predictions: (T, n, *output), padded.
        others: (T, n, ...), padded.
        sizes: of the T tasks; None where nothing is padded.
        part: whose predictions they are.
        class_axis: the axis of classes, of which those beyond a task's ways are left out.
    """
    if sizes is None:
        return function(predictions, *others)
    found: list[tuple[list[int], Tensor]] = []
    for rows, ways, (own, *rest) in grouped(sizes, part, predictions, *others):
        counted = own
        if ways is not None and class_axis is not None:
            counted = own.narrow(class_axis, 0, min(ways, own.shape[class_axis]))
        found.append((rows, function(counted, *rest)))
    return in_order(found)


def grouped(
    sizes: Sequence[TaskSize], part: Part, *tensors: Tensor
) -> Iterator[tuple[list[int], int | None, list[Tensor]]]:
    """Yield, for each number of examples and of ways, the places of its tasks and their examples.

    Args:
        sizes: of the T tasks.
        part: whose examples the tensors hold.
        tensors: (T, n, ...) each, padded; without padding they are (tasks, examples, ...).

    >>> sizes, y = [TaskSize(1, 5), TaskSize(2, 3), TaskSize(3, 5)], torch.zeros(3, 5)
    >>> [(rows, tuple(own.shape)) for rows, _, (own,) in grouped(sizes, "query", y)]
    [([0, 2], (2, 5)), ([1], (1, 3))]
    """
    groups: dict[tuple[int, int | None], list[int]] = {}
    for row, size in enumerate(sizes):
        groups.setdefault((size.examples(part), size.ways), []).append(row)
    for (count, ways), rows in groups.items():
        yield rows, ways, [rows_of(each, rows)[:, :count] for each in tensors]


def rows_of(tensor: Tensor, rows: list[int], *, shared: bool = False) -> Tensor:
    """Return some rows, stacked; their derivative costs no more than they do.

    Args:
        shared: whether rows that are one tensor, expanded, may stay so: a gradient by row would go
            to the first ones.
    """
    if len(rows) == len(tensor):
        return tensor
    if shared and tensor.stride(0) == 0:
        return tensor[: len(rows)]
    unbound = tensor.unbind(0)
    return torch.stack([unbound[row] for row in rows])


def in_order(found: list[tuple[list[int], Tensor]]) -> Tensor:
    """Return the rows of groups of tasks, (tasks, ...) each, in the order of the batch.

    Shorter ones are filled up with zeros along their second axis.
    """
    if len(found) == 1:
        return found[0][1]
    most = max((each.shape[1] for _, each in found if each.ndim > 1), default=0)
    by_row: dict[int, Tensor] = {}
    for rows, each in found:
        whole = each
        if each.ndim > 1 and each.shape[1] < most:
            rest = each.new_zeros(each.shape[0], most - each.shape[1], *each.shape[2:])
            whole = torch.cat([each, rest], 1)
        by_row.update(zip(rows, whole.unbind(0), strict=True))
    return torch.stack([by_row[row] for row in range(len(by_row))])
