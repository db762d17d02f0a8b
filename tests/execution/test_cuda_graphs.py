"""Captured steps with a stand-in for CUDA graphs: the engine's own numbers, what may be kept of
them, and what is refused.

The graphs themselves are tested in tests/cuda/test_captured.py.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from support import hook_plugins, plugins
from torch import nn

from metaplug import RequestError
from metaplug.execution import cuda_graphs as captured
from metaplug.execution.cuda_graphs import WARM_UP, Capture, CudaGraphs, capturing
from metaplug.execution.traced import PATIENCE
from metaplug.testing import Stream, assert_close, found, problem


class Recorder:
    """Replays by running the function. As in a pool of memory that graphs share, a replay leaves
    nothing of what others gave."""

    def __init__(self):
        self.recordings, self.replayed = [], 0

    def __call__(self, function, inputs):
        outputs = [output.clone() for output in function(*inputs)]
        self.recordings.append(outputs)

        def replay():
            self.replayed += 1
            new = function(*inputs)
            for recording in self.recordings:
                for output in recording:
                    output.fill_(float("nan"))
            for output, value in zip(outputs, new, strict=True):
                output.copy_(value)

        return replay, outputs


def caught(learner, recorder, **options):
    """The learner, its steps captured by a stand-in."""
    learner.engine.derivation = capturing(
        learner.engine, record=recorder, **{"compiles": False, **options}
    )
    return learner


# The engine's own numbers.


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("conv4", "gradient-sharing"),
        *(("tied", name) for name in (None, "gradient-sharing", "meta-sgd", "reptile")),
    ],
)
def test_a_replay_gives_the_meta_gradients_of_the_engine(model, name):
    case, recorder = problem(model), Recorder()
    plain, ours = (case.learner(plugins=[plugins.make(name)] if name else []) for _ in range(2))
    caught(ours, recorder)
    expected, _, actual = found(plain, case.batch), found(ours, case.batch), found(ours, case.batch)
    assert (len(recorder.recordings), recorder.replayed) == (1, 2)
    assert_close(actual.gradients, dict(expected.gradients))
    assert_close(actual.outer_loss, expected.outer_loss)
    assert_close(actual.losses, expected.losses)
    for plugin, kept in expected.statistics.items():
        assert_close(dict(actual.statistics[plugin]), dict(kept))


@pytest.mark.parametrize(
    "parts", [hook_plugins.ALL, hook_plugins.ZERO], ids=["second order", "order 0"]
)
def test_a_replay_starts_from_the_task_parameters_of_now(parts):
    case, recorder = problem(), Recorder()
    plain, ours = (case.learner(plugins=hook_plugins.chain(parts)) for _ in range(2))
    caught(ours, recorder)
    for _ in range(3):
        assert_close(
            dict(found(ours, case.batch).gradients), dict(found(plain, case.batch).gradients)
        )
        with torch.no_grad():
            for learner in (plain, ours):
                for parameter in learner.engine.meta_parameters.values():
                    parameter.add_(0.05)
    assert (len(recorder.recordings), recorder.replayed) == (1, 3)


@pytest.mark.parametrize("preset", ["maml", "maml++", "fomaml"])
def test_a_captured_run_is_the_uncaptured_run(preset):
    """Weights, plugins' parameters and statistics are copied in at every step; what plugins commit
    outlives the replays that follow."""
    case, recorder = problem("batch-norm"), Recorder()
    plain, ours = (case.learner(preset=preset, plugins=["gradient-sharing"]) for _ in range(2))
    histories = [
        learner.fit(Stream("batch-norm"), iterations=6, tasks_per_batch=3)
        for learner in (plain, caught(ours, recorder))
    ]
    assert ours.engine.derivation.refusal is None
    assert recorder.replayed == 6
    assert_close(
        dict(ours.model.state_dict()), dict(plain.model.state_dict()), rtol=1e-6, atol=1e-8
    )  # Adam magnifies rounding
    for one, other in zip(ours.chain.plugins, plain.chain.plugins, strict=True):
        assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=1e-6, atol=1e-8)
    losses = [[record.step.outer_loss for record in history.records] for history in histories]
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)


def test_what_a_step_gave_may_be_kept_and_other_forms_are_recorded_anew():
    case, other, recorder = problem(), problem(tasks=5, seed=1), Recorder()
    learner = caught(case.learner(plugins=["gradient-sharing"]), recorder)
    first = found(learner, case.batch)
    kept = {name: gradient.clone() for name, gradient in first.gradients.items()}
    second, again = found(learner, other.batch), found(learner, case.batch)
    assert len(recorder.recordings) == 2
    assert_close(first.gradients, kept, rtol=0, atol=0)
    assert_close(again.gradients, kept, rtol=0, atol=0)
    assert_close(
        second.gradients,
        dict(found(case.learner(plugins=["gradient-sharing"]), other.batch).gradients),
    )
    assert all(
        bool(torch.isfinite(kept).all()) for kept in first.statistics["gradient-sharing"].values()
    )


# When, and what is refused.


def test_patience_counts_steps_of_one_form_in_a_row():
    case, recorder = problem(steps=1), Recorder()
    learner = caught(case.learner(), recorder, patience=PATIENCE)
    learner.fit(Stream(), iterations=PATIENCE - 1, tasks_per_batch=2)
    learner.fit(Stream(), iterations=1, tasks_per_batch=3)
    learner.fit(Stream(), iterations=PATIENCE, tasks_per_batch=2)
    assert not recorder.recordings
    learner.fit(Stream(), iterations=1, tasks_per_batch=2)
    assert (len(recorder.recordings), recorder.replayed) == (1, 1)
    learner.fit(Stream(), iterations=1, tasks_per_batch=3)
    learner.fit(Stream(), iterations=1, tasks_per_batch=2)
    assert (len(recorder.recordings), recorder.replayed) == (1, 2)


def with_dropout():
    case = problem("mlp", dtype=torch.float64)
    case.model.insert(2, nn.Dropout(0.5))
    return case


def test_random_numbers_are_refused_and_training_goes_on_uncaptured():
    case, recorder = with_dropout(), Recorder()
    plain, ours = case.learner(), caught(case.learner(), recorder)
    with pytest.warns(UserWarning) as said:
        ours.fit(Stream(), iterations=2, tasks_per_batch=2)
    plain.fit(Stream(), iterations=2, tasks_per_batch=2)
    assert [str(warning.message) for warning in said] == [
        "steps are not captured in this form, and go on uncaptured: RuntimeError: the step draws "
        "random numbers ('aten.bernoulli.p'), "
        "which a captured step does not: leave capture out, or the layer or plugin that draws them"
    ]
    assert not recorder.recordings
    assert all(
        torch.equal(one, other)
        for one, other in zip(ours.model.parameters(), plain.model.parameters(), strict=True)
    )


def test_a_recording_that_fails_is_said_once_and_training_goes_on():
    def failing(function, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\n(details)")

    case = problem()
    plain, ours = case.learner(), caught(case.learner(), failing)
    with pytest.warns(UserWarning) as said:
        ours.fit(Stream(), iterations=2, tasks_per_batch=2)
    plain.fit(Stream(), iterations=2, tasks_per_batch=2)
    assert [str(warning.message) for warning in said] == [
        "steps are not captured in this form, and go on uncaptured: RuntimeError: operation not "
        "permitted when stream is capturing (details)"
    ]
    assert all(
        torch.equal(one, other)
        for one, other in zip(ours.model.parameters(), plain.model.parameters(), strict=True)
    )


def test_compiled_steps_are_captured_at_once_and_go_on_compiled_where_they_cannot_be(monkeypatch):
    def compiling(graph, inputs):
        assert all(tensor.is_contiguous() for tensor in inputs)

        def function(*tensors):
            calls.append(len(tensors))
            return graph(*tensors)

        return function

    monkeypatch.setattr(captured, "inductor", compiling)
    for case, refused in ((problem(), False), (with_dropout(), True)):
        calls, recorder = [], Recorder()
        learner = caught(case.learner(), recorder, compiles=True, patience=PATIENCE)
        with (
            pytest.warns(UserWarning, match="^steps are not captured, .*aten.bernoulli")
            if refused
            else contextlib.nullcontext()
        ):
            learner.fit(Stream(), iterations=2, tasks_per_batch=2)
        assert learner.engine.derivation.refusal is None
        assert (learner.engine.derivation.compile_graph.refusal is not None) == refused
        assert (recorder.replayed, len(calls)) == ((0, 2) if refused else (2, 3))
        # A further form is not tried again, and not warned of again.
        learner.fit(Stream(), iterations=1, tasks_per_batch=3)


def test_what_a_replay_would_not_see_change_is_refused():
    graph = torch.fx.symbolic_trace(lambda x, y: (x, y))
    with pytest.raises(RuntimeError) as error:
        Capture(Recorder())(graph, [torch.zeros(1), torch.zeros(1, device="meta")])
    assert (
        str(error.value)
        == "what the step reads is on several devices ('cpu', 'meta'): make a plugin's on "
        "context.device"
    )


def test_capture_is_for_cuda_and_auto_is_never_refused():
    with pytest.raises(RequestError) as error:
        problem().learner(capture=True)
    assert str(error.value) == (
        "capture is for steps on a CUDA device, but the model is on cpu: leave it out, or give "
        "'auto', which does nothing there"
    )
    with pytest.raises(
        RequestError, match=r"^unknown capture 'always': give True, False or 'auto'$"
    ):
        problem().learner(capture="always")
    for options in ({"chunk_size": 2}, {"checkpoint_steps": 1}):
        with pytest.raises(RequestError) as error:
            problem().learner(capture=True, **options)
        assert (
            str(error.value)
            == "a captured step decides itself what it keeps: leave capture out, or "
            "checkpoint_steps and chunk_size"
        )
        problem().learner(capture="auto", **options)
    assert problem().learner(capture="auto").engine.derivation is None


# How torch is called.


class Calls(list):
    """Stands in for torch.cuda, and notes what is called on it."""

    def __init__(self, monkeypatch):
        self.mode, self.current, self.broken = (
            0,
            SimpleNamespace(wait_stream=lambda _: self.append("main waits")),
            False,
        )
        side = SimpleNamespace(wait_stream=lambda _: self.append("side waits"))
        fakes = {
            "graph_pool_handle": lambda: (0, 7),
            "Stream": lambda device: side,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.append("replay")),
            "device": lambda device: contextlib.nullcontext(),
            "stream": self.noted("side stream"),
            "current_stream": lambda: self.current,
            "graph": self.graph,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        self.side = side

    def noted(self, name):
        @contextlib.contextmanager
        def context(*_):
            self.append(f"into {name}")
            try:
                yield
            finally:
                self.append(f"out of {name}")

        return context

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        assert (pool, stream, capture_error_mode) == ((0, 7), self.side, "thread_local")
        with self.noted("graph")():
            try:
                yield
            finally:
                if self.broken:
                    raise RuntimeError("operation failed due to a previous error during capture")


def test_a_graph_is_recorded_as_torch_prescribes(monkeypatch):
    calls = Calls(monkeypatch)

    def function(x):
        calls.append(f"run in mode {calls.mode}")
        return [x + 1]

    graphs = CudaGraphs(torch.device("cuda"))
    for _ in range(2):  # with the same pool and stream
        replay, outputs = graphs(function, [torch.zeros(2)])
        assert torch.equal(outputs[0], torch.ones(2))
        replay()
        runs = [
            *["run in mode 0"] * (WARM_UP - 1),
            "run in mode error",
            "into graph",
            "run in mode 0",
            "out of graph",
        ]
        assert calls == [
            "side waits",
            "into side stream",
            *runs,
            "out of side stream",
            "main waits",
            "replay",
        ]
        calls.clear()


def test_what_waits_is_refused_before_and_what_breaks_a_recording_is_told(monkeypatch):
    calls = Calls(monkeypatch)

    def waits(x):
        if calls.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return [x]

    def breaks(x):
        if calls.broken:
            raise RuntimeError("what broke it")
        if calls.mode == "error":
            calls.broken = True
        return [x]

    for function, text in (
        (waits, "called a synchronizing CUDA operation"),
        (breaks, "what broke it"),
    ):
        with pytest.raises(RuntimeError, match=f"^{text}$"):
            CudaGraphs(torch.device("cuda"))(function, [torch.zeros(2)])
        assert (calls.mode, calls[-1]) == (0, "out of side stream")
        assert ("into graph" in calls) == (function is breaks)
