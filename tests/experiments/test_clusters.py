"""Items run on a Dask or Ray cluster come back all, also when a worker is lost in the middle."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.parallel_items import Item, work

from metaplug import RequestError, RunError
from metaplug.experiments.parallel import Failed, clusters, in_parallel

TESTS = Path(__file__).parents[1]


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Dask scheduler in this process, and two workers with one thread, each a process."""
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(processes=True, silence_logs=50, **options) as cluster:
        yield cluster


def test_dask_loses_a_worker_in_the_middle_and_no_item(cluster: Any, tmp_path: Path) -> None:
    hows = ("waits", "naps", "naps", "warns", "refused", "warns")
    items = [Item(number, tmp_path, how) for number, how in enumerate(hows)]
    results: dict[Item, Any] = {}
    with pytest.warns(UserWarning) as caught:
        for item, result in in_parallel(
            work, items, backend="dask", address=cluster.scheduler_address
        ):
            if not results:
                for nanny in cluster.workers.values():
                    nanny.auto_restart = False
                (lost,) = tmp_path.glob("0-0-*")
                (tmp_path / "go").touch()
                os.kill(int(lost.name.rpartition("-")[2]), signal.SIGKILL)
            results[item] = result
    assert [str(warning.message) for warning in caught] == ["be careful"]
    assert results.pop(items[4]) == Failed("item 4: cannot be done", 2)
    assert sorted(report.number for report in results.values()) == [0, 1, 2, 3, 5]
    assert {report.threads for report in results.values()} == {1}
    assert [item.begun() for item in items] == [2, 1, 1, 1, 1, 1]


@pytest.mark.slow
def test_dask_gives_up_an_item_that_kills_its_workers(cluster: Any, tmp_path: Path) -> None:
    items = [Item(0, tmp_path, "dies"), Item(1, tmp_path), Item(2, tmp_path)]
    results = dict(in_parallel(work, items, backend="dask", address=cluster.scheduler_address))
    assert (results[items[1]][0], results[items[2]][0]) == (1, 2)
    assert isinstance(failed := results[items[0]], Failed)
    assert failed.text.startswith("4 workers died that ran it, the last tcp://")


def test_dask_scheduler_that_goes_ends_the_run(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(processes=False, silence_logs=50, **options) as cluster:
        address = cluster.scheduler_address
        items = [Item(number, tmp_path, "naps") for number in range(3)]
        results = in_parallel(work, items, backend="dask", address=address)
        next(results)
        cluster.close()
        text = f"the Dask scheduler at {address} is gone: start the cluster again, and give the "
        with pytest.raises(RunError, match=f"^{text}same command$"):
            list(results)


def test_addresses_that_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_PATIENCE", 0.2)
    pytest.importorskip("distributed")

    def refused(backend: Any, address: str | None) -> str:
        with pytest.raises(RequestError) as caught:
            next(in_parallel(str, [1], backend=backend, address=address))
        return str(caught.value)

    assert refused("dask", None) == (
        "the backend 'dask' runs on a cluster that exists: give the address of its scheduler, as "
        "tcp://HOST:8786"
    )
    assert refused("dask", "tcp://127.0.0.1:9") == (
        "address = tcp://127.0.0.1:9: no dask cluster answers (Timed out trying to connect to "
        "tcp://127.0.0.1:9 after 0.2 s): start it, or fix the address"
    )


@pytest.mark.parametrize(("backend", "library"), [("dask", "distributed"), ("ray", "ray")])
def test_library_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, backend: Any, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    text = rf"^the backend '{backend}' needs {library}: pip install 'metaplug\[{backend}\]'$"
    with pytest.raises(RequestError, match=text):
        next(in_parallel(str, [1], backend=backend, address="tcp://127.0.0.1:9"))


@pytest.mark.slow
def test_ray_runs_again_what_loses_its_worker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    hows = ("dies once", "naps", "dies", "warns", "refused", "warns")
    items = [Item(number, tmp_path, how) for number, how in enumerate(hows)]
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.warns(UserWarning) as caught:
        results = dict(in_parallel(work, items, backend="ray", jobs=2))
    assert [str(warning.message) for warning in caught] == ["be careful"]
    assert signal.getsignal(signal.SIGTERM) is handler
    assert results.pop(items[4]) == Failed("item 4: cannot be done", 2)
    assert results.pop(items[2]) == Failed(
        "the worker that ran it died 3 times (WorkerCrashedError), also alone: most likely memory "
        "ran out; make it smaller, or use workers with more"
    )
    assert sorted(report.number for report in results.values()) == [0, 1, 3, 5]
    assert [item.begun() for item in items] == [2, 1, 3, 1, 1, 1]


@pytest.mark.slow
def test_ray_addresses_that_nobody_answers() -> None:
    pytest.importorskip("ray")
    with pytest.raises(RequestError, match=r"^address = nonsense: it ends in no port: write it as"):
        next(in_parallel(str, [1], backend="ray", address="nonsense"))
    with pytest.raises(RequestError, match=r"^address = 127\.0\.0\.1:9: no ray cluster answers"):
        next(in_parallel(str, [1], backend="ray", address="127.0.0.1:9"))
