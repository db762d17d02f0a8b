"""The bench compares what is the same algorithm, and measures what it says."""

import importlib.util
import io
import json
from dataclasses import replace

import pytest
from matplotlib.image import imread
from rich.console import Console

from metaplug import RequestError
from metaplug.bench import WORKLOADS, Row, as_json_values, contestants, drawing, measuring, run, scaling
from metaplug.bench.contestants import Contestant, by_loss, torch_loop
from metaplug.bench.limits import Limit, Speed, limit
from metaplug.bench.peers import COMPILED, peers
from metaplug.cli.main import main
from metaplug.report.bench import bench_table, drawing_table, scaling_table
from metaplug.report.scaling import scaling_figure

SMALL = {"sinusoid-25x5": {"tasks": (2, 4, 8), "inner_steps": (1, 2)}}
SPEED = Speed(flops_per_second=1e9, seconds_per_call=1e-6)
PEERS = {name: peer.module for name, peer in peers().items() if name != COMPILED}


def shown(table, width=160):
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue()


def test_every_contestant_is_measured_and_the_same_algorithm_gives_the_same_meta_gradient():
    rows = run(["sinusoid-25x1"], ["gradient-sharing"], repeats=2, memory=True)
    assert [row.contestant for row in rows] == list(contestants(["gradient-sharing"]))
    own = [row for row in rows if row.contestant not in PEERS and row.reason is None]
    assert len(own) == 11
    for row in own:
        assert row.milliseconds > 0
        assert row.peak_mib is not None and row.peak_mib > 0
        other = "+" in row.contestant or "first order" in row.contestant
        assert (row.gradient_error is None) == (row.share is None) == other
        assert other or row.gradient_error <= 1e-10
        assert other or row.share == pytest.approx(row.limit.milliseconds / row.milliseconds)
    graph = {row.contestant: row.graph_mib for row in rows}
    assert graph["higher, task by task"] is None
    assert graph["metaplug, vectorized"] <= 1.2 * graph["plain torch loop"]
    values = json.loads(json.dumps(as_json_values(rows, 2)))
    assert values["rows"][0]["workload"] == "sinusoid-25x1"
    assert values["rows"][0]["limit"]["speed"]["flops_per_second"] > 0
    assert values["packages"]["higher"] == "0.2.1"
    assert "limit: 0.00996 GFLOP at" in shown(bench_table(rows))


def test_a_peer_that_is_missing_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(measuring.importlib.util, "find_spec", lambda module: None)
    rows = run(["sinusoid-25x1"], [], repeats=1, memory=True, only=list(PEERS))
    assert [row.contestant for row in rows] == list(PEERS)
    for row in rows:
        assert row.reason == "not installed here; make bench-peers installs what can be had"
        assert row.milliseconds is row.gradient_error is row.share is None
    assert f"– {'; '.join(PEERS)}: not installed here; make bench-peers installs what can be had." in shown(bench_table(rows), 300)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("workload", ["sinusoid-25x1", "layernorm-8x5"])
def test_a_peer_that_is_installed_does_the_same_work(name, workload):
    if importlib.util.find_spec(PEERS[name]) is None:
        pytest.skip(f"{PEERS[name]} is not installed: make bench-peers")
    (row,) = run([workload], [], repeats=1, memory=True, only=[name])
    if name == "JAX, jitted by hand" and workload != "sinusoid-25x1":
        assert row.reason == "written by hand for the sinusoid network only, not for layernorm-mlp"
    elif name == "parallel-metalearn, vmap" and workload == "layernorm-8x5":
        assert 1e-5 < row.gradient_error < 1e-2  # it differentiates inside vmap
    else:
        assert row.reason is None
        assert row.milliseconds > 0
        assert row.gradient_error <= 1e-10


def test_a_failure_of_a_peer_is_a_row_and_one_of_ours_is_an_error(monkeypatch):
    def fails(*_):
        raise KeyError("params\nand more")

    theirs = {"theirs": Contestant(fails, module="torch")}
    monkeypatch.setattr(measuring, "contestants", lambda *_, **__: theirs)
    (row,) = run(["sinusoid-25x1"], [], repeats=1, memory=False)
    assert row.reason == r"KeyError: 'params\nand more'"
    theirs["theirs"] = Contestant(fails)
    with pytest.raises(KeyError):
        run(["sinusoid-25x1"], [], repeats=1, memory=False)


def test_maml_plus_plus_takes_part_where_there_is_batch_norm():
    rows = run(["sinusoid-25x1", "conv4-32-stride-8x3"], [], repeats=1, memory=False, only=["metaplug, maml++-reference"])
    assert rows[0].reason.startswith("plugin 'per-step-batch-norm' needs batch norm layers")
    assert rows[1].milliseconds > 0
    assert rows[1].gradient_error is rows[1].share is None


@pytest.mark.slow
def test_the_compiled_loop_gives_the_same_meta_gradient():
    (row,) = run(["sinusoid-25x1"], [], repeats=1, memory=False, only=[COMPILED])
    assert row.gradient_error <= 1e-10
    assert COMPILED in contestants([], compiled=True)


def test_a_stacked_graph_takes_the_memory_of_the_tasks_graphs():
    names = ["plain torch loop", "metaplug, vectorized"]
    rows = {row.contestant: row for row in run(["conv4-32-stride-8x3"], [], repeats=1, memory=True, only=names)}
    assert rows["metaplug, vectorized"].graph_mib <= 1.2 * rows["plain torch loop"].graph_mib


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_has_a_model_and_tasks(name):
    model, batch = WORKLOADS[name].build()
    assert batch.num_tasks == WORKLOADS[name].tasks
    assert model(batch.support_x[0]).shape[0] == batch.support_x.shape[1]


