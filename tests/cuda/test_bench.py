"""The bench on a CUDA device."""

import importlib.util

import pytest
import torch

from metaplug.bench import WORKLOADS, as_json_values, contestants, run, scaling
from metaplug.bench.limits import CUDA_SIDE, measure_speed
from metaplug.bench.meters import Meter, in_tf32
from metaplug.bench.peers import COMPILED, peers

pytestmark = pytest.mark.cuda

PEERS = {name: peer.module for name, peer in peers().items() if name != COMPILED}
METER = Meter(torch.device("cuda"))


def test_every_contestant_of_ours_gives_the_same_meta_gradient_and_is_busy_or_waits():
    names = [name for name in contestants(["gradient-sharing"], captured=True) if name not in PEERS]
    rows = [
        row
        for row in run(
            ["sinusoid-25x1"], ["gradient-sharing"], repeats=2, memory=True, only=names, meter=METER
        )
        if not row.reason
    ]
    assert "metaplug, captured" in [row.contestant for row in rows]
    assert len(rows) == 12
    for row in rows:
        assert row.milliseconds > 0
        assert row.gradient_error is None or row.gradient_error <= 1e-9
        assert (row.busy is None) == (not row.contestant.startswith("metaplug"))
        assert row.busy is None or 0 < row.busy <= 1
        assert (row.peak_mib is None) == ("captured" in row.contestant)
        assert row.peak_mib is None or row.peak_mib > 0
    values = as_json_values(rows, 2, METER)
    assert values["device"] == torch.cuda.get_device_name()
    assert values["cuda"] == torch.version.cuda


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_is_installed_does_the_same_work(name):
    if importlib.util.find_spec(PEERS[name]) is None:
        pytest.skip(f"{PEERS[name]} is not installed: make bench-peers")
    (row,) = run(["sinusoid-25x1"], [], repeats=1, memory=True, only=[name], meter=METER)
    if name == "JAX, jitted by hand" and row.reason:
        assert row.reason.startswith("JAX has no back end for cuda here")
    else:
        assert row.reason is None
        assert row.gradient_error <= 1e-9


def test_the_plain_loop_and_metaplug_agree_on_the_workload_of_the_figures():
    names = ["stacked by hand", "metaplug, auto"]
    rows = run(["conv4-64-max-32x5"], [], repeats=1, memory=True, only=names, meter=METER)
    assert all(row.gradient_error <= 1e-9 for row in rows)


def test_the_clock_waits_for_the_device():
    """10^8 of its cycles are more than 10 ms at less than 10 GHz."""
    assert METER.timed(lambda: torch.cuda._sleep(10**8)) > 10
    assert METER.busy_milliseconds(lambda: torch.cuda._sleep(10**8)) > 10


def test_memory_is_that_of_the_allocator():
    assert METER.memory(lambda: torch.empty(2**20, device="cuda")) == (4.0, 4.0)
    most, left = METER.memory(lambda: float(torch.zeros(2**20, device="cuda")[0]))
    assert 4.0 <= most < 5.0
    assert left == 0.0


def test_tf32_is_off_unless_it_is_asked_for():
    matrix = torch.rand(CUDA_SIDE, CUDA_SIDE, device="cuda")
    exact = matrix.double() @ matrix.double()
    errors = {}
    for tf32 in (False, True):
        meter = Meter(torch.device("cuda"), tf32=tf32)
        with meter.active():
            assert in_tf32(meter.device) is tf32
            errors[tf32] = float((matrix @ matrix - exact).abs().max())
            assert measure_speed(meter).precision == ("TF32" if tf32 else "float32")
    assert errors[False] < 1e-2
    if torch.cuda.get_device_capability() >= (8, 0):
        assert errors[True] > errors[False]
    (row,) = run(
        ["sinusoid-25x1"],
        [],
        repeats=1,
        memory=False,
        only=["metaplug, auto"],
        meter=Meter(torch.device("cuda"), tf32=True),
    )
    assert row.limit.speed.precision == "TF32"
    assert row.gradient_error <= 1e-9  # in float64


def test_scaling_on_the_device():
    points = scaling.run(
        repeats=1, grid={"sinusoid-25x5": {"tasks": (2, 4), "inner_steps": (0, 1, 4)}}, meter=METER
    )
    assert [point.size for point in points] == [2, 4, 0, 1, 4, 1, 4]
    assert all(point.milliseconds > 0 and point.peak_mib > 0 for point in points)


def test_models_and_tasks_are_the_cpus():
    model, batch = WORKLOADS["conv4-64-max-32x5"].build(torch.device("cuda"))
    other, same = WORKLOADS["conv4-64-max-32x5"].build()
    assert torch.equal(batch.query_x.cpu(), same.query_x)
    assert all(
        torch.equal(ours.cpu(), theirs)
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True)
    )
