"""Streams whose tasks come one after the other: those of an iterable, a loader or a generator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any

from torch.utils.data import DataLoader, default_collate, default_convert

from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import MetaplugError, RequestError, one_line
from metaplug.tasks.own.items import join, tasks_of
from metaplug.tasks.own.promises import Promises

MOST_UNCOUNTED = 10_000
"""Tasks of an iterable that are measured where no number is given: an endless one has no last."""

_NOT_JOINED = ("default_collate", "stack expects", "resizable")
"""What stands in the errors of a collation that cannot join its tasks, in a worker too."""


class IteratedTasks:
    """The next tasks of an iterator, whatever iteration and indices say. A TaskStream.

    Args:
        tasks: each of one task.
        ended: (iteration, tasks wanted, tasks given before) → the error where they end.
    """

    split = "given"
    promises = Promises(repeatable=False, resumable=False, sharded=False)

    def __init__(
        self, tasks: Iterator[TaskBatch], ended: Callable[[int, int, int], MetaplugError]
    ) -> None:
        self._tasks, self._ended, self._given = tasks, ended, 0

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The next len(indices) tasks.

        Raises:
            MetaplugError: there are not that many; or as `one_by_one` raises.
        """
        tasks = list(islice(self._tasks, len(indices)))
        if len(tasks) < len(indices):
            raise self._ended(iteration, len(indices), self._given + len(tasks))
        self._given += len(tasks)
        return join(tasks)


def epochs(tasks: Iterable[Any]) -> Iterator[TaskBatch]:
    """Yield the tasks of an iterable that can be started anew, epoch after epoch.

    Raises:
        RequestError: an epoch has no task; or as `one_by_one` raises.
    """
    given, before = 0, -1
    while given > before:
        before = given
        for task in one_by_one(tasks):
            given += 1
            yield task
    raise no_tasks(tasks, given)


def one_by_one(tasks: Iterable[Any]) -> Iterator[TaskBatch]:
    """Yield the tasks of an iterable once.

    Raises:
        RequestError: it holds something else, or tasks that its collation cannot join.
    """
    name, items = type(tasks).__name__, iter(tasks)
    for place in count():
        try:
            item = next(items)
        except StopIteration:
            return
        except (TypeError, RuntimeError) as error:
            if not _collates(tasks) or not any(words in str(error) for words in _NOT_JOINED):
                raise
            said = one_line(str(error).strip().splitlines()[-1])
            raise RequestError(
                f"the {name} cannot join its tasks ({said}): give it collate_fn=list, which leaves "
                "them apart"
            ) from error
        converts = isinstance(tasks, DataLoader) and tasks.collate_fn is default_convert
        if converts and isinstance(item, list):
            raise RequestError(
                f"the {name} with batch_size=None makes lists of tuples, so that a task cannot be "
                "told from a batch: give it batch_size=1, or let its data set give TaskBatch"
            )
        if type(tasks).__module__.partition(".")[0] == "torchmeta":  # whose errors know its parts
            item = TaskBatch.from_torchmeta(item)
        yield from tasks_of(item, f"item {place} of the {name}")


def first_of(tasks: Iterable[Any], most: int) -> list[TaskBatch]:
    """Return the first tasks of an iterable, at least one."""
    found = list(islice(one_by_one(tasks), most))
    if not found:
        raise no_tasks(tasks)
    return found


def all_of(tasks: Any) -> list[TaskBatch]:
    """Return all tasks of an iterable.

    Raises:
        RequestError: there are more than MOST_UNCOUNTED, or none.
    """
    # A loader over all combinations of classes has a length, which may be no machine's number.
    try:
        endless = len(tasks) > MOST_UNCOUNTED
    except TypeError:
        endless = False
    except OverflowError:
        endless = True
    found = [] if endless else first_of(tasks, MOST_UNCOUNTED + 1)
    if endless or len(found) > MOST_UNCOUNTED:
        raise RequestError(
            f"num_tasks says nothing, and the {type(tasks).__name__} has more than "
            f"{MOST_UNCOUNTED} tasks, if it ever ends: give num_tasks"
        )
    return found


def no_tasks(tasks: Any, given: int = 0) -> RequestError:
    """Make the error for an iterable without a task, after `given` of its earlier epochs."""
    name = type(tasks).__name__
    if given:
        return RequestError(
            f"the {name} gave {given} tasks, and none when it was started anew: let its __iter__ "
            "make a new iterator each time, or give a list of its tasks"
        )
    advice = "at least one"
    if isinstance(tasks, Iterator):
        advice = "at least one, or make it anew if it gave them before"
    elif isinstance(tasks, DataLoader):
        advice = "a smaller batch_size, or no drop_last, or more tasks"
    return RequestError(f"the {name} gives no task: give it {advice}")


def _collates(tasks: Any) -> bool:
    return isinstance(tasks, DataLoader) and tasks.collate_fn is default_collate
