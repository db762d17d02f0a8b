"""Meta-gradients derived in chunks, or by a traced and compiled step: the engine's own numbers,
with every plugin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import plugins
from torch import nn

from metaplug import Plugin, RequestError, RunError, hookimpl
from metaplug.bench.meters import torch_memory
from metaplug.execution import traced as traced_steps
from metaplug.execution.traced import CompiledDerivation
from metaplug.testing import CLAUSES, FIRST_PARTY, Stream, assert_close, found, problem
from metaplug.testing import derivations as clauses
from metaplug.testing.clauses import Subject
from metaplug.testing.strategies import problems

APART = [name for name in plugins.NAMES if name not in (*plugins.COUPLING, *plugins.DRAWING)]
"""Plugins that do not couple tasks, and draw no numbers that follow a task's place."""


# Chunks.


@pytest.mark.parametrize("name", [None, *APART])
@settings(max_examples=3)
@given(
    problems(("batch-norm", "conv4", "max-pool"), tasks=(1, 6), steps=(0, 3), lrs=(0.01, 0.3)),
    st.integers(1, 7),
)
def test_chunks_give_the_meta_gradients_of_the_whole_batch(name, case, size):
    if name == "per-step-batch-norm" and (
        case.steps == 0
        or not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in case.model)
    ):
        return
    whole, parts = (
        case.learner(
            plugins=[plugins.make(name)] if name else [],
            chunk_size=chunk,
            task_batching="vectorized",
        )
        for chunk in (None, size)
    )
    ours, theirs = found(parts, case.batch), found(whole, case.batch)
    assert_close(ours.gradients, dict(theirs.gradients), rtol=1e-7, atol=1e-9)
    assert_close(ours.outer_loss, theirs.outer_loss, rtol=1e-12, atol=1e-14)
    for plugin, kept in theirs.statistics.items():
        # Shares are kept in float32.
        assert_close(dict(ours.statistics[plugin]), dict(kept), rtol=1e-6, atol=1e-7)


def test_chunks_take_the_memory_of_their_tasks():
    case = problem("conv4", tasks=16, steps=3)
    peaks = {}
    for size in (None, 2):
        learner = case.learner(chunk_size=size, task_batching="vectorized")
        learner.meta_gradients(case.batch)
        peaks[size] = torch_memory(lambda learner=learner: learner.meta_gradients(case.batch))[0]
    assert peaks[2] < 0.35 * peaks[None]


def test_training_in_chunks_goes_on_as_in_one():
    case = problem("conv4", steps=2)
    learners = [case.learner(preset="maml++", chunk_size=size) for size in (None, 2)]
    for learner in learners:
        learner.fit(Stream("conv4"), iterations=3, tasks_per_batch=5)
    assert_close(
        dict(learners[1].model.state_dict()),
        dict(learners[0].model.state_dict()),
        rtol=1e-6,
        atol=1e-7,
    )


def test_chunks_are_refused_where_a_plugin_couples_tasks():
    with pytest.raises(RequestError) as error:
        problem().learner(plugins=["gradient-sharing"], chunk_size=2)
    assert str(error.value) == (
        "chunk_size = 2 takes a few tasks at a time, but plugin 'gradient-sharing' couples all "
        "tasks of a batch: "
        "leave one of the two out, or use checkpoint_steps, which saves memory with every plugin"
    )
    with pytest.raises(
        RequestError,
        match=r"^chunk_size = 0: give at least 1, or None to take all tasks of a batch at once$",
    ):
        problem().learner(chunk_size=0)


# Compiled steps: the trace, run as it was recorded.


def as_recorded(graph, _):
    return graph


def traced(learner):
    """A learner whose steps are traced, and run as recorded: everything but Inductor's own part."""
    learner.engine.derivation = CompiledDerivation(learner.engine, as_recorded)
    return learner