def test_a_limit_counts_the_arithmetic_and_the_calls():
    # Without an inner step only the query pass is left: products with three weights, and twice as many backwards but for the inputs'.
    workload = replace(WORKLOADS["sinusoid-25x1"], inner_steps=0)
    forward, inputs = 2 * 25 * 10 * (40 + 40 * 40 + 40), 2 * 25 * 10 * 40
    found = limit(workload, SPEED)
    assert found.flops == 3 * forward - inputs
    assert found.milliseconds == pytest.approx(found.flops / 1e6)
    assert found.calls_milliseconds == pytest.approx(found.calls / 1e3)
    larger = limit(WORKLOADS["sinusoid-25x5"], SPEED)
    assert larger.flops > found.flops > 0
    assert larger.calls > found.calls > 0


def test_a_limit_says_where_it_says_nothing():
    assert limit(WORKLOADS["sinusoid-25x1"], replace(SPEED, flops_per_second=1e12)).overhead_bound
    assert not limit(WORKLOADS["conv4-32-stride-8x3"], SPEED).overhead_bound
    assert SPEED.or_better(Speed(2e9, 2e-6)) == Speed(2e9, 1e-6)


def test_the_table_marks_what_is_overhead_bound():
    least = Limit(flops=2_000_000, milliseconds=0.02, calls=1234, calls_milliseconds=2.5, overhead_bound=True, speed=Speed(1e11, 2e-6))
    row = Row("sinusoid-25x1", "plain torch loop", 10.0, 0.1, 0.0, None, None, least, 0.002)
    text = shown(bench_table([row]))
    assert "limit: 0.002 GFLOP at 100 GFLOP/s" in text
    assert "overhead bound: 1,234 calls, 2.0 µs" in text
    assert "0.2 %" in text
    assert "Overhead bound" not in shown(bench_table([replace(row, limit=replace(least, overhead_bound=False))]))


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


def test_scaling_grows_along_each_series(tmp_path):
    seen = []
    points = scaling.run(repeats=2, grid=SMALL, on_series=lambda *series: seen.append(series))
    assert seen == [("sinusoid-25x5", "tasks"), ("sinusoid-25x5", "inner_steps")]
    assert [(point.tasks, point.inner_steps) for point in points] == [(2, 5), (4, 5), (8, 5), (25, 1), (25, 2)]
    for series in (points[:3], points[3:]):
        peaks = [point.peak_mib for point in series]
        assert peaks == sorted(peaks) and peaks[0] > 0
    for point in points:
        assert point.milliseconds_per_task == pytest.approx(point.milliseconds / point.tasks)
        assert point.mib_per_task == pytest.approx(point.peak_mib / point.tasks)
    assert json.loads(json.dumps(scaling.as_json_values(points, 2)))["points"][0]["axis"] == "tasks"
    assert "inner steps" in shown(scaling_table(points))
    scaling_figure(points, tmp_path / "scaling.png")
    assert imread(tmp_path / "scaling.png").shape[:2] == (896, 1200)


def test_scaling_stops_before_it_holds_too_much():
    points = scaling.run(repeats=1, grid=SMALL, most_mib=0.3)
    assert [point.tasks for point in points if point.axis == "tasks"] == [2]


def test_drawing_is_timed_beside_torchmeta_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = drawing.run(repeats=2, tasks=2)
    assert [row.contestant for row in rows] == ["metaplug", "torchmeta's BatchMetaDataLoader"]
    assert rows[0].milliseconds is not None

    def missing() -> None:
        raise RequestError("torchmeta is not here")

    monkeypatch.setattr(drawing, "apply", missing)
    alone = drawing.run(repeats=2, tasks=2)
    assert alone[1] == drawing.DrawRow("torchmeta's BatchMetaDataLoader", None, None, "torchmeta is not here")
    assert "torchmeta is not here" in shown(drawing_table([*rows, alone[1]]), 100)


def test_the_reference_is_the_plain_loop():
    prepared = by_loss(torch_loop, *WORKLOADS["sinusoid-25x1"].build(), WORKLOADS["sinusoid-25x1"])
    assert set(prepared.gradient()) == {name for name, _ in WORKLOADS["sinusoid-25x1"].build()[0].named_parameters()}


def test_the_command_line_gives_json_and_a_picture(capfd, tmp_path, monkeypatch):
    def answer(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["bench", *arguments])
        return stopped.value.code, *capfd.readouterr()

    status, out, _ = answer("--workload", "sinusoid-25x1", "--only", "metaplug, auto", "--repeats", "1", "--json")
    assert status == 0
    assert [row["contestant"] for row in json.loads(out)["rows"]] == ["metaplug, auto"]
    small = scaling.run(repeats=1, grid=SMALL)
    monkeypatch.setattr(scaling, "run", lambda **_: small)
    picture = tmp_path / "scaling.png"
    status, out, _ = answer("--scaling", "--plot", str(picture), "--json")
    assert status == 0
    assert len(json.loads(out)["points"]) == len(small)
    assert picture.exists()
    status, _, error = answer("--plot", str(picture))
    assert status == 2
    assert "--plot draws what --scaling measures: give both, or neither" in error
