"""Tasks as `fit` and `evaluate` take them, in any form, as the streams that they run on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

from torch.utils.data import IterableDataset

from metaplug.contract.schedule import iteration_text
from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import MetaplugError, RequestError, RunError
from metaplug.tasks.episodes import TaskStream
from metaplug.tasks.own.function import FunctionTasks
from metaplug.tasks.own.items import split
from metaplug.tasks.own.iterated import (
    IteratedTasks,
    all_of,
    batches_in,
    epochs,
    first_of,
    no_tasks,
)
from metaplug.tasks.own.listed import DatasetTasks, ListedTasks
from metaplug.tasks.own.promises import promises_of
from metaplug.tasks.own.refusals import check_tasks, not_on_ranks, too_few, unknown_tasks
from metaplug.tasks.torchmeta.combination import CombinationTasks
from metaplug.tasks.torchmeta.compatibility import apply

Measure: TypeAlias = Literal["num_tasks", "validation_tasks"]
"""The argument that says how many tasks are measured: that of `evaluate`, or of a validation."""

DEFAULTS: dict[Measure, int] = {"num_tasks": 600, "validation_tasks": 200}
"""How many tasks of a stream are measured, as it has no last one."""


def training_stream(
    tasks: Any, seed: int, tasks_per_batch: int, *, ranks: int = 1, iteration: int = 0
) -> TaskStream:
    """Return tasks as a stream to train on.

    Args:
        tasks: a TaskStream, which is returned unchanged; a sequence, a map-style data set or an
            iterable of tasks; a function (seed, iteration, index) that returns one; or a
            CombinationMetaDataset of torchmeta, which is imported only for an object of its own.
        seed: of the order of a sequence, and of the tasks that are drawn.
        tasks_per_batch: of all ranks.
        iteration: that training goes on at.

    Raises:
        RequestError: it is none of these, it holds no task or something else, or several ranks
            cannot share it.
    """
    stream = _streamed(tasks, seed)
    if stream is not None:
        return _shared(stream, tasks, ranks)
    listed = _listed(tasks)
    if listed is not None:
        return ListedTasks(listed, seed, tasks_per_batch)

    def ended(iteration: int, wanted: int, given: int) -> MetaplugError:
        if not given:
            return no_tasks(tasks)
        return RunError(
            f"{iteration_text(iteration)} needs {wanted} tasks, but the {type(tasks).__name__} "
            f"ended after {given} in this call: give an endless one, or a list, whose tasks come "
            "epoch after epoch"
        )

    once = isinstance(tasks, Iterator)
    stream = IteratedTasks(batches_in(tasks) if once else epochs(tasks), ended)
    stream = _shared(stream, tasks, ranks)
    if iteration > 0 and not once:
        warnings.warn(
            f"training goes on at {iteration_text(iteration)}, but a {type(tasks).__name__} does "
            "not say where it stopped: its tasks start anew",
            stacklevel=4,
        )
    return stream


def evaluation_stream(
    tasks: Any, seed: int, wanted: int | None, measure: Measure, *, ranks: int = 1
) -> tuple[TaskStream, int]:
    """Return tasks as a stream to measure on, and how many of them.

    Args:
        tasks: as for `training_stream`.
        wanted: how many. None: 600 of a stream or a function, and all of what ends; of a validation
            200, or all where there are fewer.
        measure: the name of that argument.

    Raises:
        RequestError: as `training_stream`; there are fewer tasks than wanted; no end of them is in
            sight; or a validation would see other tasks each time.
    """
    stream = _streamed(tasks, seed)
    if stream is not None:
        return _shared(stream, tasks, ranks), DEFAULTS[measure] if wanted is None else wanted
    listed, name = _listed(tasks), type(tasks).__name__
    if listed is None and ranks > 1:
        raise not_on_ranks(tasks, ranks)
    if listed is None and measure == "num_tasks" and wanted is not None:
        count = wanted

        def ended(iteration: int, batch: int, given: int) -> MetaplugError:
            return too_few(name, measure, count, given) if given else no_tasks(tasks)

        return IteratedTasks(batches_in(tasks), ended), count
    if listed is None and measure == "validation_tasks":
        most = DEFAULTS[measure] if wanted is None else wanted
        if isinstance(tasks, Iterator):
            raise RequestError(
                f"validation is a {name}, which gives each of its tasks once, but all validations "
                f"have to measure the same: give list(itertools.islice(validation, {most}))"
            )
        listed = first_of(tasks, most)
    elif listed is None:
        listed = all_of(tasks)
    most = len(listed)
    if wanted is None:
        wanted = min(most, DEFAULTS[measure]) if measure == "validation_tasks" else most
    if wanted > most:
        raise too_few(name, measure, wanted, most)
    return ListedTasks(listed, seed, None), wanted


def _streamed(tasks: Any, seed: int) -> TaskStream | None:
    """What draws each task by its number; None for what holds them.

    Raises:
        RequestError: it holds no tasks.
    """
    check_tasks(tasks)
    if callable(getattr(tasks, "batch", None)):
        given: TaskStream = tasks
        return given
    if any(base.__module__.partition(".")[0] == "torchmeta" for base in type(tasks).__mro__) and (
        isinstance(tasks, apply().utils.data.CombinationMetaDataset)
    ):
        return CombinationTasks(tasks, seed)
    if isinstance(tasks, Iterable | TaskBatch) or hasattr(tasks, "__getitem__"):
        return None
    if not callable(tasks):
        raise unknown_tasks(tasks)
    return FunctionTasks(tasks, seed)


def _listed(tasks: Any) -> Sequence[TaskBatch] | None:
    """The tasks of what has a length; None for what is only iterated over."""
    if isinstance(tasks, TaskBatch):
        return split(tasks)
    if isinstance(tasks, IterableDataset):  # its base has an index that answers nothing
        return None
    if isinstance(tasks, Sequence):
        return first_of(tasks)
    if not hasattr(tasks, "__getitem__") or not hasattr(tasks, "__len__"):
        return None
    if not len(tasks):
        raise no_tasks(tasks)
    return DatasetTasks(tasks)


def _shared(stream: TaskStream, tasks: Any, ranks: int) -> TaskStream:
    if ranks > 1 and not promises_of(stream).sharded:
        raise not_on_ranks(tasks, ranks)
    return stream
