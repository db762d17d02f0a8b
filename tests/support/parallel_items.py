"""Functions that tests run over items in worker processes, which import them from here."""

from __future__ import annotations

import os
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from metaplug import RequestError


@dataclass(frozen=True)
class Item:
    """A number, and a folder where items leave a file each time they begin."""

    number: int
    folder: Path
    how: str = ""

    def begun(self) -> int:
        """How many times this item began."""
        return len(list(self.folder.glob(f"{self.number}-*")))


class Report(NamedTuple):
    """The number of an item, where it ran, and digits that would tell how."""

    number: int
    process: int
    threads: int
    digits: str


def work(item: Item) -> Report:
    """Behave as `how` says, and report."""
    times = item.begun()
    (item.folder / f"{item.number}-{times}-{os.getpid()}").touch()
    match item.how:
        case "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        case "dies once" if not times:
            os.kill(os.getpid(), signal.SIGKILL)
        case "exits":
            os._exit(3)
        case "sleeps":
            time.sleep(60)
        case "waits":
            while not (item.folder / "go").exists():
                time.sleep(0.01)
            time.sleep(0.5)
        case "naps":
            time.sleep(0.5)
        case "refused":
            raise RequestError(f"item {item.number}: cannot be done")
        case "fails":
            raise ZeroDivisionError("no\nnumber")
        case "warns":
            warnings.warn("be careful", UserWarning, stacklevel=1)
    random = torch.randn(300, 300, generator=torch.Generator().manual_seed(item.number))
    digits = torch.tanh(random @ random).sum().item().hex()
    return Report(item.number, os.getpid(), torch.get_num_threads(), digits)
