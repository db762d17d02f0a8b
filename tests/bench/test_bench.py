"""The bench compares what is the same algorithm, and measures what it says."""

import contextlib
import copy
import importlib
import importlib.util
import io
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from support.plain_loop import loop, off

from metaplug import RequestError, RunError
from metaplug.bench import (
    WORKLOADS,
    Row,
    as_json_values,
    contestants,
    drawing,
    measuring,
    meters,
    run,
    scaling,
    workloads,
)
from metaplug.bench.contestants import Contestant
from metaplug.bench.encoder import TOKENS, Encoder, with_adapters
from metaplug.bench.limits import Limit, Speed, limit
from metaplug.bench.meters import ON_CPU, Meter, covered, device_spans
from metaplug.bench.peers import COMPILED, jax_device, peers
from metaplug.bench.scaling import Growth, Point
from metaplug.cli.main import main
from metaplug.execution import devices, traced
from metaplug.report.bench import bench_table, drawing_table, scaling_table
from metaplug.report.scaling import scaling_figure

SMALL = {"sinusoid-25x5": {"tasks": (2, 4, 8), "inner_steps": (0, 1, 2)}}
KEPT_TASKS = ("sinusoid-25x5", "tasks", False)
KEPT_STEPS = ("sinusoid-25x5", "inner_steps", False)
RECOMPUTED = ("sinusoid-25x5", "inner_steps", True)
CUDA = torch.device("cuda")
SPEED = Speed(flops_per_second=1e9, seconds_per_call=1e-6)
LOW_RANK = ("down.weight", "up.weight")
PEERS = {name: peer.module for name, peer in peers().items() if name != COMPILED}


def shown(table, width=160):
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue()


@pytest.fixture
def known_speed(monkeypatch):
    """Spares the half second that measuring the device takes, twice for each workload."""
    monkeypatch.setattr(measuring, "measure_speed", lambda meter: SPEED)


@pytest.fixture
def small_encoders(monkeypatch):
    """Makes the encoders narrow: the arithmetic is another length, the operations are the same."""
    made = {
        "attention": lambda: Encoder(16, layers=2, heads=2),
        "lora": lambda: with_adapters(Encoder(16, layers=2, heads=2), rank=4),
    }
    for name, make in made.items():
        monkeypatch.setitem(workloads.MODELS, name, make)


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
    whole = ["plain torch loop", "stacked by hand", "metaplug, auto", "metaplug without its chain"]
    assert all(graph[name] > 0 for name in whole)
    assert graph["higher, task by task"] is graph["metaplug, chunks of 4"] is None
    values = json.loads(json.dumps(as_json_values(rows, 2)))
    assert values["rows"][0]["workload"] == "sinusoid-25x1"
    assert values["rows"][0]["limit"]["speed"]["flops_per_second"] > 0
    assert values["packages"]["higher"] == "0.2.1"
    assert values["device"] == Meter().name != "cpu"
    assert (values["cuda"], values["precision"]) == (None, "float32")
    assert values["rows"][0]["meta_steps_per_minute"] == pytest.approx(
        60_000 / rows[0].milliseconds
    )
    assert values["rows"][0]["busy"] is None
    assert "busy" not in shown(bench_table(rows))
    assert "limit: 0.00996 GFLOP at" in shown(bench_table(rows))


