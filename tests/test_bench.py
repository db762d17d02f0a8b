"""The bench compares what is the same algorithm, and measures what it says."""

import io

import pytest
from rich.console import Console

from metaplug import RequestError, bench_tasks
from metaplug.bench import WORKLOADS, as_json_values, contestants, run
from metaplug.report.terminal import drawing_table


def test_every_contestant_is_measured_and_the_same_algorithm_gives_the_same_meta_gradient():
    rows = run(["sinusoid-25x1"], ["gradient-sharing"], repeats=2, memory=True)
    assert [row.contestant for row in rows] == list(contestants(["gradient-sharing"]))
    for row in rows:
        assert row.milliseconds > 0
        assert row.peak_mib is not None and row.peak_mib > 0
        other = "+" in row.contestant or "first order" in row.contestant
        assert (row.gradient_error is None) == other
        assert other or row.gradient_error <= 1e-10
    graph = {row.contestant: row.graph_mib for row in rows}
    assert graph["higher, task by task"] is None
    assert graph["metaplug, vectorized"] <= 1.2 * graph["plain torch loop"]
    assert as_json_values(rows, 2)["rows"][0]["workload"] == "sinusoid-25x1"


def test_a_stacked_graph_takes_the_memory_of_the_tasks_graphs():
    rows = {row.contestant: row for row in run(["conv4-32-stride-8x3"], [], repeats=1, memory=True)}
    assert rows["metaplug, vectorized"].graph_mib <= 1.2 * rows["plain torch loop"].graph_mib


def test_an_unknown_workload_is_refused():
    with pytest.raises(RequestError, match=r"^unknown workload 'sinusoid-25x6': did you mean 'sinusoid-25x(5|1)'\?$"):
        run(["sinusoid-25x6"], [], repeats=1, memory=False)
    assert "sinusoid-25x5" in WORKLOADS


def test_chosen_contestants_are_measured_alone():
    rows = run(["sinusoid-25x1"], [], repeats=1, memory=False, only=["metaplug, vectorized"])
    assert [row.contestant for row in rows] == ["metaplug, vectorized"]
    assert rows[0].gradient_error <= 1e-10
    with pytest.raises(RequestError, match=r"^unknown contestant 'metaplug, vectorised': did you mean 'metaplug, vectorized'\?$"):
        run(["sinusoid-25x1"], [], repeats=1, memory=False, only=["metaplug, vectorised"])


def test_drawing_is_timed_beside_torchmeta_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = bench_tasks.run(repeats=2, tasks=2)
    assert [row.contestant for row in rows] == ["metaplug", "torchmeta's BatchMetaDataLoader"]
    assert rows[0].milliseconds is not None

    def missing() -> None:
        raise RequestError("torchmeta is not here")

    monkeypatch.setattr(bench_tasks, "apply", missing)
    alone = bench_tasks.run(repeats=2, tasks=2)
    assert alone[1] == bench_tasks.DrawRow("torchmeta's BatchMetaDataLoader", None, None, "torchmeta is not here")
    shown = io.StringIO()
    Console(file=shown, width=100).print(drawing_table([*rows, alone[1]]))
    assert "torchmeta is not here" in shown.getvalue()
