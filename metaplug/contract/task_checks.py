"""Checks of a batch of tasks: of its form when it is made, of its values before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaplug.contract.task_sizes import IGNORED, TaskSize
from metaplug.errors import RequestError, RunError, quoted

Named = Mapping[str, Tensor]
"""The tensors of a batch, by how a user would write them."""


def check_fields(named: Mapping[str, Any], sizes: Sequence[TaskSize] | None) -> None:
    """Refuse tensors that do not make a batch together.

    >>> check_fields({"support_x": 1}, None)
    Traceback (most recent call last):
        ...
    metaplug.errors.RequestError: TaskBatch: support_x is a int, not a tensor: give \
torch.as_tensor(support_x)
    """
    device = next((each.device for each in named.values() if isinstance(each, Tensor)), None)
    for name, value in named.items():
        _check_tensor(name, value, device)
    support, query = ([name for name in named if name.startswith(f"{part}_x")] for part in PARTS)
    if [name[7:] for name in support] != [name[5:] for name in query]:
        raise RequestError(
            f"TaskBatch: support_x has the inputs {quoted(support)} and query_x {quoted(query)}: "
            "give both parts the same, in one order"
        )
    for part, inputs in zip(PARTS, (support, query), strict=True):
        for name in (*inputs, f"{part}_y"):
            advice = "every field must stack the same number of tasks"
            _match(named, support[0], name, len, advice)
        for name in inputs:
            advice = "give one target for every example"
            _match(named, name, f"{part}_y", lambda x: x.shape[1], advice)
    for one, other in zip(support, query, strict=True):
        advice = "support and query examples must have one input shape"
        _match(named, one, other, lambda x: x.shape[2:], advice)
        _match(named, one, other, lambda x: x.dtype, "convert one of them")
    targets = ("support_y", "query_y")
    advice = "support and query examples must have one target shape"
    _match(named, *targets, lambda x: x.shape[2:], advice)
    advice = "give integer labels in both, or floating-point targets in both"
    _match(named, *targets, Tensor.is_floating_point, advice)
    if sizes is not None:
        _check_sizes(sizes, *(named[name] for name in targets))


PARTS = ("support", "query")


def _check_tensor(name: str, value: Any, device: torch.device | None) -> None:
    if not isinstance(value, Tensor):
        given = f"a {type(value).__name__}, not a tensor"
        raise RequestError(f"TaskBatch: {name} is {given}: give torch.as_tensor({name})")
    if value.ndim < 2 or 0 in value.shape[:2]:
        raise RequestError(
            f"TaskBatch: {name} has shape {tuple(value.shape)}: give (tasks, examples, ...) with "
            "at least one task and one example"
        )
    if value.device != device:
        raise RequestError(
            f"TaskBatch: {name} is on {value.device}, support_x on {device}: move all to one device"
        )


def _match(named: Named, one: str, other: str, of: Callable[[Tensor], Any], advice: str) -> None:
    first, second = named[one], named[other]
    if of(first) != of(second):
        a, b = (f"{str(x.dtype)[6:]} of shape {tuple(x.shape)}" for x in (first, second))
        raise RequestError(f"TaskBatch: {one} is {a} and {other} {b}, which do not fit: {advice}")


def _check_sizes(sizes: Sequence[TaskSize], support_y: Tensor, query_y: Tensor) -> None:
    tasks, most = len(support_y), (support_y.shape[1], query_y.shape[1])
    fit = [
        0 < size.support <= most[0]
        and 0 < size.query <= most[1]
        and (size.ways is None or size.ways > 0)
        for size in sizes
    ]
    if len(sizes) != tasks or not all(fit):
        raise RequestError(
            f"TaskBatch: sizes is {quoted(map(str, sizes[:3]))}, but the batch has {tasks} tasks "
            f"of at most {most[0]} support and {most[1]} query examples: give one size for each "
            "task, or make the batch by TaskBatch.from_tasks"
        )


def check_joined(method: str, tasks: Sequence[Named], axes: int, advice: str) -> None:
    """Refuse batches that differ in form beyond their first `axes` axes."""
    first = _forms(tasks[0], axes)
    for place, task in enumerate(tasks):
        own = _forms(task, axes)
        if own.keys() != first.keys():
            raise RequestError(
                f"TaskBatch.{method}: batch {place} has {quoted(own)}, batch 0 {quoted(first)}: "
                "give all tasks the same inputs"
            )
        for name, form in own.items():
            if form != first[name]:
                wanted, given = (
                    f"{str(dtype)[6:]} of shape {shape} on {device}"
                    for shape, dtype, device in (first[name], form)
                )
                shapes = form[0] != first[name][0]
                raise RequestError(
                    f"TaskBatch.{method}: {name} of batch {place} is {given} for "
                    f"{'a task' if axes == 1 else 'an example'}, of batch 0 {wanted}: "
                    f"{advice if shapes else 'convert or move one of them'}"
                )


def _forms(task: Named, axes: int) -> dict[str, tuple[Any, ...]]:
    return {
        name: (tuple(each.shape[axes:]), each.dtype, each.device) for name, each in task.items()
    }


def _is_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or Inf: by the sum, in one pass, and by each where that overflows."""
    return math.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())


