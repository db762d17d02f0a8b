"""What the dispatch asks of a place to run items."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from metaplug.experiments.parallel.attempt import Attempt

T = TypeVar("T")


class Pool(Protocol):
    """Workers, each a process that runs one item at a time."""

    lives: int
    """How many times the worker of an item may die before the item counts as failed, at least 1."""

    def room(self, running: int) -> bool:
        """Tell whether an item may begin beside those that run; asked only where some do."""
        ...

    def begin(self, run: Callable[[T], Attempt[Any]], item: T) -> Future[Attempt[Any]]:
        """Send an item to a free worker, which calls `run` with it."""
        ...

    def end(self, future: Future[Attempt[Any]]) -> Attempt[Any] | BaseException:
        """Take what came back, and free its worker."""
        ...

    def death(self, error: BaseException) -> str | None:
        """Tell in words how a worker died; None for an error that is not a worker's death."""
        ...

    def close(self, *, kill: bool) -> None:
        """End the workers: at once, or after what they run."""
        ...