@pytest.mark.usefixtures("known_speed")
def test_a_peer_that_is_missing_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(measuring.importlib.util, "find_spec", lambda module: None)
    rows = run(["sinusoid-25x1"], [], repeats=1, memory=True, only=list(PEERS))
    assert [row.contestant for row in rows] == list(PEERS)
    for row in rows:
        assert row.reason == "not installed here; make bench-peers installs what can be had"
        assert row.milliseconds is row.gradient_error is row.share is None
    assert (
        f"– {'; '.join(PEERS)}: not installed here; make bench-peers installs what can be had."
        in shown(bench_table(rows), 300)
    )


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.usefixtures("known_speed", "small_encoders")
@pytest.mark.parametrize(
    "workload", ["sinusoid-25x1", "layernorm-8x5", "attention-8x3", "lora-4x3"]
)
def test_a_peer_that_is_installed_does_the_same_work(name, workload):
    if importlib.util.find_spec(PEERS[name]) is None:
        pytest.skip(f"{PEERS[name]} is not installed: make bench-peers")
    (row,) = run([workload], [], repeats=1, memory=True, only=[name])
    if name == "JAX, jitted by hand" and workload != "sinusoid-25x1":
        model = WORKLOADS[workload].model
        assert row.reason == f"written by hand for the sinusoid network only, not for {model}"
    elif name == "parallel-metalearn, vmap" and workload in {"layernorm-8x5", "attention-8x3"}:
        # It differentiates inside vmap, which goes wrong where layer norm's weights are stacked.
        assert 1e-5 < row.gradient_error < 1e-2
    else:
        assert row.reason is None
        assert row.milliseconds > 0
        assert row.gradient_error <= 1e-10


@pytest.mark.usefixtures("small_encoders")
@pytest.mark.parametrize("name", ["attention-8x3", "lora-4x3"])
def test_encoders_have_the_meta_gradient_of_an_independent_loop(name):
    workload = replace(WORKLOADS[name], tasks=5, inner_steps=2)
    model, batch = workload.build()
    model.double()
    exact = loop(model, batch, steps=workload.inner_steps, lr=workload.inner_lr).gradients
    adapters = [f"blocks.{n}.{at}.{w}" for n in "01" for at in ("query", "value") for w in LOW_RANK]
    head = ["head.weight", "head.bias"]
    every = [each for each, _ in model.named_parameters()]
    assert list(exact) == (every if name == "attention-8x3" else [*adapters, *head])
    same = [each for each in contestants([]).values() if each.same_algorithm and not each.module]
    assert len(same) == 9
    with ON_CPU.active():
        for each in same:
            found = each.prepare(copy.deepcopy(model), batch, workload).gradient()
            assert off(found, exact) <= 1e-10


@pytest.mark.usefixtures("known_speed")
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


