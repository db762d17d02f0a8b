"""Streams whose tasks come one after the other: those of an iterable, a loader or a generator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any

from torch.utils.data import DataLoader, default_collate, default_convert

from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import MetaplugError, RequestError, one_line
from metaplug.tasks.own.items import batches_of, join, split
from metaplug.tasks.own.promises import Promises

MOST_UNCOUNTED = 10_000
"""Tasks of an iterable that are measured where no number is given: an endless one has no last."""

_NOT_JOINED = ("default_collate", "stack expects", "resizable")
"""What stands in the errors of a collation that cannot join its tasks, in a worker too."""


class IteratedTasks:
    """The next tasks of an iterator, whatever iteration and indices say. A TaskStream.

    Args:
        batches: of any numbers of tasks.
        ended: (iteration, tasks wanted, tasks given before) → the error where they end.
    """

    split = "given"
    promises = Promises(repeatable=False, resumable=False, sharded=False)

    def __init__(
        self, batches: Iterator[TaskBatch], ended: Callable[[int, int, int], MetaplugError]
    ) -> None:
        self._batches, self._ended, self._given = batches, ended, 0
        self._left: TaskBatch | None = None

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The next len(indices) tasks: one batch as it is, where it has that many.

        Raises:
            MetaplugError: there are not that many; or as `batches_in` raises.
        """
        found, missing = [], len(indices)
        while missing:
            batch = next(self._batches, None) if self._left is None else self._left
            if batch is None:
                given = self._given + len(indices) - missing
                raise self._ended(iteration, len(indices), given)
            self._left = None
            if batch.num_tasks > missing:
                self._left = batch.tasks(slice(missing, None))
                batch = batch.tasks(slice(0, missing))
            found.append(batch)
            missing -= batch.num_tasks
        self._given += len(indices)
        return join(found)


def epochs(tasks: Iterable[Any]) -> Iterator[TaskBatch]:
    """Yield the batches of an iterable that can be started anew, epoch after epoch.

    Raises:
        RequestError: an epoch has no task; or as `batches_in` raises.
    """
    given, before = 0, -1
    while given > before:
        before = given
        for batch in batches_in(tasks):
            given += batch.num_tasks
            yield batch
    raise no_tasks(tasks, given)


def batches_in(tasks: Iterable[Any]) -> Iterator[TaskBatch]:
    """Yield the batches of an iterable once.

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
        yield from batches_of(item, f"item {place} of the {name}")


def first_of(tasks: Iterable[Any], most: int | None = None) -> list[TaskBatch]:
    """Return the first tasks of an iterable one by one, at least one; None: all of them."""
    found = list(islice((task for batch in batches_in(tasks) for task in split(batch)), most))
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
            f"the {name} gave {given} task{'s' * (given > 1)}, and none when it was started anew: "
            "let its __iter__ make a new iterator each time, or give a list of its tasks"
        )
    advice = "at least one"
    if isinstance(tasks, Iterator):
        advice = "at least one, or make it anew if it gave them before"
    elif isinstance(tasks, DataLoader):
        advice = "a smaller batch_size, or no drop_last, or more tasks"
    return RequestError(f"the {name} gives no task: give it {advice}")


def _collates(tasks: Any) -> bool:
    return isinstance(tasks, DataLoader) and tasks.collate_fn is default_collate
