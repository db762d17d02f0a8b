"""NaN and Inf stop training, or skip a batch: who made it is named, nothing else changes. Inner
loops that diverge are told."""

import copy
import dataclasses
import io
import itertools
import json
import math
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.ranks import on_ranks
from support.tiny_runs import assert_same, assert_same_run, stop_after, tiny
from torch import nn

from metaplug import MetaLearner, Plugin, RequestError, RunError, TaskBatch, checkpoint, hookimpl
from metaplug.errors import RankError
from metaplug.execution.engine import SKIPS_IN_A_ROW
from metaplug.execution.traced import CompiledDerivation
from metaplug.experiments.build import build
from metaplug.experiments.runs import read_metrics, train
from metaplug.report.figures import run_figure
from metaplug.report.terminal import TrainingProgress, skipped_line
from metaplug.testing import Stream, problem

BAD = 2
"""The iteration in which something is wrong, as the code counts."""
SAID = BAD + 1
"""The same iteration as people count."""


def one_element(tensor, value, task):
    """The tensor with one element replaced, in the row of a task where there is one."""
    changed = tensor.clone()
    changed[min(task, len(tensor) - 1)].reshape(-1)[:1] = value
    return changed


class Inject(Plugin):
    """Puts one value into one element of one task, in one hook, iteration and inner step."""

    class Config(Plugin.Config):
        hook: str
        inf: bool = False
        step: int = 1
        iterations: tuple[int, ...] = (BAD,)

    @property
    def value(self):
        return math.inf if self.config.inf else math.nan

    asked = staticmethod(lambda: None)
    """The iteration, for the hooks that are not told."""

    def put(self, hook, value, iteration, step=None):
        fits = (
            self.config.hook == hook
            and iteration in self.config.iterations
            and (step is None or step.index == self.config.step)
        )
        if not fits:
            return None
        if isinstance(value, torch.Tensor):
            return one_element(value, self.value, 1)
        return {
            name: one_element(tensor, self.value, min(1, len(tensor) - 1))
            if name == "2.bias"
            else tensor
            for name, tensor in value.items()
        }

    @hookimpl
    def transform_tasks(self, batch, iteration):
        x = self.put("transform_tasks", batch.query_x, iteration)
        return None if x is None else TaskBatch(batch.support_x, batch.support_y, x, batch.query_y)

    @hookimpl
    def transform_parameters(self, parameters, step):
        return self.put("transform_parameters", parameters, step.meta_iteration, step)

    @hookimpl
    def transform_inner_losses(self, losses, step):
        return self.put("transform_inner_losses", losses, step.meta_iteration, step)

    @hookimpl
    def transform_gradients(self, gradients, step):
        kept = self.put(
            "keep", {"2.bias": gradients["2.bias"].detach().mean(0)}, step.meta_iteration, step
        )
        step.keep("mean", gradients["2.bias"].detach().mean(0) if kept is None else kept["2.bias"])
        return self.put("transform_gradients", gradients, step.meta_iteration, step)

    @hookimpl
    def transform_learning_rates(self, learning_rates, step):
        if (
            self.config.hook != "transform_learning_rates"
            or step.meta_iteration not in self.config.iterations
            or step.index != self.config.step
        ):
            return None
        return {**learning_rates, "2.bias": learning_rates["2.bias"] * self.value}

    @hookimpl
    def transform_outer_losses(self, losses, outcome):
        kept = self.put("keep of an outcome", losses.detach(), self.asked())
        outcome.keep("losses", losses.detach() if kept is None else kept)
        return self.put("transform_outer_losses", losses, self.asked())

    @hookimpl
    def compute_meta_gradients(self, outcome):
        if self.config.hook != "compute_meta_gradients":
            return None
        means = {
            name: weights.detach().mean(0) for name, weights in outcome.adapted_parameters.items()
        }
        return self.put("compute_meta_gradients", means, self.asked()) or means

    @hookimpl
    def transform_meta_gradients(self, gradients, iteration):
        return self.put("transform_meta_gradients", gradients, iteration)

    @hookimpl
    def commit(self, kept):
        self.committed = getattr(self, "committed", 0) + 1


class Holed(Stream):
    """A stream with a value in one element of a field, in the task of an index of some
    iterations."""

    def __init__(self, field="query_x", value=math.nan, iterations=(BAD,), index=1):
        super().__init__()
        self.field, self.value, self.iterations, self.index = field, value, iterations, index

    def batch(self, iteration, indices):
        batch = super().batch(iteration, indices)
        if iteration in self.iterations and self.index in indices:
            getattr(batch, self.field)[list(indices).index(self.index), 0, 0] = self.value
        return batch


class Holed32(Holed):
    """The same in float32."""

    def batch(self, iteration, indices):
        batch = super().batch(iteration, indices)
        return TaskBatch(
            batch.support_x.float(), batch.support_y, batch.query_x.float(), batch.query_y
        )


def state(learner):
    return copy.deepcopy(
        {key: value for key, value in learner.state_dict().items() if key != "trained_on"}
    )


def first_bad(learner, stream, iterations=5, tasks=3):
    """The text that training stops with in iteration BAD, before which all went well, and after
    which all is as it was before."""
    good = []
    with pytest.raises(RunError) as error:
        learner.fit(stream, iterations=iterations, tasks_per_batch=tasks, on_record=good.append)
    assert [record.step.iteration for record in good] == list(range(1, BAD + 1))
    assert learner.iteration == BAD
    text, begun = str(error.value), f"iteration {SAID} stopped, nothing was updated: "
    assert text.startswith(begun)
    assert "\n" not in text
    return text.removeprefix(begun)


