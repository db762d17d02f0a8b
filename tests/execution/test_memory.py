"""The peak of the first step, what is free, and what is said when memory runs out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from metaplug_plugins.gradient_sharing import GradientSharing

from metaplug import RunError, checkpoint
from metaplug.checks.prepare_batch import PrepareBatch
from metaplug.cli.main import main
from metaplug.execution import free_memory, memory
from metaplug.execution.free_memory import available, size_text
from metaplug.execution.memory import peak_memory, reset_peak_memory
from metaplug.testing import Stream, assert_close, problem

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FIRST_ORDER = {"plugins": ["derivative-order"]}


@pytest.mark.skipif(peak_memory(CPU) is None, reason="the system does not tell the peak")
def test_the_peak_is_what_the_process_held_at_most():
    before = peak_memory(CPU)
    held = torch.ones(2**28, dtype=torch.uint8)
    assert peak_memory(CPU) >= max(before, held.nbytes)


def test_a_reset_forgets_the_peak_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_PROCESS", tmp_path)
    (tmp_path / "status").write_text("VmPeak:\t  99 kB\nVmHWM:\t   640 kB\nVmRSS:\t 7 kB\n")
    reset_peak_memory(CPU)
    assert (tmp_path / "clear_refs").read_text() == "5"
    assert peak_memory(CPU) == 640 * 1024


def test_where_the_system_tells_nothing_the_peak_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "missing")
    reset_peak_memory(CPU)
    assert peak_memory(CPU) is None


def test_on_cuda_the_peak_is_that_of_torchs_allocator(monkeypatch):
    reset = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    reset_peak_memory(CUDA)
    assert (reset, peak_memory(CUDA)) == ([CUDA], 7)


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


class TestWhatIsFree:
    @pytest.fixture
    def linux(self, tmp_path, monkeypatch):
        """A machine with 2 MiB free, and a process in a group of a group, the outer one limited."""
        monkeypatch.setattr(free_memory, "_PROC", tmp_path / "proc")
        monkeypatch.setattr(free_memory, "_GROUPS", tmp_path / "groups")
        for name, text in {
            "proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2048 kB\n",
            "proc/self/cgroup": "12:cpu:/other\n0::/a/b\n",
            **self.group("a/b", "max", 10, 0),
            **self.group("a", "1000", 900, 50),
            **self.group(".", "5000", 900, 0),
        }.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    def group(self, name, limit, used, cached):
        folder = f"groups/{name}/memory"
        return {
            f"{folder}.max": f"{limit}\n",
            f"{folder}.current": f"{used}\n",
            f"{folder}.stat": f"anon 1\ninactive_file {cached}\n",
        }

    def test_the_least_that_machine_and_groups_leave(self, linux):
        assert available(CPU) == 150
        (linux / "groups/a/memory.max").write_text("max\n")
        assert available(CPU) == 4100
        (linux / "groups/memory.max").unlink()
        assert available(CPU) == 2**21

    def test_elsewhere_it_is_not_known(self, linux):
        (linux / "proc").rename(linux / "other")
        (linux / "groups").rename(linux / "others")
        assert available(CPU) is None

    def test_on_cuda_the_driver_says(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
        assert available(CUDA) == 1000


RAN_OUT = [
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a ..."),
        ", asking for 20.00 MiB more,",
    ),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
        ),
        ", asking for 8.0 GiB more,",
    ),
    (
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 100 bytes."),
        ", asking for 100 bytes more,",
    ),
    (MemoryError(), ""),
]
NOTHING = "use a smaller model, fewer inner steps or fewer examples in a task, or the preset fomaml"
WORK = "with 8 tasks of 2 inner steps; it updated nothing"


class TestWhenItRunsOut:
    def failing(self, monkeypatch, learner, error, after=0):
        """The learner, whose forward passes raise from the one `after` on."""
        own, calls = learner.engine.inner.all_tasks, []

        def forward(*arguments, **options):
            calls.append(1)
            if len(calls) > after:
                raise error
            return own(*arguments, **options)

        monkeypatch.setattr(learner.engine.inner, "all_tasks", forward)

    @pytest.mark.parametrize(("error", "asked"), RAN_OUT)
    def test_in_training(self, monkeypatch, error, asked):
        learner = problem().learner()
        learner.fit(Stream(), iterations=1)
        before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
        self.failing(monkeypatch, learner, error, after=2)
        with pytest.raises(RunError) as raised:
            learner.fit(Stream(), iterations=1, tasks_per_batch=8)
        assert str(raised.value) == (
            f"iteration 2 ran out of memory on cpu{asked} {WORK}: "
            "use runtime.checkpoint_steps=1, or runtime.chunk_size=4"
        )
        assert raised.value.__cause__ is error
        assert learner.iteration == 1
        assert_close(learner.model.state_dict(), before, rtol=0, atol=0)
        monkeypatch.undo()
        assert learner.fit(Stream(), iterations=1).records[-1].step.iteration == 2

    @pytest.mark.parametrize(
        ("settings", "tasks", "advice"),
        [
            ({"checkpoint_steps": 1}, 8, "use runtime.chunk_size=4"),
            ({"chunk_size": 6}, 8, "use runtime.checkpoint_steps=1, or runtime.chunk_size=3"),
            (
                {"inner_steps": 1, "plugins": [GradientSharing()]},
                8,
                "use fewer tasks, training.tasks_per_batch=4",
            ),
            (FIRST_ORDER, 8, "use runtime.chunk_size=4"),
            (FIRST_ORDER, 1, NOTHING),
        ],
    )
    def test_the_advice_is_what_is_left_to_set(self, monkeypatch, settings, tasks, advice):
        learner = problem().learner(**settings)
        self.failing(monkeypatch, learner, MemoryError())
        with pytest.raises(RunError) as raised:
            learner.fit(Stream(), iterations=1, tasks_per_batch=tasks)
        assert str(raised.value).endswith(f"; it updated nothing: {advice}")

    def test_in_the_check_of_the_first_batch(self, monkeypatch):
        learner = problem().learner()

        def forward(*_):
            raise RuntimeError("CUDA error: out of memory")

        monkeypatch.setattr(learner.model, "forward", forward)
        with pytest.raises(RunError, match=f"iteration 1 ran out of memory on cpu {WORK}"):
            learner.fit(Stream(), iterations=1)

    def test_in_one_of_several_steps_in_a_row(self, monkeypatch):
        learner = problem().learner(metrics_every=4)
        monkeypatch.setattr(PrepareBatch, "__call__", fails_in_iteration(2, PrepareBatch.__call__))
        with pytest.raises(RunError, match=f"iteration 3 ran out of memory on cpu {WORK}: "):
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
        ("plugins", "tasks", "advice"),
        [
            (
                (),
                10,
                "use fewer tasks at a time, MetaLearner.evaluate(tasks_per_batch=5) "
                "or runtime.chunk_size=5",
            ),
            (
                ("gradient-sharing",),
                10,
                "use fewer tasks at a time, MetaLearner.evaluate(tasks_per_batch=5)",
            ),
            ((), 1, "use a smaller model, or fewer examples in a task"),
        ],
    )
    def test_in_evaluation(self, monkeypatch, plugins, tasks, advice):
        learner = problem().learner(plugins=plugins)
        self.failing(monkeypatch, learner, MemoryError())
        with pytest.raises(RunError) as raised:
            learner.evaluate(Stream(), num_tasks=20, tasks_per_batch=tasks, inner_steps=1)
        work = f"{tasks} task{'s' * (tasks > 1)} of 1 inner step"
        said = f"evaluation ran out of memory on cpu with {work} at a time: {advice}"
        assert str(raised.value) == said

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
            rf"iteration 2 {asked} with 400 tasks of 3 inner steps; it updated nothing: "
            "use runtime.checkpoint_steps=1, or runtime.chunk_size=200",
            training,
        )
        assert re.fullmatch(
            rf"evaluation {asked} with 800 tasks of 3 inner steps at a time: use fewer .*",
            evaluation,
        )
        assert after == "True 2"


BOUNDED = """
import resource
import torch
from metaplug import MetaLearner, RunError, TaskBatch
from metaplug.models import Mlp