def assert_a_trace_is_the_engine(case, name):
    chain = [[plugins.make(name)] if name else [] for _ in range(2)]
    plain, ours = case.learner(plugins=chain[0]), traced(case.learner(plugins=chain[1]))
    expected, actual = found(plain, case.batch), found(ours, case.batch)
    assert ours.engine.derivation.refusal is None
    assert_close(actual.gradients, dict(expected.gradients), rtol=1e-8, atol=1e-10)
    assert_close(actual.outer_loss, expected.outer_loss, rtol=1e-12, atol=1e-14)
    for plugin, kept in expected.statistics.items():
        assert_close(dict(actual.statistics[plugin]), dict(kept), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", plugins.NAMES)
def test_every_plugin_keeps_the_clause_on_traces_and_is_not_refused(name, monkeypatch):
    """Over three iterations, its meta-parameters moved; a plugin of others may be refused."""
    made = []

    class Seen(CompiledDerivation):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(clauses, "CompiledDerivation", Seen)
    CLAUSES["traced-equals-eager"].hold(Subject(name, FIRST_PARTY[name], models=("batch-norm",)))
    assert [trace.refusal for trace in made] == [None]


@pytest.mark.parametrize("model", ["conv4", "layer-norm", "tied"])
def test_a_trace_gives_the_meta_gradients_of_the_engine_for_other_models(model):
    assert_a_trace_is_the_engine(problem(model, tasks=2, steps=2), "gradient-sharing")


@pytest.mark.slow  # a trace takes seconds
@pytest.mark.parametrize("name", [None, *plugins.NAMES])
@settings(max_examples=2)
@given(
    problems(
        ("batch-norm", "conv4", "layer-norm", "tied"), tasks=(1, 3), steps=(1, 2), lrs=(0.01, 0.3)
    )
)
def test_a_trace_gives_the_meta_gradients_of_the_engine(name, case):
    if name == "per-step-batch-norm" and not any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in case.model.modules()
    ):
        return
    assert_a_trace_is_the_engine(case, name)


@pytest.mark.parametrize("preset", ["maml", "maml++", "reptile"])
def test_a_traced_run_is_the_untraced_run(preset):
    """Weights, plugins' parameters and statistics, the iteration and outer weights go in anew at
    every step; changed orders are traced anew."""
    case = problem("batch-norm", steps=2)
    plain, ours = (case.learner(preset=preset, plugins=["gradient-sharing"]) for _ in range(2))
    for learner in (plain, traced(ours)):
        learner.fit(Stream("batch-norm"), iterations=5, tasks_per_batch=3)
    assert ours.engine.derivation.refusal is None
    assert_close(
        dict(ours.model.state_dict()), dict(plain.model.state_dict()), rtol=1e-6, atol=1e-8
    )
    for one, other in zip(ours.chain.plugins, plain.chain.plugins, strict=True):
        assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=1e-6, atol=1e-8)


def test_after_a_trace_the_engine_has_its_own_tensors_again():
    case = problem("batch-norm")
    learner = traced(case.learner(plugins=["gradient-sharing", "meta-sgd"]))
    before = {name: id(parameter) for name, parameter in learner.engine.meta_parameters.items()}
    learner.meta_gradients(case.batch)
    assert {
        name: id(parameter) for name, parameter in learner.engine.meta_parameters.items()
    } == before
    assert all(
        isinstance(parameter, nn.Parameter)
        for plugin in learner.chain.plugins
        for parameter in plugin.parameters()
    )
    assert learner.evaluate(Stream("batch-norm", split="test"), num_tasks=2).num_tasks == 2