WAYS = {
    "vectorized": {"task_batching": "vectorized"},
    "sequential": {"task_batching": "sequential"},
    "first order": {"preset": "fomaml"},
    "window": {"metrics_every": 4},
    "checkpointed": {"checkpoint_steps": 1},
    "chunks": {"chunk_size": 1},
    "adam": {"task_batching": "vectorized", "inner_optimizer": "adam", "inner_lr": 0.01},
}
HOOKS = {
    "transform_tasks": (f", iteration {SAID}", "returned", "'query_x' of task 1"),
    "transform_parameters": (
        f", iteration {SAID}, inner step 1",
        "returned",
        "'2.bias' of task 1",
    ),
    "transform_inner_losses": (
        f", iteration {SAID}, inner step 1",
        "returned",
        "'its value' of task 1",
    ),
    "transform_gradients": (
        f", iteration {SAID}, inner step 1",
        "returned",
        "'2.bias' of task 1",
    ),
    "transform_learning_rates": (f", iteration {SAID}, inner step 1", "returned", "'2.bias'"),
    "keep": (f", iteration {SAID}, inner step 1", "kept", "'mean'"),
    "transform_outer_losses": ("", "returned", "'its value' of task 1"),
    "keep of an outcome": ("", "kept", "'losses'"),
    "compute_meta_gradients": (f", iteration {SAID}", "returned", "'2.bias'"),
    "transform_meta_gradients": (f", iteration {SAID}", "returned", "'2.bias'"),
}


@pytest.mark.parametrize(
    ("way", "inf"), [*((way, False) for way in WAYS), ("vectorized", True), ("window", True)]
)
@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_and_way(hook, way, inf):
    """The first plugin is named with hook, iteration, inner step, tensor and task; weights,
    optimizer, plugins are as before the step."""
    where, did, what = HOOKS[hook]
    learner, good = (
        problem().learner(plugins=[Inject(hook=hook, inf=inf)], **WAYS[way]) for _ in range(2)
    )
    for each in (learner, good):
        each.chain.plugins[-1].asked = lambda each=each: each.iteration
    good.fit(Stream(), iterations=BAD, tasks_per_batch=3)
    good.engine.total = 5
    if way == "chunks" and hook != "transform_tasks":
        what = what.replace(
            "of task 1", "of task 0"
        )  # each chunk has one task, and the first is hit already
    text = first_bad(learner, Stream())
    asked = {"keep": "transform_gradients", "keep of an outcome": "transform_outer_losses"}
    asked = asked.get(hook, hook)
    iteration = f", iteration {SAID}" if asked == "transform_outer_losses" else where
    assert text == (
        f"plugin 'inject' in {asked} (link 1 of 1{iteration}) {did} NaN or Inf in {what}; see what "
        "'inject' computes there, or leave it out"
    )
    assert_same(state(learner), state(good))


class Scaled(Plugin):
    """Gradients times a buffer, which a traced step takes as an input."""

    @hookimpl
    def setup(self, context):
        self.register_buffer("scale", torch.ones((), dtype=context.dtype))

    @hookimpl
    def transform_gradients(self, gradients, step):
        step.keep("scale", self.scale)
        return {name: gradient * self.scale for name, gradient in gradients.items()}


def test_in_a_traced_step():
    learner = problem().learner(plugins=[Scaled()])
    learner.engine.derivation = CompiledDerivation(learner.engine, lambda graph, _: graph)
    learner.fit(Stream(), iterations=BAD, tasks_per_batch=3)
    assert learner.engine.derivation.refusal is None
    learner.chain.plugins[0].scale.fill_(math.nan)
    with pytest.raises(
        RunError,
        match=r"^iteration 3 stopped, nothing was updated: plugin 'scaled' in transform_gradients "
        r"\(link 1 of 1, it",
    ):
        learner.fit(Stream(), iterations=1, tasks_per_batch=3)


class Unused(nn.Module):
    """A model with an element that no loss sees."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))

    def forward(self, x):
        return x[:, :1] + self.table[0]


@pytest.mark.parametrize("hook", ["transform_gradients", "transform_parameters"])
def test_an_element_that_does_not_reach_the_loss(hook):
    class Corner(Plugin):
        def spoil(self, values):
            table = values["table"].clone()
            table[0, 1, 2] = math.nan
            return {"table": table}

        @hookimpl
        def transform_gradients(self, gradients, step):
            return (
                self.spoil(gradients)
                if hook == "transform_gradients" and step.meta_iteration == BAD
                else None
            )

        @hookimpl
        def transform_parameters(self, parameters, step):
            return (
                self.spoil(parameters)
                if hook == "transform_parameters" and step.meta_iteration == BAD
                else None
            )

    learner = MetaLearner(Unused(), inner_lr=0.1, inner_steps=2, plugins=[Corner()])
    assert first_bad(learner, Stream()) == (
        f"plugin 'corner' in {hook} (link 1 of 1, iteration {SAID}, inner step 0) returned NaN or "
        "Inf in 'table' of task 0; "
        "see what 'corner' computes there, or leave it out"
    )


@pytest.mark.parametrize("field", ["support_x", "query_x"])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_in_the_data(field, every, value):
    text = first_bad(problem().learner(metrics_every=every), Holed(field, value))
    assert (
        text
        == f"{field} of task 1 holds NaN or Inf, on which no loss is defined: clean the data of "
        "that task"
    )


def test_in_the_weights_before():
    learner = problem().learner()
    learner.fit(Stream(), iterations=BAD, tasks_per_batch=2)
    with torch.no_grad():
        learner.model[0].bias[1] = math.inf
    before = state(learner)
    with pytest.raises(RunError) as error:
        learner.fit(Stream(), iterations=1, tasks_per_batch=2)
    assert str(error.value) == (
        "iteration 3 stopped, nothing was updated: NaN or Inf in '0.bias' stood in the "
        "meta-parameters before iteration 3; "
        "go on from a checkpoint before that"
    )
    assert_same(state(learner), before)


class Cusp(nn.Module):
    """The root of a square: finite at 0, its derivative is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        return (self.weight**2).sqrt().expand(len(x), -1)


