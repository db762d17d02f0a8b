"""The workers of a Dask or Ray cluster.

Both are asked by their own futures. joblib's backend for Ray cannot yield results as they come, and
the one for Dask waits for ever for an item that has killed its workers, and takes no number of
jobs (joblib 1.6).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from metaplug.errors import RequestError, RunError, reason
from metaplug.experiments.parallel.attempt import Attempt

T = TypeVar("T")

_PATIENCE = 10  # seconds that a cluster has to answer
_LIKELY = "most likely memory ran out; make it smaller, or use workers with more"


class DaskPool:
    """The workers of a Dask cluster that exists.

    Args:
        jobs: how many items run at once, at most; None is as many as there are workers.
        address: of the scheduler, as "tcp://HOST:8786".

    Raises:
        RequestError: there is no address, nobody answers there, or distributed is not installed.
    """

    lives = 1  # the scheduler runs an item again itself when its worker is lost

    def __init__(self, jobs: int | None, address: str | None) -> None:
        try:
            from distributed import Client, KilledWorker  # noqa: PLC0415
        except ImportError as error:
            raise _missing("dask", "distributed") from error
        if address is None:
            fault = "the backend 'dask' runs on a cluster that exists"
            raise RequestError(f"{fault}: give the address of its scheduler, as tcp://HOST:8786")
        # It logs the whole traceback of a scheduler that is gone, which our error says in one line.
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
        try:
            self._client = Client(address, timeout=_PATIENCE, set_as_default=False)
        except (OSError, ValueError) as error:
            raise _silent("dask", address, reason(error)) from error
        self._jobs, self._address, self._killed = jobs, address, KilledWorker
        self._executor = self._client.get_executor(pure=False)
        if not self._workers():
            start = f"start some, as dask worker {address} --nthreads 1"
            warnings.warn(f"the cluster at {address} has no workers yet: {start}", stacklevel=4)

    def room(self, running: int) -> bool:
        """Tell whether a worker is free; workers come and go."""
        return running < min(self._jobs or running + 1, self._workers())

    def begin(self, run: Callable[[T], Attempt[Any]], item: T) -> Future[Attempt[Any]]:
        """Send an item to the worker that the scheduler chooses."""
        future: Future[Attempt[Any]] = Future()
        # Copy the result, and keep nothing of Dask's: while a future of its own lives, Dask runs an
        # item again that has already come back, should the worker be lost that holds its result.
        copy = partial(_copy, to=future)
        self._executor.submit(run, item).add_done_callback(copy)
        return future

    def end(self, future: Future[Attempt[Any]]) -> Attempt[Any] | BaseException:
        """Take what came back."""
        error = future.exception()
        if isinstance(error, CancelledError):
            raise self._gone() from error
        return error or future.result()

    def death(self, error: BaseException) -> str | None:
        """Tell which worker died last."""
        if not isinstance(error, self._killed):
            return None
        times = error.allowed_failures + 1
        return f"{times} workers died that ran it, the last {error.last_worker.address}: {_LIKELY}"

    def close(self, *, kill: bool) -> None:
        """Leave the cluster as it is; the scheduler forgets the items that have not begun."""
        self._client.close()

    def _workers(self) -> int:
        try:
            return len(self._client.nthreads())
        except OSError as error:
            raise self._gone() from error

    def _gone(self) -> RunError:
        again = "start the cluster again, and give the same command"
        return RunError(f"the Dask scheduler at {self._address} is gone: {again}")


class RayPool:
    """The workers of a Ray cluster, or of one that begins on this machine.

    Args:
        jobs: how many items run at once, at most; None is as many as there are CPUs.
        address: of the cluster, as "HOST:6379", or "auto" for the one of this machine; None begins
            one that ends with the pool.

    Raises:
        RequestError: nobody answers at the address, or ray is not installed.
    """

    lives = 3

    def __init__(self, jobs: int | None, address: str | None) -> None:
        # It would tell its makers of its use, which nobody has asked it to.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray  # noqa: PLC0415
        except ImportError as error:
            raise _missing("ray", "ray") from error
        self._ray, self._mine = ray, not ray.is_initialized()
        if self._mine:
            self._connect(jobs, address)
        cpus = int(ray.cluster_resources().get("CPU", 1))
        self._jobs = min(jobs or cpus, cpus)
        self._call: Any = ray.remote(num_cpus=1, max_retries=0)(_call)
        self._tasks: dict[Future[Attempt[Any]], Any] = {}

    def _connect(self, jobs: int | None, address: str | None) -> None:
        options: dict[str, Any] = {"address": address or "local", "logging_level": logging.ERROR}
        if address is None:
            options |= {"num_cpus": jobs, "include_dashboard": False}
        elif address != "auto":
            _check_answers("ray", address)  # ray itself would try for many minutes
        try:
            with _handler_kept():
                self._ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _silent("ray", address or "local", reason(error)) from error

    def room(self, running: int) -> bool:
        """Tell whether a CPU is free for another item."""
        return running < self._jobs

    def begin(self, run: Callable[[T], Attempt[Any]], item: T) -> Future[Attempt[Any]]:
        """Send an item to the worker that Ray chooses."""
        task = self._call.remote(run, item)
        future: Future[Attempt[Any]] = task.future()
        self._tasks[future] = task
        return future

    def end(self, future: Future[Attempt[Any]]) -> Attempt[Any] | BaseException:
        """Take what came back."""
        del self._tasks[future]
        return future.exception() or future.result()

    def death(self, error: BaseException) -> str | None:
        """Tell how a worker died; `attempt` catches all errors of the item itself."""
        errors = self._ray.exceptions
        if not isinstance(error, errors.RayError) or isinstance(error, errors.RayTaskError):
            return None
        fault = f"the worker that ran it died {self.lives} times ({type(error).__name__})"
        return f"{fault}, also alone: {_LIKELY}"

    def close(self, *, kill: bool) -> None:
        """End what runs, and the cluster where it began with the pool."""
        for task in self._tasks.values():
            self._ray.cancel(task, force=kill)
        if self._mine:
            with _handler_kept():
                self._ray.shutdown()


def _copy(future: Future[Any], to: Future[Any]) -> None:
    if future.cancelled():
        to.set_exception(CancelledError())
    elif (error := future.exception()) is not None:
        to.set_exception(error)
    else:
        to.set_result(future.result())


def _call(run: Callable[[T], Attempt[Any]], item: T) -> Attempt[Any]:
    return run(item)


def _missing(backend: str, library: str) -> RequestError:
    return RequestError(
        f"the backend '{backend}' needs {library}: pip install 'metaplug[{backend}]'"
    )


def _silent(backend: str, address: str, fault: str) -> RequestError:
    fix = "start it, or fix the address"
    return RequestError(f"address = {address}: no {backend} cluster answers ({fault}): {fix}")


def _check_answers(backend: str, address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise RequestError(f"address = {address}: it ends in no port: write it as HOST:6379")
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
    except OSError as error:
        raise _silent(backend, address, reason(error)) from error


@contextmanager
def _handler_kept() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray replaces as it starts and takes away as it ends.

    It is set again in any case: Ray's compiled part does so behind the back of Python, which then
    still knows the old one.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