@pytest.mark.usefixtures("known_speed")
def test_what_does_not_fit_the_memory_is_a_row_of_ours_too(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def explained(*_):
        raise RunError(
            "iteration 0 ran out of memory: take fewer tasks"
        ) from torch.OutOfMemoryError()

    monkeypatch.setattr(
        measuring,
        "contestants",
        lambda *_, **__: {"plain": Contestant(full), "ours": Contestant(explained)},
    )
    plain, ours = run(["sinusoid-25x1"], [], repeats=1, memory=False)
    assert plain.reason == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert ours.reason == "iteration 0 ran out of memory: take fewer tasks"


@pytest.mark.usefixtures("known_speed")
def test_steps_that_are_compiled_in_name_only_have_no_time(monkeypatch):
    def refused(_):
        raise RuntimeError("no trace")

    monkeypatch.setattr(traced, "make_fx", refused)
    (row,) = run(["sinusoid-25x1"], [], repeats=1, memory=False, only=["metaplug, compiled"])
    assert row.reason.startswith("refused, so its steps would be as without: steps are not compile")
    assert "no trace" in row.reason
    assert row.milliseconds is None


@pytest.mark.usefixtures("known_speed")
def test_maml_plus_plus_takes_part_where_there_is_batch_norm():
    rows = run(
        ["sinusoid-25x1", "conv4-32-stride-8x3"],
        [],
        repeats=1,
        memory=False,
        only=["metaplug, maml++-reference"],
    )
    assert rows[0].reason.startswith("plugin 'per-step-batch-norm' needs batch norm layers")
    assert rows[1].milliseconds > 0
    assert rows[1].gradient_error is rows[1].share is None


@pytest.mark.slow
@pytest.mark.usefixtures("known_speed")
def test_the_compiled_loop_gives_the_same_meta_gradient():
    (row,) = run(["sinusoid-25x1"], [], repeats=1, memory=False, only=[COMPILED])
    assert row.gradient_error <= 1e-10
    assert COMPILED in contestants([], compiled=True)


@pytest.mark.usefixtures("known_speed")
def test_a_stacked_graph_takes_the_memory_of_the_tasks_graphs():
    names = ["plain torch loop", "metaplug, vectorized"]
    rows = {
        row.contestant: row
        for row in run(["conv4-32-stride-8x3"], [], repeats=1, memory=True, only=names)
    }
    assert rows["metaplug, vectorized"].graph_mib <= 1.2 * rows["plain torch loop"].graph_mib


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_has_a_model_and_tasks(name):
    model, batch = WORKLOADS[name].build()
    assert batch.num_tasks == WORKLOADS[name].tasks
    assert model(batch.support_x[0]).shape[0] == batch.support_x.shape[1]


class Fixed(Meter):
    """Does the work, and measures what it was told."""

    name = "a card"

    def timed(self, work):
        work()
        return 5.0

    def memory(self, work):
        work()
        return 3.0, 2.0

    def busy_milliseconds(self, work):
        work()
        return 4.0


@pytest.mark.usefixtures("known_speed")
def test_a_timed_step_follows_one_of_its_own_kind(monkeypatch):
    """After another contestant's step the caches hold what is that one's."""
    begun, timed = [], []

    def made(name):
        def prepare(*_):
            return measuring.Prepared(step=lambda: begun.append(name), gradient=dict)

        return Contestant(prepare, same_algorithm=False)

    class Noting(Fixed):
        def timed(self, work):
            timed.append(len(begun))
            return super().timed(work)

    kinds = {name: made(name) for name in ("one", "another", "a third")}
    monkeypatch.setattr(measuring, "contestants", lambda *_, **__: kinds)
    run(["sinusoid-25x1"], [], repeats=4, memory=False, meter=Noting())
    assert len(timed) == 4 * 3
    assert all(begun[place] == begun[place - 1] for place in timed)
    assert {name: sum(begun[place] == name for place in timed) for name in kinds} == dict.fromkeys(
        kinds, 4
    )


def test_all_that_is_measured_goes_through_the_meter():
    meter, names = Fixed(), ["plain torch loop", "metaplug, vectorized"]
    loop, ours = run(["sinusoid-25x1"], [], repeats=2, memory=True, only=names, meter=meter)
    for row in (loop, ours):
        assert (row.milliseconds, row.spread, row.graph_mib, row.peak_mib) == (5.0, 0.0, 2.0, 3.0)
        assert row.limit.speed == Speed(2 * 512**3 / 5e-3, 5e-3 / 100)
    assert (loop.busy, ours.busy) == (None, 0.8)
    text = shown(bench_table([loop, ours]))
    assert "busy" in text and "80 %" in text
    assert "Busy: the share of the time in which the device computes or copies; in the rest" in text
    assert as_json_values([ours], 2, meter)["device"] == "a card"
    points = scaling.run(repeats=1, grid={"sinusoid-25x5": {"tasks": (2,)}}, meter=meter)
    assert [(point.milliseconds, point.peak_mib) for point in points] == [(5.0, 3.0)]


class Waiting(Meter):
    """Notes in `SEEN` that it waits."""

    def wait(self):
        SEEN.append("wait")


SEEN = []


@pytest.fixture
def seen():
    SEEN.clear()
    return SEEN


def test_a_device_is_waited_for_before_the_clock_starts_and_stops(monkeypatch, seen):
    clock = SimpleNamespace(perf_counter=lambda: seen.append("clock") or len(seen))
    monkeypatch.setattr(meters, "time", clock)
    assert Waiting().timed(lambda: seen.append("work")) == 3000
    assert seen == ["wait", "clock", "work", "wait", "clock"]
    monkeypatch.setattr(torch.cuda, "synchronize", seen.append)
    Meter(CUDA).wait()
    assert seen[-1] == CUDA
    Meter().wait()
    assert len(seen) == 6


def test_memory_on_cuda_is_over_what_was_there(monkeypatch, seen):
    held = iter([7 * 2**20, 9 * 2**20])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: next(held))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 12 * 2**20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: seen.append("reset"))
    assert Waiting(CUDA).memory(lambda: seen.append("work")) == (5.0, 2.0)
    assert seen == ["wait", "reset", "work", "wait"]