def test_made_by_the_backward_pass_alone():
    with pytest.raises(RunError) as error:
        MetaLearner(Cusp(), inner_steps=1).fit(Stream(), iterations=1, tasks_per_batch=2)
    assert str(error.value) == (
        "iteration 1 stopped, nothing was updated: the gradient of the support loss holds NaN or "
        "Inf in 'weight' of all 2 tasks in "
        "iteration 1, inner step 0; the loss was finite: an operation of the model, or of a "
        "plugin's loss, has no finite derivative there, "
        "such as a root or norm of 0: add a small number inside it"
    )


def test_in_the_meta_gradient_of_a_plugin_alone():
    class Rooted(Plugin):
        @hookimpl
        def setup(self, context):
            self.zero = nn.Parameter(torch.zeros((), dtype=context.dtype))

        @hookimpl
        def transform_outer_losses(self, losses):
            return losses + 0 * (self.zero**2).sqrt()

    with pytest.raises(RunError) as error:
        problem().learner(plugins=[Rooted()]).fit(Stream(), iterations=1, tasks_per_batch=2)
    assert str(error.value) == (
        "iteration 1 stopped, nothing was updated: the meta-gradient holds NaN or Inf in "
        "'rooted.zero' in iteration 1; every loss on the "
        "way was finite: an operation of the model or of a plugin has no finite derivative there, "
        "such as a root or norm of 0: "
        "add a small number inside it"
    )


def test_a_norm_that_overflows_though_its_elements_do_not():
    class Large(Plugin):
        @hookimpl
        def transform_meta_gradients(self, gradients):
            return {name: torch.full_like(gradient, 1e200) for name, gradient in gradients.items()}

    with pytest.raises(RunError) as error:
        problem().learner(plugins=[Large()]).fit(Stream(), iterations=1, tasks_per_batch=2)
    assert str(error.value) == (
        "iteration 1 stopped, nothing was updated: the norm of the meta-gradient, or its square, "
        "is Inf in iteration 1, though each of its elements is "
        "finite; clip it inside the loop, or lower inner_lr"
    )


class Chokes(Plugin):
    """Fails on what is not finite."""

    @hookimpl
    def transform_gradients(self, gradients):
        if any(not gradient.isfinite().all() for gradient in gradients.values()):
            raise ValueError("not finite")


def test_a_plugin_that_fails_on_nan_is_not_who_made_it():
    learner = problem().learner(
        plugins=[Inject(hook="transform_inner_losses", inf=False, step=0), Chokes()]
    )
    assert first_bad(learner, Stream()).startswith(
        "plugin 'inject' in transform_inner_losses (link 1 of 1, iteration 3, inner step 0) "
        "returned"
    )


def test_a_factor_of_the_rate_that_is_not_finite_stops_within_a_window():
    class Factor(Plugin):
        @hookimpl
        def scale_meta_learning_rate(self, factor, iteration):
            return math.nan if iteration == BAD else None

    learner = problem().learner(plugins=[Factor()], metrics_every=4)
    good = []
    with pytest.raises(
        RunError,
        match=r"^plugin 'factor' in scale_meta_learning_rate \(link 1 of 1, iteration 3\) returned "
        r"nan, not a finite",
    ):
        learner.fit(Stream(), iterations=5, tasks_per_batch=2, on_record=good.append)
    assert (len(good), learner.iteration) == (BAD, BAD)


def test_a_figure_changes_no_number_and_is_told_once():
    class Figures(Plugin):
        @hookimpl
        def end_meta_step(self, iteration):
            return {"good": 1.0, "bad": math.nan}

    learner, plain = problem().learner(plugins=[Figures()]), problem().learner()
    with pytest.warns(UserWarning) as told:
        learner.fit(Stream(), iterations=3, tasks_per_batch=2)
    assert [str(warning.message) for warning in told] == [
        "the figure 'figures.bad' of a plugin's end_meta_step is NaN or Inf after iteration 1: it "
        "is logged as null, and as nothing is "
        "computed from it, training goes on; see what the plugin computes there"
    ]
    plain.fit(Stream(), iterations=3, tasks_per_batch=2)
    assert_same(dict(learner.model.state_dict()), dict(plain.model.state_dict()))


# Skipping.


