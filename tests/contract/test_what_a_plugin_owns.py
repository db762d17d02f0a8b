"""What a plugin owns: its parameters, its statistics, the mode of its layers, its settings' names.

Each was wrong in silence once, or ended in an error of torch.
"""

import pytest
import torch
from pydantic import Field
from torch import nn

from metaplug import (
    Context,
    MetaLearner,
    Plugin,
    PluginConfig,
    RequestError,
    gradients_of,
    hookimpl,
    key_of,
)
from metaplug.testing import Stream, assert_close, found, problem


def refusal(*plugins, **options):
    with pytest.raises(RequestError) as caught:
        problem().learner(plugins=list(plugins), **options).fit(Stream(), iterations=1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class KeepsTheStart(Plugin):
    """Keeps what tasks start from, which the meta-update then writes into."""

    @hookimpl
    def setup(self, context: Context):
        for name, shape in context.shapes.items():
            buffer = torch.zeros(shape, **context.factory_kwargs)
            self.register_buffer(key_of(name), buffer)

    @hookimpl
    def transform_outer_losses(self, losses, outcome):
        for name, value in outcome.model_parameters.items():
            outcome.keep(name, value)

    @hookimpl
    def commit(self, kept):
        for name, value in kept.items():
            self.get_buffer(key_of(name)).copy_(value)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_what_is_kept_is_of_the_time_when_it_was_kept(chunk_size):
    case, plugin = problem(tasks=4), KeepsTheStart()
    learner = case.learner(plugins=[plugin], chunk_size=chunk_size)
    before = {name: each.detach().clone() for name, each in learner.model.named_parameters()}
    learner.engine.meta_step(learner.prepare_batch(case.batch), 1)
    moved = dict(learner.model.named_parameters())
    assert any(not torch.equal(moved[name], before[name]) for name in before)
    assert_close({n: plugin.get_buffer(key_of(n)) for n in before}, before)


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (1.0, "float"),
        (torch.tensor(3), "a tensor of torch.int64"),
        (torch.tensor([True]), "a tensor of torch.bool"),
    ],
)
def test_a_statistic_is_a_floating_tensor(value, form):
    def transform_inner_losses(losses, step):
        step.keep("n", value)

    assert f"keeps 'n', {form}: keep a mean over tasks" in refusal(transform_inner_losses)


@pytest.mark.parametrize("value", [0.5, 2, torch.tensor([True, False]), torch.tensor([1, 2])])
def test_any_number_can_be_logged(value):
    def transform_inner_losses(losses, step):
        step.log("n", value)

    learner = problem().learner(plugins=[transform_inner_losses])
    (record,) = learner.fit(Stream(), iterations=1).records
    logged = record.step.figures["transform-inner-losses.n"]
    assert logged == pytest.approx(float(torch.as_tensor(value, dtype=torch.float64).mean()))


def test_what_is_no_number_cannot_be_logged():
    def transform_inner_losses(losses, step):
        step.log("n", "much")

    assert "logs 'n', str: log a tensor or a number" in refusal(transform_inner_losses)


class MadeLate(Plugin):
    """Its parameter is made in the first inner step, after the meta-optimizer."""

    @hookimpl
    def transform_inner_losses(self, losses):
        if not hasattr(self, "factor"):
            self.factor = nn.Parameter(losses.new_ones(()))
        return losses * self.factor


class OfAClosure(Plugin):
    """Its parameter is nobody's attribute."""

    @hookimpl
    def setup(self, context: Context):
        factor = nn.Parameter(torch.ones((), **context.factory_kwargs))
        self.scaled = lambda losses: losses * factor

    @hookimpl
    def transform_outer_losses(self, losses):
        return self.scaled(losses)


@pytest.mark.parametrize("held", [list, tuple, lambda each: {"first": each[0]}])
@pytest.mark.parametrize("make", [nn.Parameter, lambda start: nn.Linear(1, 1)])
def test_parameters_in_a_container_of_pythons_are_refused_in_setup(held, make):
    class InAContainer(Plugin):
        @hookimpl
        def setup(self):
            self.factors = held([make(torch.ones(()))])

    with pytest.raises(RequestError, match=r"'in-a-container' has parameters in the .* 'factors'"):
        problem().learner(plugins=[InAContainer()])


