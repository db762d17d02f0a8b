"""Commands that torchrun starts several times at once: what people read stands there once. Imports no torch: `--help` must be quick."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from metaplug.errors import RequestError
from metaplug.report.console import CONSOLE

if TYPE_CHECKING:
    from metaplug.execution.ranks import World


def count() -> str:
    """The number of processes that torchrun started, as it says it."""
    return os.environ.get("WORLD_SIZE", "1")


def silence_others() -> None:
    """Let rank 0 alone speak."""
    CONSOLE.quiet = count() != "1" and os.environ.get("RANK") != "0"
    if count() != "1":
        os.environ.setdefault(
            "TORCH_CPP_LOG_LEVEL", "ERROR"
        )  # that a rank was lost, the others say in a line


def refuse_several(command: str, mend: str) -> None:
    """Refuse a command that only one process can run."""
    if count() != "1":
        raise RequestError(f"metaplug {command} on {count()} ranks: it runs in one process; {mend}")


@contextmanager
def ranks() -> Iterator[World]:
    """Inside, this process is one of those that torchrun started; the first of them to fail says why, and the others end in silence."""
    from metaplug.execution.ranks import joined

    with joined() as world:

        def end(*_: object) -> None:
            raise world.lost(
                f"rank {world.rank} of {world.size} was told to end (SIGTERM), as by torchrun when another rank has ended without a word, "
                "killed or out of memory: go on with --resume, on as many ranks as you like"
            )

        previous = signal.signal(signal.SIGTERM, end) if world.size > 1 else None
        try:
            yield world
        except BaseException as error:
            if previous is not None:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending, and shall say why
            CONSOLE.quiet = not world.tell(error)
            raise
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