def test_a_busy_device_is_counted_once_where_kernels_overlap(monkeypatch, seen):
    assert covered([(30, 40), (0, 10), (5, 20), (6, 8)]) == 30
    assert covered([]) == 0

    def event(kind, start, duration, named=False):
        return SimpleNamespace(
            device_type=lambda: kind,
            start_ns=lambda: start,
            duration_ns=lambda: duration,
            is_user_annotation=lambda: named,
        )

    cpu, cuda = meters.DeviceType.CPU, meters.DeviceType.CUDA
    events = [event(cpu, 0, 9), event(cuda, 2, 3), event(cuda, 0, 99, named=True)]
    assert device_spans(events) == [(2, 5)]
    kineto = SimpleNamespace(events=lambda: events)
    profiled = SimpleNamespace(profiler=SimpleNamespace(kineto_results=kineto))
    monkeypatch.setattr(meters, "profile", lambda **_: contextlib.nullcontext(profiled))
    meter = Waiting(CUDA)
    assert meter.busy_milliseconds(lambda: seen.append("work")) == 3 / 1e6 / 3
    assert seen == ["wait", "work", "work", "work", "wait"]
    events[1:] = []
    assert meter.busy_milliseconds(lambda: None) is None
    assert Meter().busy_milliseconds(lambda: None) is None


def test_models_and_tasks_are_moved_and_counted_where_they_are():
    meta = torch.device("meta")
    workload = replace(WORKLOADS["conv4-32-stride-8x3"], tasks=2, inner_steps=1)
    model, batch = workload.build(meta)
    assert {
        tensor.device for tensor in (*model.state_dict().values(), batch.support_x, batch.query_y)
    } == {meta}
    assert limit(workload, SPEED, meta).flops == limit(workload, SPEED).flops


@pytest.mark.parametrize("name", ["metaplug, captured", "metaplug, compiled and captured"])
def test_on_cuda_metaplug_takes_part_captured(name, monkeypatch):
    compiled = {"compile": True} if "compiled" in name else {}
    assert name not in contestants([], compiled=True)
    assert (name in contestants([], captured=True)) != bool(compiled)
    ours, given = importlib.import_module("metaplug.bench.contestants"), []

    def learner(model, **settings):
        given.append(settings)
        return SimpleNamespace(iterate=lambda *_, **__: iter([]))

    monkeypatch.setattr(ours, "MetaLearner", learner)
    made, work = (
        contestants([], compiled=True, captured=True),
        (*WORKLOADS["sinusoid-25x1"].build(), WORKLOADS["sinusoid-25x1"]),
    )
    captured, plain = (made[each].prepare(*work) for each in (name, "metaplug, auto"))
    assert given[0] == {**given[1], "task_batching": "vectorized", "capture": True, **compiled}
    assert (captured.torch_memory, plain.torch_memory) == (False, True)
    assert captured.graph is None
    monkeypatch.setattr(ours, "in_tf32", lambda _: True)
    made["metaplug, auto"].prepare(*work)
    assert given[2] == {**given[1], "precision": "tf32"}


def test_precision_is_said():
    assert [meter.precision for meter in (Meter(), Meter(CUDA), Meter(CUDA, tf32=True))] == [
        "float32",
        "float32",
        "TF32",
    ]
    assert replace(SPEED, precision="TF32").or_better(SPEED).precision == "TF32"
    assert not meters.in_tf32(torch.device("cpu"))
    least = Limit(2_000_000, 0.02, 9, 0.01, False, Speed(1.5e14, 2e-6, "TF32"))
    row = Row("sinusoid-25x1", "plain torch loop", 1.234, 0.011, 0.0, None, None, least, 0.016)
    text = shown(bench_table([row]))
    assert "limit: 0.002 GFLOP at 150.0 TFLOP/s" in text
    assert "the rate of a large matrix product in TF32, measured in this run" in text
    assert "1.23" in text and "0.01" in text


