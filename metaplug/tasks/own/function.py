"""Tasks that a function makes, each from the seed, the iteration and the index."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from metaplug.contract.schedule import iteration_text
from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import RequestError
from metaplug.tasks.own.items import join, single
from metaplug.tasks.own.promises import Promises
from metaplug.tasks.own.repeated import first_difference

ARGUMENTS = "(seed, iteration, index)"


class FunctionTasks:
    """The tasks that a function (seed, iteration, index) returns. A TaskStream.

    Args:
        function: returns one task, the same whenever it is called with the same numbers.
        seed: its first argument.

    Raises:
        RequestError: it does not take three arguments; or, from `batch`, it returns no task or
            several, or for the first task that is asked of it another one when called once more.
    """

    split = "given"
    promises = Promises()

    def __init__(self, function: Callable[[int, int, int], Any], seed: int) -> None:
        self.function, self.seed, self._checked = function, seed, False
        self.name = getattr(function, "__name__", type(function).__name__)
        try:
            inspect.signature(function).bind(seed, 0, 0)
        except TypeError as error:
            advice = f"define {self.name}{ARGUMENTS}, which returns the task of these numbers"
            if inspect.isgeneratorfunction(function):
                advice = f"give {self.name}(), the generator that it makes"
            raise RequestError(
                f"the function {self.name}{inspect.signature(function)} cannot be called with "
                f"{ARGUMENTS}: {advice}"
            ) from error
        except ValueError:  # of a built-in function without a signature
            pass

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The tasks `indices` of one iteration."""
        tasks = [self._task(iteration, index) for index in indices]
        if not self._checked:
            self._checked = True
            if field := first_difference(tasks[0], self._task(iteration, indices[0])):
                raise RequestError(
                    f"the function {self.name} returns another {field} when it is called once more "
                    f"with {ARGUMENTS} = {(self.seed, iteration, indices[0])}, so no run could be "
                    "repeated: draw by these three alone"
                )
        return join(tasks)

    def _task(self, iteration: int, index: int) -> TaskBatch:
        where = f"task {index} of {iteration_text(iteration)} of the function {self.name}"
        return single(self.function(self.seed, iteration, index), where)