def by_hand(learner, skipped, iterations, tasks=3):
    """What is left where the iterations in `skipped` are left out by hand."""
    for iteration in range(iterations):
        if iteration in skipped:
            learner.engine.iteration += 1
        else:
            learner.engine.meta_step(
                learner.prepare_batch(Stream().batch(iteration, range(tasks))), iterations
            )
    return learner


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    "hook", ["transform_inner_losses", "keep", "transform_meta_gradients", "data"]
)
def test_a_skipped_batch_counts_and_changes_nothing(hook, every):
    bad = (0, 2, 5)

    def make(**more):
        return problem().learner(
            plugins=["gradient-sharing", Inject(hook=hook, inf=False, iterations=bad)], **more
        )

    learner = make(metrics_every=every)
    stream = Holed(iterations=bad) if hook == "data" else Stream()
    records = learner.fit(stream, iterations=7, tasks_per_batch=3, non_finite="skip").records
    expected = by_hand(make(), bad, 7)
    for name, parameter in learner.engine.meta_parameters.items():
        assert torch.equal(parameter, expected.engine.meta_parameters[name])
    assert_same(learner.engine.optimizer.state_dict(), expected.engine.optimizer.state_dict())
    for one, other in zip(learner.chain.plugins, expected.chain.plugins, strict=True):
        assert_same(one.state_dict(), other.state_dict())
    assert learner.chain.plugins[1].committed >= 4
    assert [record.step.iteration for record in records] == list(range(1, 8))
    assert [record.step.iteration - 1 for record in records if record.step.skipped] == list(bad)
    assert (learner.skipped, learner.engine.skipped_in_a_row) == (3, 0)
    if hook == "data":
        assert (
            records[2].step.skipped
            == "query_x of task 1 holds NaN or Inf, on which no loss is defined: clean the data "
            "of that task"
        )
    else:
        assert records[2].step.skipped.startswith("plugin 'inject' in transform_")
    assert records[2].step.figures == {}


@pytest.mark.parametrize("every", [1, 4])
def test_too_many_in_a_row_stop(every):
    learner = problem().learner(metrics_every=every)
    seen = []
    with pytest.raises(RunError) as error:
        learner.fit(
            Holed(iterations=range(3, 99)),
            iterations=40,
            tasks_per_batch=2,
            non_finite="skip",
            on_record=seen.append,
        )
    assert str(error.value) == (
        "iteration 13 stopped, nothing was updated: 10 batches in a row would be skipped, which is "
        "no fault of a batch; the last because "
        "query_x of task 1 holds NaN or Inf, on which no loss is defined: clean the data of that "
        "task"
    )
    assert (len(seen), learner.iteration, learner.skipped) == (12, 12, SKIPS_IN_A_ROW - 1)


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("bad", [(2,), (0,), (3, 4)])
def test_a_batch_that_a_plugin_fails_on_is_skipped_in_windows_too(bad, every):
    learner = problem().learner(
        plugins=[Inject(hook="transform_inner_losses", inf=False, step=0, iterations=bad), Chokes()]
    )
    learner.metrics_every = every
    records = learner.fit(Stream(), iterations=8, tasks_per_batch=2, non_finite="skip").records
    assert [record.step.iteration - 1 for record in records if record.step.skipped] == list(bad)
    assert (len(records), learner.iteration) == (8, 8)


def test_the_record_of_a_skipped_batch_has_the_rate_of_its_iteration():
    learner = problem().learner(
        plugins=["cosine-meta-lr", Inject(hook="keep", inf=False, iterations=(2,))]
    )
    expected = problem().learner(plugins=["cosine-meta-lr"])
    steps, wanted = (
        [
            record.step
            for record in each.fit(
                Stream(), iterations=5, tasks_per_batch=2, non_finite="skip"
            ).records
        ]
        for each in (learner, expected)
    )
    assert steps[2].skipped
    assert [step.meta_lr for step in steps] == [step.meta_lr for step in wanted]


def test_a_parameter_without_elements_is_no_hindrance():
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.nothing = nn.Linear(4, 3), nn.Parameter(torch.zeros(0))

        def forward(self, x):
            return self.layer(x) + self.nothing.sum()

    learner = MetaLearner(Empty(), inner_lr=0.1, inner_steps=2)
    assert learner.fit(Stream(dtype=torch.float32), iterations=2, tasks_per_batch=2).records
    with pytest.raises(
        RunError,
        match=r"^iteration 5 stopped, nothing was updated: query_x of task 1 holds NaN or Inf",
    ):
        learner.fit(Holed32(iterations=(4,)), iterations=4, tasks_per_batch=2)


def test_labels_out_of_range_are_a_wrong_request_all_the_same():
    with pytest.raises(RequestError, match=r"^labels out of range: query_y has the label 9"):
        learner = problem().learner()
        stream = Stream()
        batch = stream.batch
        stream.batch = lambda iteration, indices: _relabelled(batch(iteration, indices), iteration)
        learner.fit(stream, iterations=4, tasks_per_batch=2, non_finite="skip")
    assert learner.iteration == BAD
    with pytest.raises(RequestError, match=r"^unknown non_finite 'ignore': known: 'stop', 'skip'$"):
        problem().learner().fit(Stream(), iterations=1, non_finite="ignore")


