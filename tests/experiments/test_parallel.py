"""Items run several at once come back all, with the same digits, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support.parallel_items import Item, work

from metaplug import RequestError
from metaplug.experiments.parallel import Failed, in_parallel
from metaplug.experiments.parallel.attempt import Attempt, attempt
from metaplug.experiments.parallel.dispatch import _dispatch
from metaplug.experiments.parallel.processes import ProcessPool, most_at_once

KILLED = Failed(
    "the process that ran it died 3 times (SIGKILL(-9)), also alone: most likely memory ran out; "
    "make it smaller, or free some"
)


def _items(folder: Path, *hows: str) -> list[Item]:
    return [Item(number, folder, how) for number, how in enumerate(hows)]


# The order of things, with workers that are none


class Fake:
    """Workers of this process: an item is done when it is asked for, and may die first."""

    lives = 3

    def __init__(self, jobs: int = 2, deaths: dict[int, int] | None = None) -> None:
        self.jobs, self.deaths = jobs, dict(deaths or {})
        self.running: dict[Future[Any], int] = {}
        self.beside: list[tuple[int, list[int]]] = []

    def room(self, running: int) -> bool:
        return running < self.jobs

    def begin(self, run: Callable[[Any], Any], item: int) -> Future[Any]:
        future: Future[Any] = Future()
        self.beside.append((item, sorted(self.running.values())))
        self.running[future] = item
        if self.deaths.get(item, 0):
            self.deaths[item] -= 1
            future.set_exception(MemoryError("gone"))
        else:
            future.set_result(run(item))
        return future

    def end(self, future: Future[Any]) -> Attempt[Any] | BaseException:
        del self.running[future]
        return future.exception() or future.result()

    def death(self, error: BaseException) -> str | None:
        return "died" if isinstance(error, MemoryError) else None

    def close(self, *, kill: bool) -> None:
        raise AssertionError


def test_item_whose_worker_dies_runs_again_and_the_last_time_alone() -> None:
    pool = Fake(deaths={1: 2, 2: 3})
    results = dict(_dispatch(pool, str, [0, 1, 2, 3], lambda: False))
    assert results == {0: "0", 1: "1", 2: Failed("died"), 3: "3"}
    times = {item: [beside for begun, beside in pool.beside if begun == item] for item in range(4)}
    assert [len(times[item]) for item in range(4)] == [1, 3, 3, 1]
    assert times[1][-1] == times[2][-1] == []
    last = [
        max(place for place, (begun, _) in enumerate(pool.beside) if begun == n) for n in (1, 2)
    ]
    assert not any(n in beside for n in (1, 2) for _, beside in pool.beside[min(last) :])


def test_stop_begins_no_item_and_yields_those_that_run() -> None:
    stopped = False
    results = _dispatch(Fake(jobs=2), str, list(range(6)), lambda: stopped)
    seen = [next(results)]
    stopped = True
    seen += results
    assert len({item for item, _ in seen}) == len(seen) <= 4
    assert list(_dispatch(Fake(), str, [1, 2], lambda: True)) == []


def test_stop_does_not_run_again_what_died() -> None:
    stopped = False

    def stop() -> bool:
        return stopped

    pool = Fake(jobs=1, deaths={0: 1})
    begin = pool.begin

    def stopping(run: Callable[[Any], Any], item: int) -> Future[Any]:
        nonlocal stopped
        stopped = True
        return begin(run, item)

    pool.begin = stopping  # type: ignore[method-assign]
    assert list(_dispatch(pool, str, [0, 1], stop)) == []


def test_worker_runs_in_the_folder_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert attempt(_folder, tmp_path.parent, 0).result == tmp_path.parent
    gone = attempt(_folder, tmp_path / "gone", 0).result
    assert gone == Failed(
        f"{tmp_path / 'gone'}: not a folder on {socket.gethostname()} (No such file or directory); "
        "workers need the same path to the same files",
        exit_status=2,
    )


def _folder(_: int) -> Path:
    return Path.cwd()


# In this process


def test_one_job_runs_in_this_process_with_one_thread(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    items = _items(tmp_path, "", "refused", "fails")
    torch.set_num_threads(2)
    try:
        (first, result), *failed = in_parallel(work, items)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert first == items[0]
    assert not isinstance(result, Failed)
    assert result[:3] == (0, os.getpid(), 1)
    assert failed[0][1] == Failed("item 1: cannot be done", 2)
    assert isinstance(error := failed[1][1], Failed)
    assert error.text.startswith("ZeroDivisionError: no number (parallel_items.py, line ")
    assert error.exit_status == 1


def test_one_job_stops_between_items(tmp_path: Path) -> None:
    items = _items(tmp_path, "", "", "")
    results = in_parallel(work, items, jobs=1, stop=lambda: items[1].begun() > 0)
    assert [item.number for item, _ in results] == [0, 1]


# In processes


def test_two_processes_give_what_one_gives_and_a_warning_once(tmp_path: Path) -> None:
    items = _items(tmp_path, "naps", "naps", "warns", "warns", "refused")
    with pytest.warns(UserWarning) as caught:
        results = dict(in_parallel(work, items, jobs=2))
    assert [str(warning.message) for warning in caught] == ["be careful"]
    assert results.pop(items[4]) == Failed("item 4: cannot be done", 2)
    done = sorted(results.values())
    again = in_parallel(work, [Item(number, tmp_path) for number in range(4)], jobs=1)
    one_by_one = [result for _, result in again if not isinstance(result, Failed)]
    assert [report.number for report in one_by_one] == [0, 1, 2, 3]
    for own, other in zip(done, one_by_one, strict=True):
        assert (own.number, own.threads, own.digits) == (other.number, 1, other.digits)
    processes = {report.process for report in done}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert not any(map(_alive, processes))


def test_process_that_dies_takes_no_neighbour_along(tmp_path: Path) -> None:
    items = _items(tmp_path, "dies", "naps", "")
    results = dict(in_parallel(work, items, jobs=2))
    assert results.pop(items[0]) == KILLED
    assert [report.number for report in sorted(results.values())] == [1, 2]
    assert [item.begun() for item in items] == [3, 1, 1]


def test_closing_early_ends_the_processes_at_once(tmp_path: Path) -> None:
    items = _items(tmp_path, "", "sleeps", "sleeps")
    results = in_parallel(work, items, jobs=2)
    next(results)
    _until(lambda: len(_processes(tmp_path)) == 3)
    before = time.monotonic()
    results.close()
    assert time.monotonic() - before < 5
    assert not any(map(_alive, _processes(tmp_path)))


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from support.parallel_items import Item, work
from metaplug.experiments.parallel import in_parallel
items = [Item(number, Path({folder!r}), how) for number, how in enumerate(["waits", "sleeps"])]
for item, result in in_parallel(work, items, jobs=2):
    print(item.number, type(result).__name__, flush=True)
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of a group of its own, with two workers in the middle of an item."""
    script = SCRIPT.format(path=sys.path, folder=str(tmp_path))
    command = [sys.executable, "-c", script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    _until(lambda: len(_processes(tmp_path)) == 2)
    yield process
    for pid in (process.pid, *_processes(tmp_path)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def test_processes_ignore_ctrl_c_and_end_when_their_parent_is_killed(
    parent: subprocess.Popen[str], tmp_path: Path
) -> None:
    for worker in _processes(tmp_path):
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGHUP)
    (tmp_path / "go").touch()
    assert parent.stdout is not None
    assert parent.stdout.readline() == "0 Report\n"
    assert all(map(_alive, _processes(tmp_path)))
    parent.kill()
    _until(lambda: not any(map(_alive, _processes(tmp_path))))


@pytest.mark.slow
def test_ctrl_c_that_nobody_handles_kills_all_and_leaves_nothing(
    parent: subprocess.Popen[str], tmp_path: Path
) -> None:
    os.killpg(parent.pid, signal.SIGINT)
    said = parent.communicate(timeout=10)[1]
    assert said.splitlines()[-1] == "KeyboardInterrupt"
    assert "leaked" not in said
    assert not any(map(_alive, _processes(tmp_path)))


# Memory


def test_most_at_once_is_what_fits_and_never_none() -> None:
    assert most_at_once(free=8, held=0, needed=3) == 2
    assert most_at_once(free=2, held=7, needed=3) == 3
    assert most_at_once(free=0, held=0, needed=3) == 1


def test_memory_limits_processes_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1024**3
    pool = ProcessPool(4, free=lambda: 5 * gib)
    monkeypatch.setattr(pool, "pids", lambda: [])
    assert pool.room(3)  # how much one takes is not known yet
    future: Future[Attempt[None]] = Future()
    future.set_result(Attempt(None, (), 2 * gib))
    pool._busy[future] = None  # type: ignore[assignment]
    pool.end(future)
    assert pool.room(1)
    text = "memory lets 2 run at once, not 4: one takes up to 2.0 GiB, and 5.0 GiB are free"
    with pytest.warns(UserWarning, match=f"^{text}$"):
        assert not pool.room(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not pool.room(2)


# Wrong requests


def test_wrong_requests() -> None:
    text = (
        "address = tcp://a:1: processes of this machine have none: leave it out, or use the "
        "backend dask or ray"
    )
    with pytest.raises(RequestError, match=f"^{text}$"):
        next(in_parallel(str, [1], address="tcp://a:1"))
    with pytest.raises(RequestError, match=r"^jobs = 0: give at least 1$"):
        next(in_parallel(str, [1], jobs=0))


def _processes(folder: Path) -> list[int]:
    return [int(file.name.rpartition("-")[2]) for file in folder.glob("*-*")]


def _alive(process: int) -> bool:
    """Tell whether a process runs; one that has ended may still wait for its parent to ask."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)
