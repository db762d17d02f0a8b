"""What a stream promises about its tasks."""

from __future__ import annotations

from typing import NamedTuple

from metaplug.tasks.episodes import TaskStream


class Promises(NamedTuple):
    """The promises of a stream, which says them by an attribute `promises`; all, where it does not.

    Attributes:
        repeatable: the same seed gives the same tasks.
        resumable: the tasks of an iteration can be had without those of the iterations before.
        sharded: each of several ranks can have tasks of its own.
    """

    repeatable: bool = True
    resumable: bool = True
    sharded: bool = True


def promises_of(stream: TaskStream) -> Promises:
    """Return what a stream promises."""
    promises: Promises = getattr(stream, "promises", Promises())
    return promises