def check_finite(named: Named, number: Callable[[int], int]) -> None:
    """Refuse NaN and Inf.

    Args:
        number: from a place in the batch to the number that errors give that task.

    Raises:
        RunError: names field and task.
    """
    for name, value in named.items():
        if value.is_floating_point() and not _is_finite(value):
            task = int((~torch.isfinite(value)).flatten(1).any(1).nonzero()[0])
            raise RunError(
                f"{name} of task {number(task)} holds NaN or Inf, on which no loss is defined: "
                "clean the data of that task"
            )


def check_labels(targets: Named, outputs: int | None, ways: Sequence[int | None]) -> None:
    """Refuse integer labels out of range: of the model's outputs, and of a task's ways.

    Args:
        outputs: of the model; None leaves them unchecked.
        ways: of each task; empty where none are known.
    """
    most = max((own for own in ways if own is not None), default=0)
    if any(each.is_floating_point() for each in targets.values()):
        for name, value in targets.items():
            if most and value.ndim > 2:
                _check_unused(name, value, ways)
        return
    if outputs is not None and most > outputs:
        raise RequestError(
            f"a task has {most} ways, but the model has {outputs} outputs: give the model more "
            "outputs, or the tasks fewer ways"
        )
    for name, value in targets.items():
        if most:
            _check_ways(name, value, ways)
        counted = value[value != IGNORED]
        if outputs is None or not len(counted):
            continue
        low, high = (int(bound) for bound in counted.aminmax())
        if low < 0 or high >= outputs:
            raise RequestError(
                f"labels out of range: {name} has the label {low if low < 0 else high}, but the "
                f"model has {outputs} outputs, for the labels 0 to {outputs - 1}: give the model "
                "more outputs, or the tasks fewer ways"
            )


def _check_unused(name: str, value: Tensor, ways: Sequence[int | None]) -> None:
    """Refuse targets of outputs that do not count, as labels of 0 and 1 and probabilities have."""
    for task, own in enumerate(ways):
        unused = value[task, :, own:]
        if own is not None and ((unused != 0) & (unused != IGNORED)).any():
            raise RequestError(
                f"labels out of range: {name} of task {task} has targets beyond its {own} ways "
                "that are not 0: correct its targets or its ways"
            )


def _check_ways(name: str, value: Tensor, ways: Sequence[int | None]) -> None:
    highest = value.flatten(1).amax(1).tolist()
    for task, (label, own) in enumerate(zip(highest, ways, strict=True)):
        if own is not None and label >= own:
            raise RequestError(
                f"labels out of range: {name} of task {task} has the label {label}, but the task "
                f"has {own} ways, for the labels 0 to {own - 1}: correct its labels or its ways"
            )
