"""The estimate of a step's memory against what torch's allocator holds, what is free, and the mend when memory runs out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from metaplug_plugins.derivative_order import DerivativeOrder
from metaplug_plugins.gradient_sharing import GradientSharing
from metaplug_plugins.multi_step_loss import MultiStepLoss

from metaplug import MetaLearner, RequestError, RunError, checkpoint
from metaplug.bench.meters import torch_memory
from metaplug.bench.workloads import Workload
from metaplug.checks.prepare_batch import Intake
from metaplug.cli.main import main
from metaplug.execution import free_memory, memory
from metaplug.execution.free_memory import size_text
from metaplug.execution.memory import MemoryEstimate
from metaplug.execution.ranks import World
from metaplug.testing import Stream, assert_close, problem

CPU = torch.device("cpu")
FIRST_ORDER = {"plugins": ["derivative-order"]}


def work(model, tasks, steps, **settings):
    """A learner that has made a step, and a batch for it."""
    kind, shots, queries = (
        ("classification", 1, 2) if model.startswith("conv4") else ("regression", 10, 10)
    )
    made, batch = Workload("", model, tasks, steps, 0.01, kind, shots, queries).build()
    learner = MetaLearner(made, kind=kind, inner_steps=steps, inner_lr=0.01, **settings)
    learner.estimate_memory(batch)  # decides how tasks are batched
    learner.engine.meta_step(batch, 1)
    return learner, batch


def ratio(learner, batch):
    """The estimate over what a step holds, the tasks included."""
    measured = torch_memory(lambda: learner.engine.meta_step(batch, 2))[0] * 2**20
    measured += sum(
        field.nbytes for field in (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
    )
    return learner.estimate_memory(batch).bytes / measured


@pytest.mark.parametrize(
    ("model", "tasks", "steps", "batching", "settings"),
    [
        ("mlp", 3, 1, "vectorized", {}),
        ("mlp", 32, 1, "sequential", {}),
        ("mlp", 16, 10, "vectorized", {}),
        ("mlp", 2, 10, "sequential", {"checkpoint_steps": 1}),
        ("mlp", 16, 5, "vectorized", {"checkpoint_steps": 2, "chunk_size": 3}),
        ("mlp", 32, 0, "vectorized", {}),
        ("layernorm-mlp", 4, 5, "vectorized", {"checkpoint_steps": 3, "inner_optimizer": "adam"}),
        ("mlp", 8, 3, "sequential", {"chunk_size": 4}),
        ("layernorm-mlp", 8, 4, "vectorized", {"plugins": ["gradient-sharing"]}),
        ("conv4-32-stride", 2, 1, "vectorized", {}),
        ("conv4-32-stride", 8, 3, "vectorized", {}),
        ("conv4-32-stride", 2, 3, "vectorized", {"checkpoint_steps": 2}),
        ("conv4-32-stride", 2, 3, "vectorized", {"preset": "maml++-reference"}),
        ("conv4-64-max", 3, 1, "sequential", {}),
        ("mlp", 8, 5, "sequential", FIRST_ORDER),
        ("conv4-32-stride", 4, 3, "vectorized", FIRST_ORDER),
    ],
)
def test_the_estimate_is_near_what_the_allocator_holds(model, tasks, steps, batching, settings):
    assert 0.7 < ratio(*work(model, tasks, steps, task_batching=batching, **settings)) < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
@pytest.mark.parametrize("model", ["mlp", "layernorm-mlp", "conv4-32-stride", "conv4-64-max"])
def test_the_grid_of_the_documentation(model, batching):
    runtime = (
        {},
        {"checkpoint_steps": 1},
        {"checkpoint_steps": 2},
        {"checkpoint_steps": 3, "chunk_size": 4},
        {"chunk_size": 4},
    )
    others = (
        {"chunk_size": 1},
        {"plugins": ["gradient-sharing"]},
        {"inner_optimizer": "adam"},
        FIRST_ORDER,
    )
    sizes = [(2, 1), (2, 10), (8, 3), (32, 1), (16, 5)]
    for tasks, steps in sizes if model != "conv4-64-max" else sizes[:3]:
        for settings in (*runtime, *others):
            learner, batch = work(model, tasks, steps, task_batching=batching, **settings)
            assert 0.75 < ratio(learner, batch) < 1.1, (tasks, steps, settings)


def test_two_tasks_are_enough_and_one_is_taken_twice():
    learner, batch = work("mlp", 16, 3)
    whole = learner.estimate_memory(batch).bytes
    for few in (1, 2):
        assert learner.estimate_memory(rows(batch, few), tasks_per_batch=16).bytes == pytest.approx(
            whole, rel=0.01
        )


def rows(batch, count):
    return type(batch)(
        *(
            field[:count]
            for field in (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
        )
    )


def test_a_rank_estimates_its_own_tasks_and_exchanges_nothing():
    learner, batch = work("mlp", 8, 2)
    alone = learner.estimate_memory(batch, tasks_per_batch=4).bytes
    learner.world = learner.engine.world = World(rank=0, size=2)
    assert learner.estimate_memory(batch, tasks_per_batch=8).bytes == alone
    assert learner.engine.world.size == 2


def test_the_state_of_the_meta_optimizer_counts_until_it_is_there():
    case = problem()
    learner = case.learner()
    first = learner.estimate_memory(case.batch).bytes
    learner.engine.meta_step(case.batch, 1)
    learned = sum(parameter.nbytes for parameter in learner.model.parameters())
    assert first - learner.estimate_memory(case.batch).bytes == 2 * learned
    assert (
        case.learner(meta_optimizer="sgd").estimate_memory(case.batch).bytes == first - 2 * learned
    )


def test_steps_in_a_row_hold_their_tasks_and_what_they_began_from():
    case = problem()
    one, several = (case.learner(metrics_every=count) for count in (1, 3))
    learned = sum(parameter.nbytes for parameter in one.model.parameters())
    given = sum(
        field.nbytes
        for field in (
            case.batch.support_x,
            case.batch.support_y,
            case.batch.query_x,
            case.batch.query_y,
        )
    )
    assert (
        several.estimate_memory(case.batch).bytes - one.estimate_memory(case.batch).bytes
        == 3 * learned + 2 * given
    )


def test_the_heavier_end_of_a_schedule_counts():
    case = problem(steps=4)
    first, second = (
        case.learner(**settings).estimate_memory(case.batch).bytes for settings in (FIRST_ORDER, {})
    )
    learner = case.learner(plugins=[DerivativeOrder(switch=5)])
    assert learner.estimate_memory(case.batch, iterations=5).bytes == first < second
    assert learner.estimate_memory(case.batch, iterations=6).bytes == second
    every = case.learner(plugins=[MultiStepLoss(annealing_epochs=10)])
    assert every.estimate_memory(case.batch, iterations=100).bytes > second


@pytest.mark.parametrize(
    "settings", [{}, {"checkpoint_steps": 1}, {"chunk_size": 1}, {"compile": True}]
)
def test_an_estimate_changes_nothing(settings):
    case = problem()
    learner, other = (case.learner(**settings) for _ in range(2))
    before, derivation = torch.get_rng_state(), learner.engine.derivation
    learner.estimate_memory(case.batch, tasks_per_batch=9)
    assert torch.equal(before, torch.get_rng_state())
    assert learner.engine.derivation is derivation
    assert (learner.engine.inner.inner_steps, learner.engine.inner.checkpoint_steps) == (
        2,
        settings.get("checkpoint_steps"),
    )
    assert learner.iteration == 0
    if "compile" not in settings:
        assert_close(
            learner.meta_gradients(case.batch), other.meta_gradients(case.batch), rtol=0, atol=0
        )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_estimate_can_be_made_where_nothing_is_recorded(mode):
    case = problem(steps=3)
    expected, learner = (case.learner(checkpoint_steps=2) for _ in range(2))
    with mode():
        found = learner.estimate_memory(case.batch)
    assert found.bytes == expected.estimate_memory(case.batch).bytes


def test_counts_are_checked():
    case = problem()
    with pytest.raises(RequestError, match="tasks_per_batch = 0: give at least 1"):
        case.learner().estimate_memory(case.batch, tasks_per_batch=0)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (640 * 2**10, "640 KiB"),
        (1.3 * 2**30, "1.3 GiB"),
        (21.4 * 2**30, "21 GiB"),
    ],
)
def test_sizes_in_words(count, text):
    assert size_text(count) == text


def test_the_lines_of_an_estimate():
    assert (
        MemoryEstimate(1400 * 2**20, 21 * 2**30, None).text
        == "memory: about 1.4 GiB a step of 21 GiB free"
    )
    assert MemoryEstimate(1400 * 2**20, None, None).text == "memory: about 1.4 GiB a step"
    assert MemoryEstimate(1400 * 2**20, None, None).warning is None
    assert MemoryEstimate(8 * 2**30, 2**30, "use less").warning == (
        "a step will take about 8.0 GiB of memory, but 1.0 GiB are free, so that it may fail or be killed: use less"
    )


class TestWhatIsFree:
    def test_on_linux_something_is_known(self):
        if not Path("/proc/meminfo").exists():
            pytest.skip("not Linux")
        assert free_memory.available(CPU) > 2**20

    def test_of_the_machine(self, tmp_path):
        (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
        assert free_memory._of_machine(tmp_path / "meminfo") == 2**21
        assert free_memory._of_machine(tmp_path / "missing") is None

    def test_of_every_control_group_above(self, tmp_path):
        (tmp_path / "own").write_text("12:cpu:/other\n0::/a/b\n")
        for folder, limit, used, cached in (
            ("a/b", "max", 10, 0),
            ("a", "1000", 900, 50),
            (".", "5000", 900, 0),
        ):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / "memory.max").write_text(f"{limit}\n")
            (tmp_path / folder / "memory.current").write_text(f"{used}\n")
            (tmp_path / folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
        assert free_memory._of_groups(tmp_path, tmp_path / "own") == [150, 4100]
        assert free_memory._of_groups(tmp_path / "missing", tmp_path / "own") == []

    def test_the_least_counts_shared_by_the_ranks_of_a_machine(self, monkeypatch):
        monkeypatch.setattr(free_memory, "_of_machine", lambda: 1000)
        monkeypatch.setattr(free_memory, "_of_groups", lambda: [600])
        assert free_memory.available(CPU) == 600
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert free_memory.available(CPU) == 300
        monkeypatch.setattr(free_memory, "_of_machine", lambda: None)
        monkeypatch.setattr(free_memory, "_of_groups", lambda: [])
        assert free_memory.available(CPU) is None

    def test_on_cuda_what_torch_holds_unused_is_free(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
        assert free_memory.available(torch.device("cuda")) == 1400


class TestTheMendBefore:
    """Offered settings take at most ROOM of what is free, by the estimate that they would have themselves."""

    def estimate(self, monkeypatch, share, *, tasks=16, steps=5, **settings):
        """The estimate where only a share of what is needed is free."""
        case = problem(support=40, steps=steps)
        needed = case.learner(**settings).estimate_memory(case.batch, tasks_per_batch=tasks).bytes
        monkeypatch.setattr(memory, "available", lambda device: int(share * needed))
        return case, case.learner(**settings).estimate_memory(case.batch, tasks_per_batch=tasks)

    def test_none_where_it_fits(self, monkeypatch):
        _, found = self.estimate(monkeypatch, 1.0)
        assert (found.mend, found.warning) == (None, None)

    def test_recomputed_steps_or_chunks(self, monkeypatch):
        case, found = self.estimate(monkeypatch, 0.9)
        mend = re.fullmatch(
            r"use runtime.checkpoint_steps=1 \(about (.*)\), or runtime.chunk_size=(\d+) \(about (.*)\)",
            found.mend,
        )
        recomputed = (
            case.learner(checkpoint_steps=1).estimate_memory(case.batch, tasks_per_batch=16).bytes
        )
        assert size_text(recomputed) == mend[1]
        fits, more = (
            case.learner(chunk_size=int(mend[2]) + more)
            .estimate_memory(case.batch, tasks_per_batch=16)
            .bytes
            for more in (0, 1)
        )
        assert size_text(fits) == mend[3]
        assert fits <= memory.ROOM * found.free < more

    def test_both_together_where_one_is_not_enough(self, monkeypatch):
        case = problem(support=40, steps=10)
        one = case.learner(chunk_size=1).estimate_memory(case.batch, tasks_per_batch=4).bytes
        monkeypatch.setattr(memory, "available", lambda device: int(one))
        mend = case.learner().estimate_memory(case.batch, tasks_per_batch=4).mend
        assert re.fullmatch(
            r"use runtime.checkpoint_steps=1 with runtime.chunk_size=\d \(about .*\)", mend
        )

    def test_fewer_tasks_for_a_plugin_that_couples_them(self, monkeypatch):
        _, found = self.estimate(monkeypatch, 0.5, steps=1, plugins=["gradient-sharing"])
        assert re.fullmatch(r"use fewer tasks, training.tasks_per_batch=\d", found.mend)

    def test_first_order_steps_have_nothing_to_recompute(self, monkeypatch):
        _, found = self.estimate(monkeypatch, 0.5, **FIRST_ORDER)
        assert re.fullmatch(r"use runtime.chunk_size=\d \(about .*\)", found.mend)

    def test_a_compiled_step_takes_neither(self, monkeypatch):
        _, found = self.estimate(monkeypatch, 0.9, compile=True)
        assert found.mend.endswith(", without compiled or captured steps")

    def test_nothing_but_a_smaller_model_where_one_task_is_too_much(self, monkeypatch):
        _, found = self.estimate(monkeypatch, 1e-4)
        assert (
            found.mend
            == "use a smaller model, fewer inner steps or fewer examples in a task, or the preset fomaml"
        )

    def test_a_small_step_that_would_not_fit_is_reckoned(self, monkeypatch):
        case = problem(support=40, steps=5)
        measured = case.learner().estimate_memory(case.batch, tasks_per_batch=16).bytes
        learner, made = case.learner(), []
        learner.meta_gradients(case.batch)
        own = learner.engine.meta_gradients
        monkeypatch.setattr(
            learner.engine,
            "meta_gradients",
            lambda batch, *rest: made.append(batch.num_tasks) or own(batch, *rest),
        )
        monkeypatch.setattr(memory, "available", lambda device: 1)
        found = learner.estimate_memory(case.batch, tasks_per_batch=16)
        assert set(made) == {1}  # with one inner step, kept and recomputed
        assert 0.5 < found.bytes / measured < 2


RAN_OUT = [
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of ..."),
        ", asking for 20.00 MiB more,",
    ),
    (
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "8589934592 bytes. Error code 12 (Cannot allocate memory)"),
        ", asking for 8.0 GiB more,",
    ),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 100 bytes."), ", asking for 100 bytes more,"),
    (MemoryError(), ""),
]  # fmt: skip


class TestWhenItRunsOut:
    def failing(self, monkeypatch, learner, error, after=0):
        """The learner, whose forward passes raise from the one `after` on."""
        own, calls = learner.engine.inner._forward, []

        def forward(*arguments):
            calls.append(1)
            if len(calls) > after:
                raise error
            return own(*arguments)

        monkeypatch.setattr(learner.engine.inner, "_forward", forward)

    @pytest.mark.parametrize(("error", "asked"), RAN_OUT)
    def test_in_training(self, monkeypatch, error, asked):
        learner = problem().learner()
        learner.fit(Stream(), iterations=1)
        before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
        self.failing(monkeypatch, learner, error, after=2)
        with pytest.raises(RunError) as raised:
            learner.fit(Stream(), iterations=1, tasks_per_batch=8)
        assert str(raised.value) == (
            f"iteration 1 ran out of memory on cpu{asked} with 8 tasks of 2 inner steps; it updated nothing: "
            "use runtime.checkpoint_steps=1, or runtime.chunk_size=4"
        )
        assert raised.value.__cause__ is error
        assert learner.iteration == 1
        assert_close(learner.model.state_dict(), before, rtol=0, atol=0)
        monkeypatch.undo()
        assert learner.fit(Stream(), iterations=1).records[-1].step.iteration == 2

    @pytest.mark.parametrize(
        ("settings", "tasks", "mend"),
        [
            ({"checkpoint_steps": 1}, 8, "use runtime.chunk_size=4"),
            ({"chunk_size": 6}, 8, "use runtime.checkpoint_steps=1, or runtime.chunk_size=3"),
            (
                {"inner_steps": 1, "plugins": [GradientSharing()]},
                8,
                "use fewer tasks, training.tasks_per_batch=4",
            ),
            (FIRST_ORDER, 8, "use runtime.chunk_size=4"),
            (
                FIRST_ORDER,
                1,
                "use a smaller model, fewer inner steps or fewer examples in a task, or the preset fomaml",
            ),
        ],
    )
    def test_the_mend_is_what_is_left_to_set(self, monkeypatch, settings, tasks, mend):
        learner = problem().learner(**settings)
        self.failing(monkeypatch, learner, MemoryError())
        with pytest.raises(RunError) as raised:
            learner.fit(Stream(), iterations=1, tasks_per_batch=tasks)
        assert str(raised.value).endswith(f"; it updated nothing: {mend}")

    def test_in_the_check_of_the_first_batch(self, monkeypatch):
        learner = problem().learner()

        def forward(*_):
            raise RuntimeError("CUDA error: out of memory")

        monkeypatch.setattr(learner.model, "forward", forward)
        with pytest.raises(
            RunError,
            match="iteration 0 ran out of memory on cpu with 8 tasks of 2 inner steps; it updated nothing",
        ):
            learner.fit(Stream(), iterations=1)

    def test_in_one_of_several_steps_in_a_row(self, monkeypatch):
        learner = problem().learner(metrics_every=4)
        monkeypatch.setattr(Intake, "__call__", fails_in_iteration(2, Intake.__call__))
        with pytest.raises(
            RunError,
            match="iteration 2 ran out of memory on cpu with 8 tasks of 2 inner steps; it updated nothing: ",
        ):
            learner.fit(Stream(), iterations=4)
        assert learner.iteration == 2

    def test_in_the_meta_update_itself(self, monkeypatch):
        learner = problem().learner()

        def step():
            with torch.no_grad():
                next(learner.model.parameters()).add_(1)
            raise MemoryError

        monkeypatch.setattr(learner.engine.optimizer, "step", step)
        with pytest.raises(
            RunError, match="; its meta-update may be half done, so load a checkpoint: use "
        ):
            learner.fit(Stream(), iterations=1)

    @pytest.mark.parametrize(
        ("plugins", "tasks", "mend"),
        [
            (
                (),
                10,
                "use fewer tasks at a time, MetaLearner.evaluate(tasks_per_batch=5) or runtime.chunk_size=5",
            ),
            (
                ("gradient-sharing",),
                10,
                "use fewer tasks at a time, MetaLearner.evaluate(tasks_per_batch=5)",
            ),
            ((), 1, "use a smaller model, or fewer examples in a task"),
        ],
    )
    def test_in_evaluation(self, monkeypatch, plugins, tasks, mend):
        learner = problem().learner(plugins=plugins)
        self.failing(monkeypatch, learner, MemoryError())
        with pytest.raises(RunError) as raised:
            learner.evaluate(Stream(), num_tasks=20, tasks_per_batch=tasks, inner_steps=1)
        assert (
            str(raised.value)
            == f"evaluation ran out of memory on cpu with {tasks} task{'s' * (tasks > 1)} of 1 inner step at a time: {mend}"
        )

    def test_in_the_estimate_itself(self, monkeypatch):
        case = problem()
        learner = case.learner()
        self.failing(monkeypatch, learner, MemoryError())
        with pytest.raises(
            RunError,
            match="memory ran out on cpu in a small step, with 1 task of 1 inner step, before a whole one could",
        ):
            learner.estimate_memory(case.batch)

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("another reason"),
            RunError("lost a rank, killed or out of memory: go on"),
            KeyError("x"),
        ],
    )
    def test_other_errors_are_left_as_they_are(self, monkeypatch, error):
        learner = problem().learner()
        self.failing(monkeypatch, learner, error)
        for work in (
            lambda: learner.fit(Stream(), iterations=1),
            lambda: learner.evaluate(Stream(), num_tasks=2),
        ):
            with pytest.raises(type(error)) as raised:
                work()
            assert raised.value is error

    @pytest.mark.skipif(
        not Path("/proc/self/statm").exists(),
        reason="needs Linux, to bound a process by what it has",
    )
    def test_for_real_on_a_cpu(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        done = subprocess.run(
            [sys.executable, "-c", BOUNDED],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        training, evaluation, after = done.stdout.splitlines()
        asked = r"ran out of memory on cpu(, asking for [\d.]+ \w+ more,)?"
        assert re.fullmatch(
            rf"iteration 1 {asked} with 400 tasks of 3 inner steps; it updated nothing: use runtime.checkpoint_steps=1, "
            "or runtime.chunk_size=200",
            training,
        )
        assert re.fullmatch(
            rf"evaluation {asked} with 800 tasks of 3 inner steps at a time: use fewer tasks at a time, .*",
            evaluation,
        )
        assert after == "True 2"


BOUNDED = """
import resource
import torch
from metaplug import MetaLearner, RunError, TaskBatch

torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(8, 200), torch.nn.Tanh(), torch.nn.Linear(200, 200), torch.nn.Tanh(), torch.nn.Linear(200, 1))
learner = MetaLearner(model, kind="regression", inner_steps=3, inner_lr=0.01, task_batching="vectorized")

class Tasks:
    split = "train"

    def batch(self, iteration, indices):
        return TaskBatch(*(torch.randn(len(indices), 5, width) for width in (8, 1, 8, 1)))

learner.fit(Tasks(), iterations=1, tasks_per_batch=2)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 100 * 2**20,) * 2)
before = [parameter.clone() for parameter in model.parameters()]
for work in (lambda: learner.fit(Tasks(), iterations=1, tasks_per_batch=400),
             lambda: learner.evaluate(Tasks(), num_tasks=800, tasks_per_batch=800)):
    try:
        work()
    except RunError as error:
        print(error)
same = all(map(torch.equal, before, model.parameters()))
learner.fit(Tasks(), iterations=1, tasks_per_batch=2)
print(same, learner.iteration)
"""


def test_chunks_bound_evaluation_too(monkeypatch):
    sizes = []
    for settings in ({}, {"chunk_size": 3}, {"chunk_size": 30}):
        learner = problem().learner(**settings)
        own = learner.engine.evaluate
        monkeypatch.setattr(
            learner.engine,
            "evaluate",
            lambda batch, steps, own=own: sizes.append(batch.num_tasks) or own(batch, steps),
        )
        learner.evaluate(Stream(), num_tasks=17)
    assert sizes == [16, 1, 3, 3, 3, 3, 3, 2, 16, 1]


class TestOnTheCommandLine:
    TINY = (
        *(
            "--tasks",
            "sinusoid",
            "--model",
            "mlp",
            "--shots",
            "3",
            "--inner-steps",
            "2",
            "--inner-lr",
            "0.01",
            "--tasks-per-batch",
            "8",
        ),
        *(
            "--iterations",
            "4",
            "--device",
            "cpu",
            "--set",
            "training.validate_every=2",
            "--set",
            "runtime.threads=1",
        ),
    )

    @pytest.fixture(autouse=True)
    def in_an_empty_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def run(self, capfd, *arguments):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *self.TINY])
        return stopped.value.code, capfd.readouterr().err.splitlines()

    def test_it_is_said_before_training(self, capfd):
        status, lines = self.run(capfd, "train", "--name", "mine")
        assert status == 0
        assert re.fullmatch(r"memory: about \d+ KiB a step of \d+(\.\d)? \w+ free", lines[1])
        assert not any("warning" in line for line in lines)

    def test_too_much_is_a_warning_with_its_mend_for_each_variant(self, capfd, monkeypatch):
        monkeypatch.setattr(memory, "available", lambda device: 300 * 2**10)
        settings = ("--set", "training.validation_tasks=200", "--seeds", "2")
        status, lines = self.run(
            capfd, "compare", "--variant", "maml", "--variant", "fomaml", *settings
        )
        assert status == 0
        told = [line for line in lines if "memory" in line]
        assert re.fullmatch(r"maml: memory: about \d+ KiB a step of 300 KiB free", told[0])
        assert re.fullmatch(
            r"metaplug: warning: maml: a step will take about .* KiB are free, .*: use .*runtime.chunk_size=\d.*",
            told[1],
        )
        assert [line.split(":")[0] for line in told] == ["maml", "metaplug", "fomaml"]

    def test_a_run_does_not_end_because_there_is_no_estimate(self, capfd, monkeypatch):
        def refuse(*_, **__):
            raise TypeError("odd")

        monkeypatch.setattr(MetaLearner, "estimate_memory", refuse)
        status, lines = self.run(capfd, "train", "--name", "mine")
        assert (status, lines[1]) == (0, "memory: no estimate (TypeError: odd)")

    def test_memory_that_runs_out_is_one_line_and_keeps_the_last_checkpoint(
        self, capfd, monkeypatch
    ):
        monkeypatch.setattr(Intake, "__call__", fails_in_iteration(3, Intake.__call__))
        status, lines = self.run(capfd, "train", "--name", "mine")
        assert status == 1
        assert lines[-1] == (
            "metaplug: iteration 3 ran out of memory on cpu with 8 tasks of 2 inner steps; it updated nothing: "
            "use runtime.checkpoint_steps=1, or runtime.chunk_size=4"
        )
        assert checkpoint.read(Path("runs/mine/last.safetensors"))["iteration"] == 2
        assert len(Path("runs/mine/metrics.jsonl").read_text().splitlines()) == 3


def fails_in_iteration(iteration, own):
    def checked(self, batch, **settings):
        if self._engine.iteration == iteration:
            raise MemoryError
        return own(self, batch, **settings)

    return checked