torch.set_num_threads(1)
model = Mlp((8,), 1, hidden=[200, 200])
learner = MetaLearner(
    model, kind="regression", inner_steps=3, inner_lr=0.01, task_batching="vectorized"
)

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
            lambda batch, *rest, own=own: sizes.append(batch.num_tasks) or own(batch, *rest),
        )
        learner.evaluate(Stream(), num_tasks=17)
    assert sizes == [16, 1, 3, 3, 3, 3, 3, 2, 16, 1]


class TestOnTheCommandLine:
    TINY = (
        "--tasks sinusoid --model mlp --shots 3 --inner-steps 2 --inner-lr 0.01 "
        "--tasks-per-batch 8 --iterations 4 --device cpu --set training.validate_every=2 "
        "--set runtime.threads=1"
    )

    @pytest.fixture(autouse=True)
    def in_an_empty_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def run(self, capfd, *arguments):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *self.TINY.split()])
        return stopped.value.code, capfd.readouterr().err.splitlines()

    def test_the_peak_of_the_first_step_is_said_once(self, capfd):
        status, lines = self.run(capfd, "train", "--name", "mine")
        assert status == 0
        said = r"memory: \d+(\.\d)? [MG]iB at the peak of the first step, of the whole process"
        assert [bool(re.fullmatch(said, line)) for line in lines[:4]] == [False] * 2 + [True, False]
        assert sum("memory" in line for line in lines) == 1

    def test_nothing_is_said_where_the_peak_is_not_known(self, capfd, monkeypatch):
        monkeypatch.setattr("metaplug.report.terminal.peak_memory", lambda device: None)
        status, lines = self.run(capfd, "train", "--name", "mine")
        assert (status, [line for line in lines if "memory" in line]) == (0, [])

    def test_memory_that_runs_out_is_one_line_and_keeps_the_last_checkpoint(
        self, capfd, monkeypatch
    ):
        monkeypatch.setattr(PrepareBatch, "__call__", fails_in_iteration(3, PrepareBatch.__call__))
        status, lines = self.run(capfd, "train", "--name", "mine")
        assert status == 1
        assert lines[-1] == (
            f"metaplug: iteration 4 ran out of memory on cpu {WORK}: "
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
