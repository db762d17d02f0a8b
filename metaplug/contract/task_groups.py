"""The tasks of a batch by size: those of one size are computed together, without their padding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from metaplug.contract.inputs import Inputs, map_inputs
from metaplug.contract.task_batch import FIELDS, Part, TaskBatch, TaskSize


class Alike(NamedTuple):
    """The tasks of a batch that have one size: their places, and one part of their examples."""

    rows: list[int]
    x: Inputs
    y: Tensor
    ways: int | None


def alike(batch: TaskBatch, part: Part) -> list[Alike]:
    """Return the support or query examples of the tasks, those of one size together, unpadded."""
    x, y = getattr(batch, f"{part}_x"), getattr(batch, f"{part}_y")
    if batch.sizes is None:
        return [Alike([*range(batch.num_tasks)], x, y, None)]
    found = []
    for (count, ways), rows in _groups(batch.sizes, part).items():
        pick = partial(_picked, rows=rows, count=count, tasks=batch.num_tasks)
        found.append(Alike(rows, map_inputs(pick, x), pick(y), ways))
    return found


def uniform(batch: TaskBatch) -> TaskBatch:
    """Return the most tasks that have one size, unpadded; the batch itself where all have."""
    if batch.sizes is None:
        return batch
    most = max(batch.sizes, key=batch.sizes.count)
    rows = [row for row, size in enumerate(batch.sizes) if size == most]
    fields = []
    for name in FIELDS:
        count = most.support if name.startswith("support") else most.query
        pick = partial(_picked, rows=rows, count=count, tasks=batch.num_tasks)
        fields.append(map_inputs(pick, getattr(batch, name)))
    return TaskBatch(*fields, sizes=None if most.ways is None else (most,) * len(rows))


def by_size(
    function: Callable[[Tensor], Tensor],
    predictions: Tensor,
    sizes: tuple[TaskSize, ...] | None,
    part: Part,
    class_axis: int | None = 2,
) -> Tensor:
    """Return what `function` gives of the predictions of tasks of one size, row by row.

    Args:
        function: (tasks, n, *output) → (tasks, ...), of every size the same form.
        predictions: (T, n, *output), padded.
        sizes: of the T tasks; None where nothing is padded.
        part: whose predictions they are.
        class_axis: the axis of classes, of which those beyond a task's ways are left out.
    """
    if sizes is None:
        return function(predictions)
    rows_in_order: list[int] = []
    found = []
    for (count, ways), rows in _groups(sizes, part).items():
        own = _picked(predictions, rows=rows, count=count, tasks=len(sizes))
        if ways is not None and class_axis is not None and class_axis < own.ndim:
            own = own.narrow(class_axis, 0, min(ways, own.shape[class_axis]))
        found.append(function(own))
        rows_in_order += rows
    return torch.cat(found)[places(rows_in_order)]


def places(rows: list[int]) -> list[int]:
    """Return where each task stands among `rows`: the way back from groups to the batch.

    >>> places([2, 0, 1])
    [1, 2, 0]
    """
    return sorted(range(len(rows)), key=rows.__getitem__)


def _groups(sizes: tuple[TaskSize, ...], part: Part) -> dict[tuple[int, int | None], list[int]]:
    groups: dict[tuple[int, int | None], list[int]] = {}
    for row, size in enumerate(sizes):
        groups.setdefault((size.examples(part), size.ways), []).append(row)
    return groups


def _picked(tensor: Tensor, *, rows: list[int], count: int, tasks: int) -> Tensor:
    return (tensor if len(rows) == tasks else tensor[rows])[:, :count]
