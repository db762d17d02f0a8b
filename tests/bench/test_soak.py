"""What runs for long stays as it began; what is let go of is gone."""

import gc
import io
import json
import os
import sys
import tracemalloc
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from metaplug import MetaLearner, RequestError
from metaplug.bench import soak
from metaplug.bench.meters import ON_CPU
from metaplug.bench.process import open_files, resident_mib, threads
from metaplug.bench.soak import SOAKS, Sample, Soaked, as_json_values, run
from metaplug.bench.soak_workloads import SoakWorkload
from metaplug.cli.main import main
from metaplug.execution.traced import CompiledDerivation
from metaplug.models import Conv4, Mlp
from metaplug.report.bench import soak_table
from metaplug.report.soak import soak_figure
from metaplug.tasks import Sinusoid
from metaplug.testing import FIRST_PARTY

TASKS = Sinusoid(shots=5, queries=5)
SLOW = pytest.mark.slow


def learner(**settings):
    model = Mlp(TASKS.input_shape, TASKS.outputs)
    return MetaLearner(
        model,
        **{
            "kind": "regression",
            "inner_lr": 0.01,
            "inner_steps": 2,
            "plugins": ["gradient-sharing"],
            **settings,
        },
    )


def growth(work, times, warm_up=5):
    """Return the Python bytes and tensors that `times` calls leave, after some calls before."""
    for _ in range(warm_up):
        work()
    gc.collect()
    tensors = _tensors()
    tracemalloc.start()
    try:
        work()
        gc.collect()
        sys._clear_type_cache()  # which keeps names that were looked up, whoever made them
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(times):
            work()
        gc.collect()
        sys._clear_type_cache()
        return tracemalloc.get_traced_memory()[0] - before, _tensors() - tensors
    finally:
        tracemalloc.stop()


def _tensors():
    return sum(
        type(each) is torch.Tensor or type(each) is torch.nn.Parameter for each in gc.get_objects()
    )


# A call of it 10,000 times leaves nothing behind. Python keeps up to 2,000 empty tuples of each
# length for later: in bytes, those of a length or two a call, until the shelf is full.

SHELF = 400
"""Bytes a call that Python's own free lists may take while they fill."""


@pytest.mark.parametrize("times", [25, pytest.param(10_000, marks=SLOW)])
def test_evaluations_in_a_loop_leave_nothing_behind(times):
    one = learner()
    bytes_left, tensors = growth(lambda: one.evaluate(TASKS.test, num_tasks=2), times)
    assert tensors == 0
    assert bytes_left < 20_000 + SHELF * min(times, 2000)


@pytest.mark.parametrize("times", [25, pytest.param(10_000, marks=SLOW)])
def test_adapting_in_a_loop_leaves_nothing_behind(times):
    one, batch = learner(), TASKS.test.batch(0, [0])
    bytes_left, tensors = growth(lambda: one.adapt(batch.support_x[0], batch.support_y[0]), times)
    assert tensors == 0
    assert bytes_left < 20_000 + SHELF * min(times, 2000)


@pytest.mark.parametrize("times", [10, pytest.param(1_000, marks=SLOW)])
def test_saving_in_a_loop_leaves_nothing_behind(times, tmp_path):
    one = learner()
    one.fit(TASKS.train, iterations=1, tasks_per_batch=2)
    one.save(tmp_path / "a.pt")
    files = open_files()
    bytes_left, tensors = growth(lambda: one.save(tmp_path / "a.pt"), times)
    assert tensors == 0
    assert bytes_left < 20_000 + SHELF * times
    assert open_files() == files
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("times", [25, pytest.param(5_000, marks=SLOW)])
def test_iterations_whose_records_nobody_keeps_leave_nothing_behind(times):
    steps = learner().iterate(TASKS.train, iterations=100_000, tasks_per_batch=2)
    bytes_left, tensors = growth(lambda: next(steps), times)
    assert tensors == 0
    assert bytes_left < 20_000 + SHELF * min(times, 2000)


