"""Commands that torchrun starts in several processes: people read each thing once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from metaplug.report.console import quiet

if TYPE_CHECKING:
    from metaplug.execution.ranks import World


def world_size() -> str:
    """The number of processes that torchrun started, as it says it."""
    return os.environ.get("WORLD_SIZE", "1")


def quiet_other_ranks() -> None:
    """Let rank 0 alone print."""
    quiet(world_size() != "1" and os.environ.get("RANK") != "0")
    if world_size() != "1":
        # Or torch repeats over many lines what a rank's last line says: that another rank was lost.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


@contextmanager
def ranks() -> Iterator[World]:
    """Join the processes that torchrun started; only the first to fail says why."""
    from metaplug.execution.ranks import joined

    with joined() as world:

        def end(*_: object) -> None:
            raise world.lost(
                f"rank {world.rank} of {world.size} was told to end (SIGTERM), as by torchrun when "
                "another rank has ended without a word, killed or out of memory: go on with "
                "--resume, on as many ranks as you like"
            )

        previous = signal.signal(signal.SIGTERM, end) if world.size > 1 else None
        try:
            yield world
        except BaseException as error:
            if previous is not None:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending already, and says why
            quiet(not world.tell(error))
            raise
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