def test_jax_runs_where_the_tasks_are():
    def found(kind):
        if kind == "gpu" and not cards:
            raise RuntimeError("Unknown backend: 'gpu' requested")
        return cards if kind == "gpu" else ["a cpu"]

    cards, jax = [], SimpleNamespace(devices=found)
    assert jax_device(jax, torch.device("cpu")) == "a cpu"
    refused = r"^JAX has no back end for cuda here: install jax\[cuda13\] in its place, or measure"
    with pytest.raises(RequestError, match=refused):
        jax_device(jax, CUDA)
    cards += ["first", "second"]
    assert jax_device(jax, CUDA) == "first"
    assert jax_device(jax, torch.device("cuda:1")) == "second"


def test_a_limit_counts_the_arithmetic_and_the_calls():
    # Without an inner step only the query pass is left: products with three weights, and twice as
    # many backwards but for the inputs'.
    workload = replace(WORKLOADS["sinusoid-25x1"], inner_steps=0)
    forward, inputs = 2 * 25 * 10 * (40 + 40 * 40 + 40), 2 * 25 * 10 * 40
    found = limit(workload, SPEED)
    assert found.flops == 3 * forward - inputs
    assert found.milliseconds == pytest.approx(found.flops / 1e6)
    assert found.calls_milliseconds == pytest.approx(found.calls / 1e3)
    larger = limit(WORKLOADS["sinusoid-25x5"], SPEED)
    assert larger.flops > found.flops > 0
    assert larger.calls > found.calls > 0


@pytest.mark.usefixtures("small_encoders")
def test_a_limit_counts_the_products_of_attention():
    # The query pass alone, and twice as many products backwards; of a block of width 16, the
    # linear layers hold 12 · 16² weights, and attention takes two products of tokens with tokens.
    workload = replace(WORKLOADS["attention-8x3"], inner_steps=0)
    examples = 8 * 5
    block = 2 * examples * TOKENS * (12 * 16**2) + 2 * (2 * examples * TOKENS**2 * 16)
    with ON_CPU.active():
        found = limit(workload, SPEED).flops
    assert found == 3 * (2 * block + 2 * examples * 16 * 5)


def test_a_limit_says_where_it_says_nothing():
    assert limit(WORKLOADS["sinusoid-25x1"], replace(SPEED, flops_per_second=1e12)).overhead_bound
    assert not limit(WORKLOADS["conv4-32-stride-8x3"], SPEED).overhead_bound
    assert SPEED.or_better(Speed(2e9, 2e-6)) == Speed(2e9, 1e-6)


def test_the_table_marks_what_is_overhead_bound():
    least = Limit(
        flops=2_000_000,
        milliseconds=0.02,
        calls=1234,
        calls_milliseconds=2.5,
        overhead_bound=True,
        speed=Speed(1e11, 2e-6),
    )
    row = Row("sinusoid-25x1", "plain torch loop", 10.0, 0.1, 0.0, None, None, least, 0.002)
    text = shown(bench_table([row]))
    assert "limit: 0.002 GFLOP at 100 GFLOP/s" in text
    assert "overhead bound: 1,234 calls, 2.0 µs" in text
    assert "0.2 %" in text
    assert "Overhead bound" not in shown(
        bench_table([replace(row, limit=replace(least, overhead_bound=False))])
    )


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(
        RequestError,
        match=r"^unknown workload 'sinusoid-25x6': did you mean 'sinusoid-25x(5|1)'\?$",
    ):
        run(["sinusoid-25x6"], [], repeats=1, memory=False)
    with pytest.raises(
        RequestError,
        match=r"^unknown contestant 'metaplug, vectorised': did you mean 'metaplug, vectorized'\?$",
    ):
        run(["sinusoid-25x1"], [], repeats=1, memory=False, only=["metaplug, vectorised"])