def test_steps_that_go_through_a_trace_leave_nothing_behind():
    one = learner()
    one.engine.derivation = CompiledDerivation(one.engine, compile_graph=lambda graph, _: graph)
    steps = one.iterate(TASKS.train, iterations=1000, tasks_per_batch=2)
    bytes_left, tensors = growth(lambda: next(steps), 25)
    assert one.engine.derivation.refusal is None
    assert tensors == 0
    assert bytes_left < 20_000 + SHELF * 25


def test_a_record_of_fit_is_about_a_kilobyte():
    """What `fit` returns grows by design, by a record for each iteration; `iterate` keeps none."""
    one = learner()
    tracemalloc.start()
    try:
        history = one.fit(TASKS.train, iterations=60, tasks_per_batch=2)
        held = tracemalloc.get_traced_memory()[0]
        history.records.clear()
        each = (held - tracemalloc.get_traced_memory()[0]) / 60
    finally:
        tracemalloc.stop()
    assert 400 < each < 1600


def test_a_learner_that_is_let_go_of_is_collected_with_all_that_it_made():
    """Its modules, optimizers and plugins, and classes that a library made for it."""

    def live():
        one = learner()
        one.fit(
            TASKS.train, iterations=2, tasks_per_batch=2, validation=TASKS.val, validation_tasks=2
        )
        one.evaluate(TASKS.test, num_tasks=2)

    def census():
        gc.collect()
        kinds = (type, torch.nn.Module, torch.optim.Optimizer, MetaLearner, torch.Tensor)
        return [sum(issubclass(type(each), kind) for each in gc.get_objects()) for kind in kinds]

    live()
    before = census()
    live()
    assert census() == before


@pytest.mark.parametrize("times", [10, pytest.param(300, marks=SLOW)])
def test_learners_that_come_and_go_leave_nothing_behind(times):
    bytes_left, tensors = growth(
        lambda: learner().fit(TASKS.train, iterations=1, tasks_per_batch=2), times, warm_up=3
    )
    assert tensors == 0
    assert bytes_left < 20_000 + SHELF * 10 * times


def test_what_a_model_keeps_for_its_backward_pass_is_let_go_of_when_it_was_counted():
    """A hook that gives the tensor itself, to choose the batching, would hold a graph for good."""
    x, y = torch.rand(1, 5, 1, 28, 28), torch.arange(5).unsqueeze(0)

    def begin():
        MetaLearner(Conv4((1, 28, 28), 5, filters=8), inner_steps=0).adapt(x[0], y[0])

    begin()
    gc.collect()
    before = _tensors()
    begin()
    gc.collect()
    assert _tensors() == before


# The command.


def soaked(resident, milliseconds, files=7, steps=None, **given):
    """A run with a sample for each step; lists or one value for all."""
    count = len(resident)
    files = files if isinstance(files, list) else [files] * count
    rows = zip(range(1, count + 1), resident, files, [1] * count, milliseconds, strict=True)
    samples = tuple(
        Sample(iteration, mib, opened, running, given.get("cuda"), given.get("cuda"), each)
        for iteration, mib, opened, running, each in rows
    )
    return Soaked(
        "sinusoid",
        count if steps is None else steps,
        ("a", "b"),
        {"c": "it does not fit"},
        12.0,
        samples,
    )


FLAT = [10.0, 10.2] * 50


def test_a_run_that_stays_as_it_began_keeps_every_bound():
    """Before warm-up anything may happen, and up to 2 % in either direction are allowed."""
    found = soaked(
        [50.0] * 10 + [100.0] + [101.9, 98.1] * 44 + [101.0],
        [99.0] * 10 + FLAT[:90],
        files=[1] * 10 + [7] * 90,
    )
    assert found.memory_change == {"resident memory": pytest.approx(0.019)}
    assert found.quarters == pytest.approx((10.1, 10.1))
    assert found.slower == pytest.approx(0)
    assert abs(found.drift) < found.drift_error
    assert found.broken == ()
    assert [sample.iteration for sample in found.warm] == list(range(11, 101))


