"""Worker processes of this machine, watched for their memory."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import torch
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import BrokenProcessPool, TerminatedWorkerError

from metaplug.execution.free_memory import available, resident, size_text
from metaplug.experiments.parallel.attempt import Attempt

if sys.platform != "win32":
    import resource

T = TypeVar("T")

# loky replaces a process that has grown by 300 MB between two items, which harms nothing here.
warnings.filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning)

_ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}

_FILES_EACH = 10
"""Pipes and locks that this process holds open for each of the others."""


class ProcessPool:
    """Worker processes of joblib's loky, each a pool of its own.

    A process that dies breaks its pool, and every item that the pool ran. With one process to a
    pool that is its own item alone: a neighbour is neither lost nor blamed.

    Args:
        jobs: how many processes, at most.
        free: the bytes that are free on this machine; None where that is not known.
    """

    lives = 3

    def __init__(
        self, jobs: int, free: Callable[[], int | None] = lambda: available(torch.device("cpu"))
    ) -> None:
        _let_open(_FILES_EACH * jobs)
        self.jobs, self._free = jobs, free
        self._idle: list[ProcessPoolExecutor] = []
        self._busy: dict[Future[Attempt[Any]], ProcessPoolExecutor] = {}
        self._needed = 0  # bytes, the most that an item has taken; 0 before the first has ended
        self._warned = False

    def room(self, running: int) -> bool:
        """Tell whether another process may run, by their number and by the memory that is free."""
        if running >= self.jobs:
            return False
        free = self._free() if self._needed else None
        if free is None:
            return True
        held = sum(map(resident, self.pids()))
        if fits := running < most_at_once(free, held, self._needed):
            return fits
        if not self._warned:
            self._warned = True
            takes = f"one takes up to {size_text(self._needed)}, and {size_text(free)} are free"
            warnings.warn(
                f"memory lets {running} run at once, not {self.jobs}: {takes}", stacklevel=5
            )
        return False

    def begin(self, run: Callable[[T], Attempt[Any]], item: T) -> Future[Attempt[Any]]:
        """Send an item to an idle process, or to a new one."""
        executor = self._idle.pop() if self._idle else _new_worker()
        try:
            with _signals_held():
                future: Future[Attempt[Any]] = executor.submit(run, item)
        except BrokenProcessPool:  # it died while it was idle
            executor.shutdown(kill_workers=True)
            return self.begin(run, item)
        self._busy[future] = executor
        return future

    def end(self, future: Future[Attempt[Any]]) -> Attempt[Any] | BaseException:
        """Take what came back; a process that still lives is idle then."""
        executor, error = self._busy.pop(future), future.exception()
        if isinstance(error, BrokenProcessPool):
            executor.shutdown(kill_workers=True)
        else:
            self._idle.append(executor)
        if error is not None:
            return error
        back = future.result()
        self._needed = max(self._needed, back.peak_bytes)
        return back

    def death(self, error: BaseException) -> str | None:
        """Tell how a process died, with its signal or exit status."""
        if not isinstance(error, TerminatedWorkerError):
            return None
        code = re.search(r"exit codes of the workers are \{(.*)\}", str(error))
        fault = f"the process that ran it died {self.lives} times" + (
            f" ({code[1]})" if code else ""
        )
        if code and code[1].startswith("SIGKILL"):
            return f"{fault}, also alone: most likely memory ran out; make it smaller, or free some"
        return f"{fault}, also alone: compiled code crashed, or called exit; run it with one job"

    def close(self, *, kill: bool) -> None:
        """End the processes, all at the same time: torch takes a second to leave one."""
        executors = (*self._busy.values(), *self._idle)
        with ThreadPoolExecutor(len(executors) or 1) as threads:
            list(threads.map(lambda executor: executor.shutdown(kill_workers=kill), executors))

    def pids(self) -> list[int]:
        """The processes that live."""
        executors = (*self._busy.values(), *self._idle)
        return [pid for executor in executors for pid in list(executor._processes)]


def most_at_once(free: int, held: int, needed: int) -> int:
    """How many processes fit in memory, at least one.

    Args:
        free: bytes that nobody holds.
        held: bytes that the processes hold now, which stay theirs.
        needed: bytes that each may come to hold, at least 1.

    >>> most_at_once(free=5, held=3, needed=2)
    4
    """
    return max((free + held) // needed, 1)


def _let_open(more: int) -> None:
    """Raise the limit of open files, as far as it goes: the usual 1024 fits about 100 processes."""
    if sys.platform != "win32":
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 1024 + more if hard == resource.RLIM_INFINITY else min(1024 + more, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _new_worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        max_workers=1, initializer=_end_with, initargs=(os.getpid(),), env=_ONE_THREAD
    )


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: loky's would wait for items for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let processes begin with Ctrl-C and a closed terminal blocked, which reach a whole group.

    What is blocked stays so in a new process from its very first moment, where a handler that it
    sets itself comes too late. In this process, a signal that comes meanwhile arrives afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # it would unblock them where it starts in between
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