def test_scaling_grows_along_each_series(tmp_path):
    seen = []
    points = scaling.run(repeats=2, grid=SMALL, on_series=seen.append)
    more = "sinusoid-25x5, more "
    assert seen == [f"{more}tasks", f"{more}inner steps", f"{more}inner steps, recomputed"]
    sizes = [(2, 5), (4, 5), (8, 5), (25, 0), (25, 1), (25, 2), (25, 1), (25, 2)]
    assert [(point.tasks, point.inner_steps) for point in points] == sizes
    assert [point.checkpoint_steps for point in points] == [None] * 6 + [1, 1]
    for series in (points[:3], points[3:6], points[6:]):
        peaks = [point.peak_mib for point in series]
        assert peaks == sorted(peaks) and peaks[0] > 0
    for point in points:
        assert point.milliseconds_per_task == point.milliseconds / point.tasks
        assert point.mib_per_task == point.peak_mib / point.tasks
    values = json.loads(json.dumps(scaling.as_json_values(points, 2)))
    assert values["points"][0]["axis"] == "tasks"
    assert values["points"][0]["mib_per_task"] == points[0].mib_per_task
    assert [found["recomputed"] for found in values["growth"]] == [False, False, True]
    assert values["growth"][0]["time_per_task"] == pytest.approx(
        points[2].milliseconds_per_task / points[0].milliseconds_per_task
    )
    assert "inner steps" in shown(scaling_table(points))
    scaling_figure(points, tmp_path / "scaling.png")
    assert imread(tmp_path / "scaling.png").shape[:2] == (1024, 1600)


def grown(series, size, milliseconds, mib):
    """Make a point of 10 tasks or, where tasks grow, of `size`; recomputed, √K steps are kept."""
    workload, axis, recomputed = series
    tasks, steps = (size, 5) if axis == "tasks" else (10, size)
    kept = round(math.sqrt(steps)) if recomputed else None
    return Point(workload, axis, tasks, steps, kept, milliseconds, 0.0, mib)


def test_growth_is_of_what_grows():
    tasks = [grown(KEPT_TASKS, n, 40 + n, 2.0 * n) for n in (8, 32)]
    kept = [
        grown(KEPT_STEPS, 0, 2, 25),
        *(grown(KEPT_STEPS, k, 2 + 3 * k, 40 + 10 * k) for k in (1, 4, 16)),
    ]
    recomputed = [grown(RECOMPUTED, k, 2 + 4 * k, 40 + 12 * math.sqrt(k)) for k in (1, 4, 16, 64)]
    of_tasks, of_kept, of_recomputed = scaling.growth([*tasks, *kept, *recomputed])
    assert of_tasks == Growth(
        *KEPT_TASKS, 8, 32, time_per_task=pytest.approx(72 / 32 / 6), memory_per_task=1.0
    )
    assert (of_kept.smallest, of_kept.largest, of_kept.times_as_long) == (0, 16, None)
    assert (of_kept.time_exponent, of_kept.memory_exponent) == (pytest.approx(1), pytest.approx(1))
    assert (of_recomputed.time_exponent, of_recomputed.memory_exponent) == (
        pytest.approx(1),
        pytest.approx(0.5),
    )
    assert of_recomputed.times_as_long == pytest.approx(66 / 50)
    text = shown(scaling_table([*tasks, *kept, *recomputed]), 200)
    for found in ("0.38×", "1.00×", "K^1.00", "K^0.50", "1.32×", "inner steps, recomputed"):
        assert found in text


def test_growth_says_nothing_where_noise_leaves_nothing():
    found = scaling.growth(
        [grown(KEPT_STEPS, 0, 5, 1), grown(KEPT_STEPS, 1, 4, 2), grown(KEPT_STEPS, 2, 9, 3)]
    )[0]
    assert (found.time_exponent, found.memory_exponent) == (None, pytest.approx(1))
    assert scaling.growth([grown(KEPT_STEPS, 1, 4, 2)])[0].time_exponent is None


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
    assert alone[1] == drawing.DrawRow(
        "torchmeta's BatchMetaDataLoader", None, None, "torchmeta is not here"
    )
    assert "torchmeta is not here" in shown(drawing_table([*rows, alone[1]]), 100)