def test_every_bound_that_is_broken_is_named_with_its_figures():
    found = soaked(
        [100.0] * 99 + [97.0], [10 + 0.02 * place for place in range(100)], files=[7] * 99 + [8]
    )
    assert found.memory_change["resident memory"] == pytest.approx(-0.03)
    assert found.drift == pytest.approx(0.02 * 89 / 11.09)
    assert found.drift_error == pytest.approx(0, abs=1e-9)
    assert found.broken == (
        "resident memory moved by -3.0 % after warm-up, at most 2 % are allowed",
        "open files went from 7 after warm-up to 8, between 7 and 8",
        "a step took 11.77 ms in the last quarter, 10.41 ms in the first: +13.1 %",
    )


def test_noise_alone_breaks_no_bound_and_nor_does_getting_faster():
    noisy = [10.0] * 10 + [10.0] * 23 + [10.0, 30.0] * 22 + [10.8] * 23
    assert soaked([1.0] * 100, noisy).slower == pytest.approx(0.08)
    assert soaked([1.0] * 100, noisy).broken == ()
    assert soaked([1.0] * 100, [10 - 0.02 * place for place in range(100)]).broken == ()


def test_what_is_not_known_is_not_judged_and_said():
    found = soaked([None] * 100, FLAT, files=None)
    assert (found.memory_change, found.broken) == ({}, ())
    text = shown(soak_table([found]))
    assert "resident memory, open files and threads are not known here, as there is no /" in text
    on_cuda = soaked([100.0] * 100, FLAT, cuda=5.0)
    assert on_cuda.memory_change == {
        "resident memory": 0.0,
        "CUDA memory in use": 0.0,
        "CUDA memory held": 0.0,
    }


def shown(table, width=160):
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue()


def test_the_table_and_the_picture_show_what_was_found(tmp_path):
    found = soaked([100.0] * 99 + [103.0], FLAT)
    text = shown(soak_table([found]))
    for words in (
        "resident memory, MiB",
        "+3.00 %",
        "broken",
        "100 meta-steps in 12 s, with a, b.",
        "without c, as it does not fit.",
    ):
        assert words in text
    soak_figure([found, soaked([None] * 100, FLAT, files=None)], tmp_path / "soak.png")
    assert imread(tmp_path / "soak.png").shape[:2] == (1024, 1600)
    values = json.loads(json.dumps(as_json_values([found])))
    assert values["runs"][0]["memory_change"] == {"resident memory": pytest.approx(0.03)}
    assert values["runs"][0]["broken"] == list(found.broken) != []
    assert [values["runs"][0][name] for name in ("slower", "drift", "drift_error")] == [
        found.slower,
        found.drift,
        found.drift_error,
    ]
    assert (values["warm_up"], values["most_memory"], values["most_slower"]) == (0.1, 0.02, 0.05)
    assert len(values["runs"][0]["samples"]) == 100


@pytest.mark.parametrize("name", SOAKS)
def test_every_first_party_plugin_takes_part_or_is_left_out_for_a_reason(name):
    workload = SOAKS[name]
    assert sorted([*workload.plugins, *workload.left_out]) == sorted(FIRST_PARTY)
    assert [use.plugin for use in workload.config(100).plugins] == list(workload.plugins)


def test_the_asked_lengths_are_the_defaults():
    assert {name: workload.steps for name, workload in SOAKS.items()} == {
        "sinusoid": 20_000,
        "conv4": 2_000,
    }


def test_a_process_is_measured(tmp_path):
    (tmp_path / "statm").write_text("900 512 77 1 0 300 0\n")
    for name in ("fd/0", "fd/1", "fd/2", "task/17"):
        (tmp_path / name).mkdir(parents=True)
    assert resident_mib(tmp_path) == 512 * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert (open_files(tmp_path), threads(tmp_path)) == (3, 1)


