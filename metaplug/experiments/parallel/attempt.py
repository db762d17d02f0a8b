"""One item, run in the process that it was sent to."""

from __future__ import annotations

import os
import socket
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from metaplug.errors import MetaplugError, reason, said_by
from metaplug.execution.free_memory import resident

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Failed:
    """The error of an item.

    Attributes:
        text: in one line.
        exit_status: 2 for a wrong request, 1 for a failure on the way.
    """

    text: str
    exit_status: int = 1


@dataclass(frozen=True)
class Attempt(Generic[R]):
    """What a worker sends back of an item.

    Attributes:
        result: of the function, or its error.
        warnings: that it gave, each once.
        peak_bytes: the most memory that the worker has held so far; 0 where that is not known.
    """

    result: R | Failed
    warnings: tuple[tuple[type[Warning], str], ...] = ()
    peak_bytes: int = 0


_ONE_AT_A_TIME = threading.Lock()
"""A Dask worker may have many threads, but the state of torch is one for the whole process."""


def attempt(function: Callable[[T], R], folder: Path, item: T) -> Attempt[R]:
    """Run an item in a worker, and keep its warnings for the process that shows them.

    Args:
        folder: the working folder of the process that asks, so that paths mean the same.
    """
    with _ONE_AT_A_TIME, warnings.catch_warnings(record=True) as caught:
        try:
            os.chdir(folder)
        except OSError as error:
            fault = f"{folder}: not a folder on {socket.gethostname()} ({reason(error)})"
            return Attempt(Failed(f"{fault}; workers need the same path to the same files", 2))
        result = run_item(function, item)
        given = dict.fromkeys((warning.category, str(warning.message)) for warning in caught)
    return Attempt(result, tuple(given), resident(peak=True))


def run_item(function: Callable[[T], R], item: T) -> R | Failed:
    """Run an item with one thread, so that its digits do not depend on where it runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(item)
    except MetaplugError as error:
        return Failed(str(error), error.exit_status)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Failed(f"{said_by(error)} ({Path(last.filename).name}, line {last.lineno})")
    finally:
        torch.set_num_threads(before)