STEPS = ["workload", "with", "repeats", "only", "memory", "compiled"]
SCALING, SOAK, DRAWING = "bench --scaling", "bench --soak", "bench --drawing"


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ([], {"plot": f"{SCALING} and {SOAK}", "soak-steps": SOAK}),
        (
            ["--scaling"],
            {
                **dict.fromkeys(STEPS, "bench"),
                "workload": f"bench and {SOAK}",
                "repeats": None,
                "soak-steps": SOAK,
            },
        ),
        (
            ["--drawing"],
            {
                **{
                    **dict.fromkeys(STEPS, "bench"),
                    "workload": f"bench and {SOAK}",
                    "repeats": None,
                    "soak-steps": SOAK,
                },
                **{"tf32": f"bench and {SCALING} and {SOAK}", "plot": f"{SCALING} and {SOAK}"},
            },
        ),
        (
            ["--soak"],
            {
                **dict.fromkeys(STEPS, "bench"),
                "workload": None,
                "repeats": f"bench and {SCALING} and {DRAWING}",
            },
        ),
    ],
)
def test_an_option_that_changes_nothing_about_what_is_measured_is_refused(mode, options, capfd):
    """With the value that it has anyway, too: whoever gives it expects something of it."""
    values = {
        "plot": ["a.png"],
        "soak-steps": ["100"],
        "workload": ["sinusoid"],
        "with": ["gradient-sharing"],
        "repeats": ["9"],
    }
    values["only"] = ["metaplug, auto"]
    for name, users in options.items():
        if users is not None:
            with pytest.raises(SystemExit) as stopped:
                main(["bench", *mode, f"--{name}", *values.get(name, [])])
            assert stopped.value.code == 2
            asked = " ".join(["bench", *mode, f"--{name}"])
            assert capfd.readouterr().err == (
                f"metaplug: {asked}: --{name} is an option of {users}, and changes nothing here: "
                "leave it out, or bench that\n"
            )


@pytest.mark.usefixtures("known_speed")
def test_the_command_line_gives_json_and_a_picture(capfd, tmp_path, monkeypatch):
    def answer(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["bench", *arguments])
        return stopped.value.code, *capfd.readouterr()

    status, out, _ = answer(
        "--workload", "sinusoid-25x1", "--only", "metaplug, auto", "--repeats", "1", "--json"
    )
    assert status == 0
    assert [row["contestant"] for row in json.loads(out)["rows"]] == ["metaplug, auto"]
    small = scaling.run(repeats=1, grid=SMALL)
    monkeypatch.setattr(scaling, "run", lambda **_: small)
    picture = tmp_path / "scaling.png"
    status, out, _ = answer("--scaling", "--plot", str(picture), "--json")
    assert status == 0
    assert len(json.loads(out)["points"]) == len(small)
    assert picture.exists()
    for arguments, text in (
        (("--device", "tpu"), "unknown device 'tpu': give auto, cpu, cuda or cuda:N"),
        (
            ("--tf32",),
            "--tf32 rounds on CUDA devices only: give --device cuda too, or leave it out",
        ),
    ):
        status, _, error = answer(*arguments)
        assert status == 2
        assert text in error
    status, out, error = answer(
        "--workload",
        "sinusoid-25x1",
        "--only",
        "metaplug, auto",
        "--repeats",
        "1",
        "--device",
        "cpu",
    )
    assert status == 0
    assert f"cpu ({Meter().name}), 1 CPU thread, torch {torch.__version__}, median of 1\n" in out
    assert error == "measuring sinusoid-25x1\n"
    monkeypatch.setattr(devices, "resolve_device", torch.device)
    status, _, error = answer("--drawing", "--device", "cuda")
    assert status == 2
    assert "--drawing --device cuda: torchmeta's loader draws on the CPU, and is timed" in error
    given = []
    monkeypatch.setattr(
        "metaplug.bench.run",
        lambda names, *_, **options: given.append((names, options["meter"])) or [],
    )
    monkeypatch.setattr(Meter, "name", "a card")
    assert answer("--device", "cuda:1", "--tf32", "--json")[0] == answer("--json")[0] == 0
    (on_cuda, meter), (on_cpu, _) = given
    assert meter == Meter(torch.device("cuda:1"), tf32=True)
    assert on_cuda == list(WORKLOADS)
    assert [name for name in on_cuda if name not in on_cpu] == ["conv4-64-max-32x5", "lora-4x3"]