@pytest.mark.skipif(resident_mib() is None, reason="there is no /proc")
def test_this_process_holds_what_it_opened():
    """Bounds that hold whatever other threads, the collector and other processes do."""
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(Path("/dev/null").open())
        assert open_files() >= 40
    assert threads() >= 1
    assert resident_mib() > 20


def test_without_proc_nothing_is_known(tmp_path):
    assert resident_mib(tmp_path) is open_files(tmp_path) is threads(tmp_path) is None


TINY = {
    **SOAKS["sinusoid"].settings,
    "training": {"tasks_per_batch": 2, "validation_tasks": 2, "test_tasks": 2},
}


def test_a_run_is_watched_from_its_first_step_to_its_last(monkeypatch):
    tiny = SoakWorkload("tiny", 60, SOAKS["sinusoid"].left_out, TINY)
    monkeypatch.setitem(SOAKS, "tiny", tiny)
    monkeypatch.setattr(soak, "MOST_SAMPLES", 20)
    seen = []
    found = run("tiny", on_record=lambda record: seen.append(record.validation is not None))
    assert len(seen) == 60 and sum(seen) == 6
    assert [sample.iteration for sample in found.samples] == list(range(3, 61, 3))
    assert all(sample.milliseconds > 0 for sample in found.samples)
    assert "per-step-batch-norm" not in found.plugins and "gradient-sharing" in found.plugins
    if resident_mib() is not None:
        assert not any("open files" in bound for bound in found.broken)


@pytest.mark.parametrize(
    ("steps", "samples"), [(50, 50), (200, 200), (201, 100), (399, 199), (20_000, 200)]
)
def test_a_run_of_any_length_gives_at_most_200_samples(steps, samples):
    watch = soak.Watch(steps, ON_CPU)
    for iteration in range(1, steps + 1):
        watch.record(iteration)
    assert len(watch.samples) == samples


def test_what_cannot_be_soaked_is_refused_before_anything_runs():
    with pytest.raises(
        RequestError, match=r"^unknown soak workload 'conv5': did you mean 'conv4'\?$"
    ):
        run("conv5")
    few = (
        "^a soak of 49 meta-steps has too few samples to tell growth from noise: give at least 50$"
    )
    with pytest.raises(RequestError, match=few):
        run("sinusoid", steps=49)


def test_the_command_line_ends_with_status_1_where_a_bound_is_broken(capfd, tmp_path, monkeypatch):
    def answer(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["bench", *arguments])
        return stopped.value.code, *capfd.readouterr()

    given = []
    outcome = [soaked([100.0] * 100, FLAT)]
    monkeypatch.setattr(
        soak, "run", lambda name, *, steps, **_: given.append((name, steps)) or outcome[0]
    )
    status, out, error = answer("--soak", "--json", "--plot", str(tmp_path / "soak.png"))
    assert status == 0
    assert given == [("sinusoid", 20_000), ("conv4", 2_000)]
    assert len(json.loads(out)["runs"]) == 2
    assert (tmp_path / "soak.png").exists()
    assert "sinusoid: 20,000 meta-steps with partial-adaptation, " in error
    outcome[0] = soaked([100.0] * 99 + [103.0], FLAT)
    status, _, error = answer("--soak", "--workload", "sinusoid", "--soak-steps", "50")
    assert status == 1
    assert given[-1] == ("sinusoid", 50)
    assert (
        "metaplug: the soak did not stay as it began: sinusoid: resident memory moved by +3.0 % "
        "after warm-up, at most 2 % are allowed; see where with --plot, or --json\n"
    ) in error
    for arguments, text in (
        (
            ("--soak", "--scaling"),
            "--scaling and --soak are measurements of their own, of which a command makes one: "
            "give one of them",
        ),
        (("--soak", "--workload", "conv5"), "unknown soak workload 'conv5'"),
    ):
        status, _, error = answer(*arguments)
        assert status == 2
        assert text in error