def _relabelled(batch, iteration):
    if iteration == BAD:
        batch.query_y[0, 0] = 9
    return batch


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_ranks_skip_together():
    """Task 1 is rank 1's, and each kind of fault is in it alone; with a plugin that couples tasks,
    so that the replay exchanges too."""

    def train_on(world):
        found = []
        for hook in ("data", "transform_inner_losses"):
            plugins = [
                "gradient-sharing",
                *(
                    [Inject(hook=hook, inf=False)]
                    if world.rank or hook == "data"
                    else [Inject(hook="none")]
                ),
            ]
            learner = problem().learner(plugins=plugins, world=world)
            stream = Holed() if hook == "data" else Stream()
            records = learner.fit(
                stream, iterations=4, tasks_per_batch=4, non_finite="skip"
            ).records
            found.append(
                (
                    dict(learner.model.state_dict()),
                    [record.step.skipped for record in records],
                    learner.iteration,
                )
            )
        return found

    one, other = on_ranks(train_on)
    assert_same(one, other)
    (weights, data, iteration), (_, plugin, _) = one
    assert iteration == 4
    assert data == [
        None,
        None,
        "query_x of task 1 holds NaN or Inf, on which no loss is defined: clean the data of that "
        "task",
        None,
    ]
    assert plugin[2] == (
        "plugin 'inject' in transform_inner_losses (link 1 of 1, iteration 3, inner step 1) "
        "returned NaN or Inf in 'its value' of task 3; "
        "see what 'inject' computes there, or leave it out"
    )
    alone = problem().learner(plugins=["gradient-sharing"])
    alone.fit(Holed(), iterations=4, tasks_per_batch=4, non_finite="skip")
    assert all(
        torch.allclose(weights[name], value, rtol=1e-10)
        for name, value in alone.model.state_dict().items()
    )


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_ranks_stop_together():
    def train_badly(world):
        plugins = [
            "gradient-sharing",
            Inject(hook="transform_gradients" if world.rank else "none", inf=False),
        ]
        problem().learner(plugins=plugins, world=world).fit(
            Stream(), iterations=4, tasks_per_batch=4
        )

    found, repeated = sorted(on_ranks(train_badly), key=lambda error: isinstance(error, RankError))
    assert str(found) == (
        "iteration 3 stopped, nothing was updated: plugin 'inject' in transform_gradients (link 2 "
        "of 2, iteration 3, inner step 1) "
        "returned NaN or Inf in '2.bias' of task 3; see what 'inject' computes there, or leave it "
        "out"
    )
    assert str(repeated) == f"rank 1 ended the run: {found}"


@pytest.fixture
def holed(monkeypatch):
    """Runs whose training tasks have a hole in these iterations."""
    holes = [1, 6, 7]

    class Streams:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def batch(self, iteration, indices):
            batch = self.inner.batch(iteration, indices)
            if iteration in holes:
                batch.support_x[0, 0] = math.nan
            return batch

    def build_holed(config, **more):
        experiment = build(config, **more)
        tasks = experiment.tasks
        return dataclasses.replace(
            experiment,
            tasks=SimpleNamespace(
                train=Streams(tasks.train), val=tasks.val, test=tasks.test, resolved=dict
            ),
        )

    monkeypatch.setattr("metaplug.experiments.runs.training.build", build_holed)
    return holes


@pytest.mark.parametrize("every", [1, 3])
def test_a_run_with_skips_goes_on_bit_for_bit(tmp_path, holed, every):
    config = tiny(training__non_finite="skip", runtime__metrics_every=every)
    summary = train(config, tmp_path / "whole")
    lines = read_metrics(tmp_path / "whole")
    reason = (
        "support_x of task 0 holds NaN or Inf, on which no loss is defined: clean the "
        "data of that task"
    )
    assert [(line["iteration"], line["skipped"]) for line in lines if "skipped" in line] == [
        (2, reason),
        (7, reason),
        (8, reason),
    ]
    assert summary["skipped"] == 3
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["skipped"] == 3
    assert train(config, tmp_path / "stopped", stop=stop_after(6)) is None
    train(config, tmp_path / "stopped", resume=True)
    assert_same(
        [line | {"figures": None} for line in read_metrics(tmp_path / "stopped")],
        [line | {"figures": None} for line in lines],
    )
    if every == 1:
        (tmp_path / "stopped" / "run.json").write_bytes(
            (tmp_path / "whole" / "run.json").read_bytes()
        )
        assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    run_figure(lines, tmp_path / "curves.png")


def test_a_run_that_stops_keeps_its_last_checkpoint(tmp_path, holed):
    holed[:] = [6]
    with pytest.raises(
        RunError,
        match=r"^iteration 7 stopped, nothing was updated: support_x of task 0 holds NaN or Inf",
    ):
        train(tiny(), tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) == 6
    assert checkpoint.read(tmp_path / "run" / "last.safetensors")["iteration"] == 4
    holed[:] = []
    train(tiny(), tmp_path / "run", resume=True)
    train(tiny(), tmp_path / "whole")
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


def test_the_progress_line_counts_them():
    console = Console(file=io.StringIO(), width=200)
    progress = TrainingProgress(console, 4)
    progress.begin(0)
    learner = problem().learner()
    learner.fit(
        Holed(),
        iterations=4,
        tasks_per_batch=2,
        validation=Stream(split="val"),
        validate_every=2,
        validation_tasks=2,
        non_finite="skip",
        on_record=progress.record,
    )
    first, last = console.file.getvalue().splitlines()
    assert "skipped" not in first
    assert "  1 skipped  validation" in last
    assert (
        skipped_line(3, 400)
        == "3 of 400 batches were skipped, for NaN or Inf: metrics.jsonl says where"
    )
    assert (
        skipped_line(1, 400)
        == "1 of 400 batches was skipped, for NaN or Inf: metrics.jsonl says where"
    )


# Inner loops that diverge.


class Line:
    """Tasks y = w x with w of their own and x = ±√(L / 2): a quadratic of curvature L in one
    weight, whose optimum every task has."""

    def __init__(self, curvature):
        self.x = (curvature / 2) ** 0.5

    def batch(self, iteration, indices):
        x = torch.tensor([self.x, -self.x], dtype=torch.float64)[None, :, None].expand(
            len(indices), 2, 1
        )
        slopes = torch.tensor([2.0 + index % 3 for index in indices], dtype=torch.float64)[
            :, None, None
        ]
        return TaskBatch(x, slopes * x, x, slopes * x)


def line(curvature, inner_lr, steps=3, **more):
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.5)
    return MetaLearner(
        model, kind="regression", inner_lr=inner_lr, inner_steps=steps, **more
    ), Line(curvature)


