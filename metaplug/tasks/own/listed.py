"""Tasks that are there: those of a list, and those that a data set reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import RequestError
from metaplug.tasks.draws import draw
from metaplug.tasks.own.items import join, single
from metaplug.tasks.own.promises import Promises
from metaplug.tasks.own.repeated import first_difference


class ListedTasks:
    """The tasks of a sequence. A TaskStream.

    In training, iteration and index are the position p = iteration · tasks_per_batch + index, and
    every task comes once an epoch, in an order that the seed and the epoch p // n decide. A batch
    in which an epoch ends may hold a task twice.

    Args:
        tasks: n >= 1, each of one task.
        seed: any integer.
        tasks_per_batch: at most n; None, at evaluation: task i of the sequence is task i.

    Raises:
        RequestError: there are fewer tasks than a meta-batch needs.
    """

    split = "given"
    promises = Promises()

    def __init__(self, tasks: Sequence[TaskBatch], seed: int, tasks_per_batch: int | None) -> None:
        self.tasks, self.seed, self.tasks_per_batch = tasks, seed, tasks_per_batch
        self._orders: dict[int, NDArray[np.int64]] = {}
        if tasks_per_batch is not None and tasks_per_batch > len(tasks):
            raise RequestError(
                f"tasks_per_batch = {tasks_per_batch} with {len(tasks)} tasks: some would count "
                f"twice in every meta-batch; give tasks_per_batch={len(tasks)} or less, or more "
                "tasks"
            )

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The tasks `indices` of one iteration."""
        places: Sequence[int] = indices
        if self.tasks_per_batch is not None:
            first, count = iteration * self.tasks_per_batch, len(self.tasks)
            positions = [divmod(first + index, count) for index in indices]
            places = [int(self._order(epoch)[place]) for epoch, place in positions]
        return join([self.tasks[place] for place in places])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The tasks of an epoch in its order; the last two are kept, as a batch may have both."""
        if epoch not in self._orders:
            words = draw(self.seed, "order of a list", epoch, [0], len(self.tasks))[0]
            last = {key: each for key, each in self._orders.items() if key == epoch - 1}
            self._orders = last | {epoch: np.argsort(words, kind="stable")}
        return self._orders[epoch]


class DatasetTasks(Sequence[TaskBatch]):
    """The tasks of a map-style data set, each read when it is needed.

    Args:
        dataset: with a length, and one task at every index.

    Raises:
        RequestError: from indexing: no task, or several; and of the first task that is asked for,
            when it differs if it is read once more.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset, self._checked = dataset, False

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, place: int) -> TaskBatch: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[TaskBatch]: ...
    def __getitem__(self, place: int | slice) -> TaskBatch | Sequence[TaskBatch]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        name = type(self._dataset).__name__
        task = single(self._dataset[place], f"item {place} of the {name}")
        if not self._checked:
            self._checked = True
            again = single(self._dataset[place], f"item {place} of the {name}")
            if field := first_difference(task, again):
                raise RequestError(
                    f"item {place} of the {name} has another {field} when it is read once more, so "
                    "no run could be repeated: draw by the index that it is given, or give "
                    "DataLoader(dataset, collate_fn=list), of which nothing is promised"
                )
        return task
