"""One task, or several, in each of the forms in which a user may give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from metaplug.contract.inputs import map_inputs, tensors_of
from metaplug.contract.task_batch import FIELDS, TaskBatch
from metaplug.contract.task_groups import uniform
from metaplug.errors import RequestError

TORCHMETA = (("train", "test"), ("support", "query"))
"""The keys of torchmeta's batches."""

FORM = "(support_x, support_y, query_x, query_y)"


def batches_of(item: Any, where: str) -> list[TaskBatch]:
    """Return the tasks of an item.

    Args:
        item: a TaskBatch of one task or more; a tuple (support_x, support_y, query_x, query_y) of
            one task, (examples, *shape) each; a list of these four, (tasks, examples, *shape) each,
            as DataLoader collates such tuples; a list of tasks; or a batch of torchmeta. Where x
            is several tensors, it is a mapping or tuple of them.
        where: names the item in errors.

    Raises:
        RequestError: it is none of these, it can be read in two ways, or as TaskBatch raises.
    """
    if isinstance(item, list) and item and all(map(_is_task, item)):
        return [task for own in item for task in batches_of(own, where)]
    try:
        return [_read(item, where)]
    except RequestError as error:
        said = str(error)
        raise RequestError(said if said.startswith(where) else f"{where}: {said}") from error


def split(batch: TaskBatch) -> list[TaskBatch]:
    """Return the tasks of a batch one by one, without their padding; each keeps its ways."""
    return [_bare(batch.tasks(slice(row, row + 1))) for row in range(batch.num_tasks)]


def _bare(task: TaskBatch) -> TaskBatch:
    bare = uniform(task)
    named = task.sizes is not None and task.sizes[0].ways is not None
    return replace(bare, sizes=task.sizes) if named else bare


def join(batches: Sequence[TaskBatch]) -> TaskBatch:
    """Join tasks of any sizes; each counts in all outputs of the model, or in the ways it names.

    Ways are not taken from labels here, so what a task is does not depend on its neighbours.
    """
    if len(batches) == 1:
        return batches[0]
    ways: list[int | None] = []
    for batch in batches:
        sizes = batch.sizes
        ways += [None] * batch.num_tasks if sizes is None else [size.ways for size in sizes]
    return TaskBatch.from_tasks(batches, ways=ways)


def single(item: Any, where: str) -> TaskBatch:
    """Return the one task of an item; as `batches_of`, but several are refused."""
    batches = batches_of(item, where)
    tasks = sum(batch.num_tasks for batch in batches)
    if tasks > 1:
        raise RequestError(
            f"{where} is {tasks} tasks, but a number stands for one: give the task of that number "
            "alone"
        )
    return batches[0]


def _is_task(item: Any) -> bool:
    return isinstance(item, TaskBatch) or (type(item) is tuple and len(item) == len(FIELDS))


def _read(item: Any, where: str) -> TaskBatch:
    if isinstance(item, TaskBatch):
        return item
    if isinstance(item, Mapping) and any({*pair} <= {*item} for pair in TORCHMETA):
        return TaskBatch.from_torchmeta(item)
    # A named tuple stays one when DataLoader collates it, so it does not say which of both it is.
    if type(item) not in (tuple, list) or len(item) != len(FIELDS):
        raise _no_task(item, where)
    one = isinstance(item, tuple)
    parts: dict[str, Any] = {
        name: tuple(part) if isinstance(part, list) and name.endswith("_x") else part
        for name, part in zip(FIELDS, item, strict=True)
    }
    tensors = {
        name: [x for x in tensors_of(part) if isinstance(x, Tensor)] for name, part in parts.items()
    }
    if one:
        _check_one(tensors, where)
        return TaskBatch(**{name: map_inputs(_with_task_axis, x) for name, x in parts.items()})
    _check_several(tensors, where)
    return TaskBatch(**parts)


def _with_task_axis(x: Any) -> Any:
    return x.unsqueeze(0) if isinstance(x, Tensor) else x


def _check_one(tensors: Mapping[str, list[Tensor]], where: str) -> None:
    """Refuse a tuple that is a batch as well, by its shapes."""
    leading = [
        {x.shape[:2] for name in (f"{part}_x", f"{part}_y") for x in tensors[name]}
        for part in ("support", "query")
    ]
    fits = all(len(each) == 1 for each in leading)
    if not fits or _lacks_task_axis(tensors) or leading[0].pop()[0] != leading[1].pop()[0]:
        return
    x, y = (tuple(tensors[name][0].shape) for name in ("support_x", "support_y"))
    raise RequestError(
        f"{where} is a tuple {FORM} with support_x of shape {x} and support_y of shape {y}, which "
        "may be one task or many: give a TaskBatch, whose first axis is that of tasks"
    )


def _check_several(tensors: Mapping[str, list[Tensor]], where: str) -> None:
    """Refuse a list that is no batch, by its shapes."""
    if name := _lacks_task_axis(tensors):
        shape = tuple(min(tensors[name], key=Tensor.dim).shape)
        raise RequestError(
            f"{where} is a list {FORM}, so a batch of tasks, but {name} has shape {shape}, which "
            "leaves no axis of tasks: give one task as a tuple or a TaskBatch"
        )


def _lacks_task_axis(tensors: Mapping[str, list[Tensor]]) -> str | None:
    """The first part without axes of tasks, of examples and, of inputs, one of their own."""
    for name, each in tensors.items():
        if any(x.ndim < (3 if name.endswith("_x") else 2) for x in each):
            return name
    return None


def _no_task(item: Any, where: str) -> RequestError:
    several = isinstance(item, tuple | list | Mapping)
    kind = (
        f"a {type(item).__name__} of {len(item)}" if several else f"of type {type(item).__name__}"
    )
    advice = f"give a TaskBatch, or a plain tuple {FORM}"
    if isinstance(item, tuple | list) and len(item) == 2:
        advice = (
            "let metaplug.tasks.LabelledTasks.from_dataset draw tasks from a data set of examples "
            f"(x, y), or {advice}"
        )
    return RequestError(f"{where} is {kind}, which is no task: {advice}")