@given(
    curvature=st.floats(0.1, 100),
    times=st.one_of(st.floats(0.05, 0.95), st.floats(1.05, 5)),
    steps=st.integers(1, 4),
    batching=st.sampled_from(["vectorized", "sequential"]),
)
def test_a_quadratic_diverges_beyond_two_over_its_curvature(curvature, times, steps, batching):
    """θ ← θ − α L (θ − w): the loss is multiplied by (1 − α L)² in each step, so that it grows
    where α > 2 / L, and only there."""
    learner, tasks = line(curvature, times * 2 / curvature, steps, task_batching=batching)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        [(_, result)] = learner.fit(
            tasks, iterations=1, tasks_per_batch=2, validation=tasks, validation_tasks=5
        ).validations
    assert len(told) == (times > 1)
    assert result.raised == (5 if times > 1 else 0)
    before, after = result.support_losses
    assert after / before == pytest.approx((1 - 2 * times) ** (2 * steps), rel=1e-6)


def test_most_support_losses_growing_is_told_once():
    learner, tasks = line(2.0, 1.5)
    plain, _ = line(2.0, 1.5)
    with pytest.warns(UserWarning) as told:
        history = learner.fit(
            tasks,
            iterations=4,
            tasks_per_batch=2,
            validation=tasks,
            validate_every=2,
            validation_tasks=6,
        )
    assert [str(warning.message) for warning in told] == [
        "adaptation raises the support loss of 6 of 6 validation tasks (mean 6.907 to 442 over 3 "
        "inner steps, inner_lr = 1.5): "
        "the inner loop diverges; lower inner_lr"
    ]
    assert [result.raised for _, result in history.validations] == [6, 6]
    expected = plain.fit(tasks, iterations=4, tasks_per_batch=2)
    assert [record.step for record in history.records] == [
        record.step for record in expected.records
    ]


def test_the_warning_names_the_plugin_that_changes_the_rate():
    learner, tasks = line(2.0, 1.5, plugins=["per-step-learning-rates"])
    with pytest.warns(
        UserWarning,
        match=r"inner_lr = 1.5, which plugin 'per-step-learning-rates' changes\): the inner loop "
        r"diverges; lower",
    ):
        learner.fit(tasks, iterations=1, tasks_per_batch=2, validation=tasks, validation_tasks=6)


