"""Hand items out to workers, and take their results in as they come."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from metaplug.errors import RequestError, at_least_one, said_by
from metaplug.experiments.parallel.attempt import Attempt, Failed, attempt, run_item
from metaplug.experiments.parallel.clusters import DaskPool, RayPool
from metaplug.experiments.parallel.pool import Pool
from metaplug.experiments.parallel.processes import ProcessPool

T = TypeVar("T")
R = TypeVar("R")

Backend = Literal["processes", "dask", "ray"]
"""Where items run: in processes of this machine, or on a cluster."""

_POLL = 0.2  # seconds until the wish to stop, free memory and new workers are looked at again


def in_parallel(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    jobs: int | None = None,
    backend: Backend = "processes",
    address: str | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[T, R | Failed]]:
    """Run a function over items, and yield (item, result) as they come, in no certain order.

    Every item runs with one thread, in a process that runs nothing else meanwhile, so that results
    are the same however many run at once; and in the working folder of this process. An item whose
    process dies is run again, the third and last time alone: write the function so that a repeated
    item is cheap and harms nothing.

    Closing the iterator before its end, also by an exception, kills the processes at once; a worker
    of Dask ends what it runs.

    Args:
        function: of a module that workers can import.
        items: small, and can be pickled.
        jobs: how many run at once, at most. The default is 1 for "processes", which then run in
            this process, and as many as a cluster has workers.
        backend: where they run.
        address: of a Dask scheduler, as "tcp://HOST:8786", or of a Ray cluster; without one, "ray"
            begins one on this machine.
        stop: when it is true, no item begins; those that run are waited for and yielded.

    Raises:
        RequestError: jobs below 1, an address that does not belong to the backend or that nobody
            answers, or a library that is not installed.
        RunError: the cluster is gone.
    """
    at_least_one(jobs=jobs)
    if backend == "processes" and address is not None:
        fault = f"address = {address}: processes of this machine have none"
        raise RequestError(f"{fault}: leave it out, or use the backend dask or ray")
    if backend == "processes" and jobs in {None, 1}:
        for item in items:
            if stop():
                return
            yield item, run_item(function, item)
        return
    pool = _make_pool(backend, jobs, address)
    complete = False
    try:
        yield from _dispatch(pool, function, items, stop)
        complete = True
    finally:
        pool.close(kill=not complete)


def _make_pool(backend: Backend, jobs: int | None, address: str | None) -> Pool:
    match backend:
        case "processes":
            return ProcessPool(jobs or 1)
        case "dask":
            return DaskPool(jobs, address)
        case "ray":
            return RayPool(jobs, address)


@dataclass(frozen=True)
class _Try(Generic[T]):
    """An item that waits or runs, and how many workers have died of it."""

    item: T
    deaths: int = 0
    alone: bool = False


def _dispatch(
    pool: Pool, function: Callable[[T], R], items: Sequence[T], stop: Callable[[], bool]
) -> Iterator[tuple[T, R | Failed]]:
    run = partial(attempt, function, Path.cwd())
    waiting = deque(_Try(item) for item in items)
    running: dict[Future[Attempt[Any]], _Try[T]] = {}
    warned: set[tuple[type[Warning], str]] = set()
    results: list[tuple[T, R | Failed]] = []
    while True:
        # Begin before yielding: a caller may take its time over a result, and workers would idle.
        while waiting and _may_begin(waiting[0], running, pool) and not stop():
            begun = waiting.popleft()
            running[pool.begin(run, begun.item)] = begun
        yield from results
        results = []
        if not running:
            if not waiting or stop():
                return
            continue
        for future in wait(running, timeout=_POLL, return_when=FIRST_COMPLETED).done:
            ended, back = running.pop(future), pool.end(future)
            if isinstance(back, Attempt):
                results.append((ended.item, back.result))
                for category, text in back.warnings:
                    if (category, text) not in warned:
                        warned.add((category, text))
                        warnings.warn(text, category, stacklevel=3)
            elif (how := pool.death(back)) is None:
                results.append((ended.item, Failed(said_by(back))))
            elif (deaths := ended.deaths + 1) < pool.lives:
                # Too many at once is the likeliest cause, so nothing runs beside its last try.
                waiting.append(replace(ended, deaths=deaths, alone=deaths == pool.lives - 1))
            else:
                results.append((ended.item, Failed(how)))


def _may_begin(first: _Try[T], running: dict[Future[Attempt[Any]], _Try[T]], pool: Pool) -> bool:
    if not running:
        return True
    alone = first.alone or any(other.alone for other in running.values())
    return not alone and pool.room(len(running))