@pytest.mark.parametrize("kind", [MadeLate, OfAClosure])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}, {"checkpoint_steps": 1}])
def test_parameters_that_nothing_would_train_are_refused(kind, options):
    assert "that neither the model nor a plugin has as its own (of shape ())" in refusal(
        kind(), **options
    )


def test_a_frozen_tensor_that_is_not_the_plugins_is_a_constant():
    factor = nn.Parameter(torch.tensor(0.5, dtype=torch.float64), requires_grad=False)

    def transform_inner_losses(losses):
        return losses * factor

    case = problem()
    gradients = case.learner(plugins=[transform_inner_losses]).meta_gradients(case.batch)
    assert gradients.keys() == dict(case.model.named_parameters()).keys()


def test_a_parameter_belongs_to_one_owner():
    shared = nn.Parameter(torch.zeros((), dtype=torch.float64))

    class Shares(Plugin):
        @hookimpl
        def setup(self):
            self.w = shared

    assert "plugin 'b' has the parameter 'w', which is one of plugin 'a', so" in refusal(
        Shares(name="a"), Shares(name="b")
    )
    model = nn.Linear(3, 2)

    class Teacher(Plugin):
        @hookimpl
        def setup(self):
            self.teacher = model

    with pytest.raises(RequestError, match=r"'teacher\.weight', which is one of the model, so"):
        MetaLearner(model, plugins=[Teacher()])


class DropsOut(Plugin):
    """A network within the inner loss, with layers that depend on the mode."""

    @hookimpl
    def setup(self, context: Context):
        own = context.factory_kwargs
        self.net = nn.Sequential(
            nn.Linear(1, 3, **own),
            nn.BatchNorm1d(3, **own),
            nn.Dropout(0.5),
            nn.Linear(3, 1, **own),
        )

    @hookimpl
    def transform_inner_losses(self, losses):
        return losses + 10 * self.net(losses.unsqueeze(1)).squeeze(1)


def test_layers_of_a_plugin_are_in_the_mode_of_the_loop():
    plugin = DropsOut()
    learner = problem().learner(plugins=[plugin])
    learner.fit(Stream(), iterations=1)
    assert plugin.net.training
    mean = plugin.net[1].running_mean.clone()
    results = [learner.evaluate(Stream(), num_tasks=6, tasks_per_batch=n).per_task for n in (1, 3)]
    torch.testing.assert_close(*results)
    assert torch.equal(plugin.net[1].running_mean, mean)
    assert not plugin.net[2].training
    learner.fit(Stream(), iterations=2)
    assert plugin.net[2].training


def test_a_field_cannot_take_the_name_of_the_instance():
    with pytest.raises(TypeError, match="Config has the field 'name'"):

        class Named(Plugin):
            class Config(PluginConfig):
                name: str = Field("0", description="Of a layer.")

            config: Config


def test_a_rule_over_single_tasks_sees_the_outer_losses_of_all_plugins():
    """Their mean is the outer loss, whatever stands in the chain."""
    seen = {}

    class ByTask(Plugin):
        couples_tasks = True

        @hookimpl
        def compute_meta_gradients(self, outcome, outer_loss, meta_parameters):
            assert torch.equal(outcome.outer_losses.mean(), outer_loss)
            seen["counted"] = sum(outcome.query_losses.values()).mean().item()
            whole = dict.fromkeys(meta_parameters, 0.0)
            for loss in outcome.outer_losses:
                gradients = gradients_of(loss, meta_parameters, retain_graph=True)
                for name, gradient in gradients.items():
                    whole[name] = whole[name] + gradient / len(outcome.outer_losses)
            return whole

    case = problem(tasks=3)
    others = ["taml", "multi-step-loss", "l2f"]
    plain = found(case.learner(plugins=others), case.batch)
    ours = found(case.learner(plugins=[*others, ByTask()]), case.batch)
    assert_close(dict(ours.gradients), dict(plain.gradients))
    assert seen["counted"] != pytest.approx(float(plain.outer_loss))