def test_a_loop_that_converges_is_told_nothing_of():
    learner, tasks = line(2.0, 0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [(_, result)] = learner.fit(
            tasks, iterations=1, tasks_per_batch=2, validation=tasks, validation_tasks=6
        ).validations
    assert result.raised == 0
    learner, tasks = line(2.0, 0.9, steps=0)
    [(_, result)] = learner.fit(
        tasks, iterations=1, tasks_per_batch=2, validation=tasks, validation_tasks=6
    ).validations
    assert (result.raised, result.support_losses) == (0, (0.0, 0.0))


def test_only_validations_pay_for_support_losses_after_adaptation(monkeypatch):
    learner, tasks = line(2.0, 0.9)
    asked = []
    real = learner.engine.adapted_losses
    monkeypatch.setattr(
        learner.engine, "adapted_losses", lambda *given: asked.append(given) or real(*given)
    )
    result = learner.evaluate(tasks, num_tasks=20)
    assert (len(asked), result.raised, result.support_losses) == (0, None, None)
    learner.fit(tasks, iterations=1, tasks_per_batch=2, validation=tasks, validation_tasks=20)
    assert len(asked) == 2


def test_the_share_is_in_the_metrics(tmp_path):
    train(tiny(), tmp_path / "run")
    assert [
        line["validation"]["raised"]
        for line in read_metrics(tmp_path / "run")
        if "validation" in line
    ] == [0.0, 0.0, 0.0]


def test_a_stop_after_losses_that_grew_says_so():
    learner, tasks = line(2.0, 900.0, steps=60)
    with pytest.raises(RunError) as error:
        learner.fit(tasks, iterations=1, tasks_per_batch=2)
    text = str(error.value)
    assert text.startswith("iteration 1 stopped, nothing was updated: the ")
    found = re.search(
        r"; the inner loop diverges: the support loss of task 1 grew from 6.25 to (\S+) in 47 "
        r"inner steps at inner_lr = 900; ",
        text,
    )
    assert float(found[1]) == pytest.approx(6.25 * 1799.0 ** (2 * 47), rel=1e-3)
    assert text.endswith("; lower inner_lr")


def test_an_evaluation_that_diverges_names_the_rate():
    learner, tasks = line(2.0, 900.0, steps=60)
    with pytest.raises(RunError) as error:
        learner.evaluate(tasks, num_tasks=2)
    text = str(error.value)
    assert text.startswith(
        "evaluation task 0 has a query loss of NaN or Inf after 60 inner steps: the support loss "
        "holds NaN or Inf in 'loss'"
    )
    found = re.search(
        r"; the inner loop diverges: the support loss of task 0 grew from 2.25 to (\S+) in 47 "
        r"inner steps at inner_lr = 900; lower inner_l",
        text,
    )
    assert float(found[1]) == pytest.approx(2.25 * 1799.0 ** (2 * 47), rel=1e-3)


# Evaluations that are not finite.


def test_an_evaluation_asserts_no_cause_that_is_not_there():
    """The derivative is not finite, at whatever rate; training says the same of the same model."""
    with pytest.raises(RunError) as error:
        MetaLearner(Cusp(), inner_lr=1e-6, inner_steps=1).evaluate(Stream(), num_tasks=3)
    assert str(error.value) == (
        "evaluation task 0 has a query loss of NaN or Inf after 1 inner steps: the gradient of the "
        "support loss holds NaN or Inf in "
        "'weight' of task 0 in evaluation, inner step 0; the loss was finite: an operation of the "
        "model, or of a plugin's loss, has no "
        "finite derivative there, such as a root or norm of 0: add a small number inside it"
    )


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
def test_an_evaluation_names_the_plugin_and_the_task(batching):
    class Spoils(Plugin):
        """Gradients of the task that has this loss."""

        loss = math.nan

        @hookimpl
        def transform_gradients(self, gradients, step):
            bad = torch.isclose(
                step.support_losses.detach(),
                torch.tensor(self.loss, dtype=torch.float64),
                rtol=1e-10,
            )
            return {
                name: torch.where(bad.reshape(-1, *[1] * (each.ndim - 1)), math.nan, each)
                for name, each in gradients.items()
            }

    plugin = Spoils()
    learner = problem().learner(plugins=[plugin], task_batching=batching)
    learner.evaluate(Stream(), num_tasks=20)
    plugin.loss = float(
        learner.engine.evaluate(learner.prepare_batch(Stream().batch(0, [18])), 1)
        .support_losses[0]
        .detach()
    )
    with pytest.raises(RunError) as error:
        learner.evaluate(Stream(), num_tasks=40)
    assert str(error.value).startswith(
        "evaluation task 18 has a query loss of NaN or Inf after 2 inner steps: plugin 'spoils' in "
        "transform_gradients "
        "(link 1 of 1, evaluation, inner step 0) returned NaN or Inf in '0.weight', '0.bias', "
        "'2.weight' of task 18; "
    )
    assert learner.chain.watch is None


class Sharp(nn.Module):
    """The largest eigenvalue of a matrix of its weights, which torch refuses to find of NaN."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x):
        weight = self.layer.weight
        return (
            self.layer(x)
            + 0 * torch.linalg.cholesky(weight @ weight.T + torch.eye(3, dtype=x.dtype)).sum()
        )


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
@pytest.mark.parametrize("every", [1, 4])
def test_a_model_that_fails_on_nan_is_not_who_made_it(every, batching):
    class Spoils(Plugin):
        @hookimpl
        def transform_gradients(self, gradients, step):
            bad = step.meta_iteration == BAD and step.index == 0
            return {name: each * math.nan for name, each in gradients.items()} if bad else None

    def learner():
        torch.manual_seed(0)
        return MetaLearner(
            Sharp(),
            inner_lr=0.1,
            inner_steps=2,
            plugins=[Spoils()],
            metrics_every=every,
            task_batching=batching,
        )

    said = (
        "plugin 'spoils' in transform_gradients (link 1 of 1, iteration 3, inner step 0) "
        "returned NaN or Inf in "
    )
    assert first_bad(learner(), Stream()).startswith(said)
    made = learner()
    records = made.fit(Stream(), iterations=5, tasks_per_batch=3, non_finite="skip").records
    assert [record.step.iteration - 1 for record in records if record.step.skipped] == [BAD]
    assert records[BAD].step.skipped.startswith(said)
    made.engine.iteration = BAD
    with pytest.raises(
        RunError,
        match=r"^evaluation tasks 0 to 4 cannot be computed: plugin 'spoils' in "
        r"transform_gradients",
    ):
        made.evaluate(Stream(split="test"), num_tasks=5)


def test_a_matrix_without_a_decomposition_is_the_models_own_error():
    learner = MetaLearner(Sharp(), inner_lr=0.1, inner_steps=1)
    learner.fit(Stream(), iterations=1, tasks_per_batch=2)
    learner.engine.inner.loss = lambda prediction, target: (
        prediction.sum() + torch.linalg.inv(torch.zeros(2, 2).double()).sum()
    )
    for call in (
        lambda: learner.fit(Stream(), iterations=1, tasks_per_batch=2),
        lambda: learner.fit(Stream(), iterations=1, tasks_per_batch=2, non_finite="skip"),
        lambda: learner.evaluate(Stream(), num_tasks=2),
    ):
        with pytest.raises(torch.linalg.LinAlgError, match="singular"):
            call()
    assert learner.iteration == 1


@pytest.mark.parametrize("skip", ["stop", "skip"])
def test_a_fault_that_has_nothing_to_do_with_nan_is_no_less_one_behind_it(skip):
    class Late(Plugin):
        @hookimpl
        def transform_gradients(self, gradients, step):
            if not step.training and len(gradients["2.bias"]) == 4:
                raise ValueError("four")

    learner = problem().learner(plugins=[Late()])
    with pytest.raises(
        RunError,
        match=r"^(query_x of task 3 holds NaN|plugin 'late' in transform_gradients .* ValueError: "
        r"four$)",
    ) as error:
        learner.fit(Stream(), validation=HoledTests({0}), **VALIDATED, non_finite=skip)
    assert ("four" in str(error.value)) == (skip == "skip")


def test_a_loss_that_is_finite_when_it_is_computed_again_says_so():
    asked = itertools.count()
    learner = problem().learner(task_batching="sequential")
    learner.evaluate(Stream(), num_tasks=1)
    real = learner.engine.inner.loss
    learner.engine.inner.loss = lambda prediction, target: (
        real(prediction, target) + (math.nan if next(asked) == 2 else 0.0)
    )
    with pytest.raises(RunError) as error:
        learner.evaluate(Stream(), num_tasks=1)
    assert str(error.value) == (
        "evaluation task 0 has a query loss of NaN or Inf after 2 inner steps, but not when it was "
        "computed once more: "
        "see what draws at random"
    )


class HoledTests(Stream):
    """Validation tasks, one of which has a hole, in what is drawn for some of the validations."""

    def __init__(self, bad, index=3):
        super().__init__(split="val")
        self.bad, self.index, self.drawn = bad, index, -1

    def batch(self, iteration, indices):
        self.drawn += 0 in indices
        batch = super().batch(iteration, indices)
        if self.drawn in self.bad and self.index in indices:
            batch.query_x[list(indices).index(self.index), 0, 0] = math.nan
        return batch


VALIDATED = {"iterations": 6, "tasks_per_batch": 2, "validate_every": 2, "validation_tasks": 20}


def test_a_validation_with_nan_is_not_finite_and_training_goes_on():
    learner, plain = problem().learner(), problem().learner()
    with pytest.warns(UserWarning) as told:
        history = learner.fit(Stream(), validation=HoledTests({0}), **VALIDATED, non_finite="skip")
    assert [str(warning.message) for warning in told] == [
        "the validation after iteration 2 counts for nothing: evaluation task 3 has a query loss "
        "of NaN or Inf after 2 inner steps: "
        "query_x of task 3 holds NaN or Inf, on which no loss is defined: clean the data of that "
        "task"
    ]
    expected = plain.fit(Stream(), validation=Stream(split="val"), **VALIDATED)
    assert [record.step for record in history.records] == [
        record.step for record in expected.records
    ]
    first, *others = [result for _, result in history.validations]
    assert math.isnan(first.mean)
    assert math.isnan(first.interval)
    assert torch.isnan(first.per_task).nonzero().tolist() == [[3]]
    finite = torch.arange(20) != 3
    assert torch.equal(first.per_task[finite], expected.validations[0][1].per_task[finite])
    assert all(
        torch.equal(one.per_task, two.per_task)
        for one, (_, two) in zip(others, expected.validations[1:], strict=True)
    )
    assert history.best[0] > 2


def test_a_validation_with_nan_stops_training_that_is_to_stop():
    seen = []
    with pytest.raises(
        RunError, match=r"^query_x of task 3 holds NaN or Inf, on which no loss is defined"
    ):
        problem().learner().fit(
            Stream(), validation=HoledTests({1}), **VALIDATED, on_record=seen.append
        )
    assert len(seen) == 3


def test_a_test_with_nan_is_no_result_of_a_run_that_skips():
    learner = problem().learner()
    learner.fit(Stream(), iterations=2, tasks_per_batch=2, non_finite="skip")
    with pytest.raises(RunError, match=r"^query_x of task 3 holds NaN or Inf"):
        learner.evaluate(HoledTests({0}), num_tasks=20)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_ranks_pass_over_a_validation_together():
    """Task 3 is of rank 0's batch, task 17 of rank 1's; of two the first is named."""

    def train_on(world):
        found = []
        for index in (3, 17):
            learner = problem().learner(world=world)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                tasks = HoledTests(
                    range(-1, 99), index
                )  # rank 1 does not draw task 0, by which they are counted
                history = learner.fit(Stream(), validation=tasks, **VALIDATED, non_finite="skip")
            found.append(
                (
                    [str(warning.message) for warning in told],
                    [result.per_task.nan_to_num(-1) for _, result in history.validations],
                )
            )
        return found

    one, other = on_ranks(train_on)
    assert_same(one, other)
    for index, (texts, values) in zip((3, 17), one, strict=True):
        assert [text.split(":")[:2] for text in texts] == [
            [
                f"the validation after iteration {iteration} counts for nothing",
                f" evaluation task {index} has a query loss of NaN or Inf after 2 inner steps",
            ]
            for iteration in (2, 4, 6)
        ]
        assert all((value == -1).nonzero().tolist() == [[index]] for value in values)


@pytest.fixture
def holed_validation(monkeypatch):
    """Runs whose validations have a hole."""
    bad = {0, 2}

    class Streams:
        def __init__(self, inner):
            self.inner, self.drawn = inner, -1

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def batch(self, iteration, indices):
            self.drawn += 0 in indices
            batch = self.inner.batch(iteration, indices)
            if self.drawn in bad:
                batch.query_x[-1, 0] = math.nan
            return batch

    def build_holed(config, **more):
        experiment = build(config, **more)
        tasks = experiment.tasks
        return dataclasses.replace(
            experiment,
            tasks=SimpleNamespace(
                train=tasks.train, val=Streams(tasks.val), test=tasks.test, resolved=dict
            ),
        )

    monkeypatch.setattr("metaplug.experiments.runs.training.build", build_holed)
    return bad


@pytest.mark.filterwarnings("ignore:the validation after iteration")
def test_a_run_passes_over_validations_that_are_not_finite(tmp_path, holed_validation):
    summary = train(tiny(training__non_finite="skip"), tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run") if "validation" in line]
    assert [line["validation"]["mean"] is None for line in lines] == [True, False, True]
    assert summary["best_validation"]["iteration"] == lines[1]["iteration"]
    run_figure(read_metrics(tmp_path / "run"), tmp_path / "curves.png")
    holed_validation |= {1}
    with pytest.raises(RunError) as error:
        train(tiny(training__non_finite="skip"), tmp_path / "none")
    assert str(error.value) == (
        f"no validation of {tmp_path}/none was finite, so there is nothing to test: try a smaller "
        "learning rate"
    )


def test_the_progress_line_says_that_a_validation_is_not_finite():
    console = Console(file=io.StringIO(), width=200)
    progress = TrainingProgress(console, 2)
    progress.begin(0)
    with pytest.warns(UserWarning, match="^the validation after iteration 2 counts for nothing"):
        problem().learner().fit(
            Stream(),
            validation=HoledTests({0}),
            **VALIDATED | {"iterations": 2},
            non_finite="skip",
            on_record=progress.record,
        )
    assert console.file.getvalue().rstrip().endswith("validation not finite")