def test_maml_plus_plus_with_its_schedules_is_traced_twice_and_runs_as_untraced():
    """First order with a loss at every step, then second order with that of the last."""
    case, schedules = problem("batch-norm", steps=2), []
    plain, ours = (
        case.learner(
            preset="maml++",
            plugins=["gradient-noise"],
        )
        for _ in range(2)
    )
    traced(ours)
    weights = ours.engine.outer.weights
    ours.engine.outer.weights = lambda *now: schedules.append(weights(*now)) or schedules[-1]
    histories = [
        learner.fit(Stream("batch-norm"), iterations=200, tasks_per_batch=2)
        for learner in (plain, ours)
    ]
    assert len({tuple(each.items()) for each in schedules}) > 5
    assert ours.engine.derivation.refusal is None
    assert len(ours.engine.derivation._traces) <= 3
    losses = [[record.step.outer_loss for record in history.records] for history in histories]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


class ByIteration(Plugin):
    """Computes with the iteration and the length of the run as a plugin may."""

    @hookimpl
    def transform_gradients(self, gradients, step):
        faded = 1 - step.meta_iteration / step.meta_iterations
        late = (step.meta_iteration >= 2) * 1.0
        return {name: gradient * (faded**2 + late) for name, gradient in gradients.items()}


def test_the_iteration_and_the_length_of_the_run_are_inputs_of_a_trace():
    case = problem()
    plain, ours = (
        case.learner(plugins=[ByIteration()]),
        traced(case.learner(plugins=[ByIteration()])),
    )
    for learner in (plain, ours):
        learner.fit(Stream(), iterations=4, tasks_per_batch=2, total=9)
    assert ours.engine.derivation.refusal is None
    assert len(ours.engine.derivation._traces) == 1
    assert_close(dict(ours.model.state_dict()), dict(plain.model.state_dict()), rtol=1e-9)


@pytest.mark.parametrize(
    "compute",
    [
        lambda i, total: torch.zeros(3) + i / total * 100 // 1,  # 28 where i is 29
        lambda i, total: torch.arange(3) * (i // 2),
        lambda i, total: torch.arange(3) * (i / total),
        lambda i, total: torch.arange(3) < i,
        lambda i, total: torch.ones(3) * (1 - 0.99999 ** (i + 1)),
        lambda i, total: torch.ones((), dtype=torch.float64) * ((i >= 2) / 3 + (i > 0) - (i < 9)),
        lambda i, total: torch.lerp(torch.zeros(2), torch.ones(2), i / total),
        lambda i, total: torch.where(torch.zeros(()) + i > 2, torch.ones(2), 0.1 ** -(i**0.5)),
        lambda i, total: torch.ones(2) * (i * 1103515245 % 2**31) / 2**31,
    ],
)
def test_numbers_of_the_run_round_and_promote_as_python_s_own(compute):
    class Computes(Plugin):
        @hookimpl
        def transform_gradients(self, gradients, step):
            value = compute(step.meta_iteration, step.meta_iterations)
            step.keep(f"of {value.dtype}", value.double())

    case = problem(steps=1).to(torch.float32)
    learners = [case.learner(plugins=[Computes()]) for _ in "12"]
    traced(learners[1])
    for iteration in (0, 1, 29, 58):
        plain, ours = (
            learner.engine.meta_gradients(learner.prepare_batch(case.batch), iteration, 100)
            for learner in learners
        )
        assert learners[1].engine.derivation.refusal is None
        (one,), (other,) = plain.statistics["computes"].items(), ours.statistics["computes"].items()
        assert one[0] == other[0]  # the dtype
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize(
    "decide",
    [
        lambda step: 2.0 if step.meta_iteration > 1 else 1.0,
        lambda step: float(step.meta_iteration),
        lambda step: 2.0 ** int(step.meta_iteration),
        lambda step: [1.0, 2.0][step.meta_iteration],
        lambda step: {0: 1.0}.get(step.meta_iteration, 2.0),
        lambda step: 1.0 + 1e-3 * len(f"{step.meta_iteration + 9}"),
    ],
)
def test_a_plugin_that_decides_by_the_iteration_is_named_and_training_goes_on(decide):
    class Decides(Plugin):
        @hookimpl
        def transform_gradients(self, gradients, step):
            return {name: gradient * decide(step) for name, gradient in gradients.items()}

    case = problem()
    plain, ours = case.learner(plugins=[Decides()]), traced(case.learner(plugins=[Decides()]))
    with pytest.warns(
        UserWarning,
        match=r"^steps are not compiled in this form, and go on uncompiled: .*plugin 'decides' in "
        r"transform_g",
    ) as said:
        ours.fit(Stream(), iterations=2, tasks_per_batch=2)
    assert len(said) == 1
    plain.fit(Stream(), iterations=2, tasks_per_batch=2)
    assert all(
        torch.equal(one, other)
        for one, other in zip(ours.model.parameters(), plain.model.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "of", [lambda step: step.meta_iteration, lambda step: step.losses.detach().sum()]
)
def test_what_a_hook_remembers_of_a_trace_is_forgotten_and_named(of):
    class Remembers(Plugin):
        @hookimpl
        def transform_gradients(self, gradients, step):
            if step.index == 0:
                self.last = of(step)

        @hookimpl
        def end_meta_step(self):
            return {"last": float(self.last)}

    case = problem()
    plain, ours = case.learner(plugins=[Remembers()]), traced(case.learner(plugins=[Remembers()]))
    with pytest.warns(UserWarning, match="'last' of plugin 'remembers' changes from step to step"):
        histories = [
            learner.fit(Stream(), iterations=3, tasks_per_batch=2) for learner in (ours, plain)
        ]
    one, other = ([record.step for record in history.records] for history in histories)
    assert one == other


def test_a_plugin_that_counts_is_refused_before_it_is_compiled():
    class Counts(Plugin):
        calls = 0

        @hookimpl
        def transform_gradients(self, gradients):
            self.calls += 1
            return {name: gradient / self.calls for name, gradient in gradients.items()}

    learner, compiled = problem().learner(plugins=[Counts()]), []
    learner.engine.derivation = CompiledDerivation(
        learner.engine, lambda graph, _: compiled.append(graph) or graph
    )
    with pytest.warns(UserWarning, match="a number that a plugin keeps changes from step to step"):
        learner.fit(Stream(), iterations=3, tasks_per_batch=2)
    assert not compiled
    assert learner.chain.plugins[0].calls == 6


def test_a_form_that_has_no_trace_leaves_the_others_compiled():
    class NoThree(Plugin):
        @hookimpl
        def transform_inner_losses(self, losses):
            return losses + 0 * float(losses.detach().sum()) if len(losses) == 3 else None

    learner = traced(problem().learner(plugins=[NoThree()]))
    with pytest.warns(UserWarning, match="plugin 'no-three' in transform_inner_losses") as said:
        for tasks in (2, 3, 2, 3, 4):
            learner.meta_gradients(problem(tasks=tasks).batch)
    assert len(said) == 1
    traces = learner.engine.derivation._traces.values()
    assert [trace.uses for trace in traces] == [2, 1]


class OtherBuffers(Plugin):
    """Its buffers come to be, grow, change their dtype and part in the course of a run."""

    @hookimpl
    def setup(self):
        start = torch.zeros(1, dtype=torch.float64)
        self.register_buffer("late", None)
        self.register_buffer("history", start)
        self.register_buffer("once_the_same", start)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @hookimpl
    def transform_gradients(self, gradients, step):
        mean = self.history.sum() / len(self.history) + self.once_the_same / 3 + self.count // 2
        late = 0 if self.late is None else self.late
        return {name: gradient * (1 + mean + late) for name, gradient in gradients.items()}

    @hookimpl
    def transform_inner_losses(self, losses, step):
        step.keep("loss", losses.mean())

    @hookimpl
    def commit(self, kept):
        self.late, self.once_the_same = kept["loss"], kept["loss"].reshape(1)
        if len(self.history) < 3:
            self.history = torch.cat([self.history, self.once_the_same])
        self.count = self.count + kept["loss"]


def test_buffers_of_another_form_are_traced_anew():
    learners = [problem().learner(plugins=[OtherBuffers()], meta_optimizer="sgd") for _ in "12"]
    for learner in (learners[0], traced(learners[1])):
        learner.fit(Stream(), iterations=5, tasks_per_batch=2)
    derivation = learners[1].engine.derivation
    assert derivation.refusal is None
    assert [trace.uses for trace in derivation._traces.values()] == [1, 1, 3]
    assert_close(*(dict(learner.model.state_dict()) for learner in reversed(learners)))


def test_tasks_may_be_laid_out_in_another_way():
    batch, seen = problem().batch, []
    learner = problem().learner()
    learner.engine.derivation = CompiledDerivation(
        learner.engine, lambda graph, _: lambda *inputs: seen.append(inputs) or graph(*inputs)
    )
    turned = batch.map(lambda each: each.mT.contiguous().mT)
    for each in (batch, turned):
        learner.meta_gradients(each)
    assert not turned.support_x.is_contiguous()
    assert {tensor.stride() for tensor in seen[0]} == {tensor.stride() for tensor in seen[1]}


def test_a_plugin_that_branches_on_state_is_named():
    class Branches(Plugin):
        @hookimpl
        def transform_gradients(self, gradients):
            return (
                {name: gradient * 2 for name, gradient in gradients.items()}
                if bool(next(iter(gradients.values())).sum() > 0)
                else None
            )

    case = problem()
    learner = traced(case.learner(plugins=[Branches()]))
    with pytest.warns(UserWarning, match="plugin 'branches' in transform_gradients"):
        learner.meta_gradients(case.batch)


def test_batches_of_other_forms_are_traced_anew_up_to_a_number(monkeypatch):
    monkeypatch.setattr(traced_steps, "MOST_TRACES", most := 3)
    case = problem()
    learner = traced(case.learner())
    for tasks in range(1, most + 1):
        learner.meta_gradients(problem(tasks=tasks).batch)
    assert len(learner.engine.derivation._traces) == most
    with pytest.warns(UserWarning, match=f"batches of more than {most} forms") as said:
        for tasks in (*range(most + 1, 2 * most + 3), 1):
            learner.meta_gradients(problem(tasks=tasks).batch)
    assert len(said) == 1
    assert len(learner.engine.derivation._refused) == most
    traces = learner.engine.derivation._traces.values()
    assert [trace.uses for trace in traces] == [2] + [1] * (most - 1)


class MakesNan(Plugin):
    @hookimpl
    def transform_inner_losses(self, losses):
        return losses * float("nan")


def test_a_divergence_is_named_as_without_a_trace():
    texts = []
    for wrap in (lambda learner: learner, traced):
        with pytest.raises(RunError) as error:
            wrap(problem().learner(plugins=[MakesNan()])).fit(
                Stream(), iterations=1, tasks_per_batch=2
            )
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    assert "plugin 'makes-nan' in transform_inner_losses" in texts[0]


def test_compile_goes_with_neither_chunks_nor_checkpoints():
    for options in ({"chunk_size": 2}, {"checkpoint_steps": 1}):
        with pytest.raises(
            RequestError,
            match=r"^a compiled step decides itself what it keeps: leave compile out, or",
        ):
            problem().learner(compile=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch-norm", "layer-norm"])
def test_inductor_gives_the_meta_gradients_of_the_engine_in_float64(name):
    case = problem(name, steps=2)
    chain = ["gradient-sharing", "per-step-learning-rates"]
    plain, ours = (
        case.learner(plugins=list(chain), compile=compiles) for compiles in (False, True)
    )
    expected, actual = found(plain, case.batch), found(ours, case.batch)
    assert ours.engine.derivation.refusal is None
    assert_close(actual.gradients, dict(expected.gradients), rtol=1e-10, atol=1e-11)
    for plugin, kept in expected.statistics.items():
        assert_close(dict(actual.statistics[plugin]), dict(kept), rtol=1e-10, atol=1e-11)
