"""Meta-gradients against finite differences, a closed form and plain loops; and every batching
against every other."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metaplug_plugins.gradient_sharing import GradientSharing
from torch import nn
from torch.nn import functional as F

from metaplug import MetaLearner, Plugin, RequestError, TaskBatch, hookimpl
from metaplug.testing import (
    CLASSIFIERS,
    MODELS,
    SMOOTH,
    Problem,
    adapted,
    assert_close,
    found,
    problem,
    reference,
)
from metaplug.testing.strategies import problems, seeds

BATCHINGS = ("vectorized", "sequential")
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


# Plain loops.


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_maml_equals_a_plain_loop(name, steps, order, batching):
    case = problem(name, steps=steps, seed=steps)
    expected = reference.maml(case.model, case.batch, steps=steps, lr=case.lr, order=order)
    learner = case.learner(preset="maml" if order == 2 else "fomaml", task_batching=batching)
    ours = found(learner, case.batch)
    assert_close(ours.gradients, expected.gradients, **ROUNDING)
    assert_close(ours.outer_loss, expected.outer_loss, **ROUNDING)
    for key, weight in ours.outcome.adapted_parameters.items():
        assert_close(
            weight.detach(), torch.stack([task[key] for task in expected.adapted]), **ROUNDING
        )


@given(problems(), st.sampled_from([1, 2]))
def test_drawn_problems_equal_a_plain_loop(case, order):
    expected = reference.maml(case.model, case.batch, steps=case.steps, lr=case.lr, order=order)
    ours = case.learner(preset="maml" if order == 2 else "fomaml").meta_gradients(case.batch)
    # A feature that hardly varies over three examples makes batch norm amplify rounding.
    assert_close(ours, expected.gradients, rtol=1e-8, atol=1e-9)


# 9. No inner loop, or one that does not move.


@given(problems(steps=(1, 3)))
def test_no_steps_and_no_rate_are_the_multi_task_gradient(case):
    losses = torch.func.vmap(F.cross_entropy)
    model = copy.deepcopy(case.model)
    predictions = torch.stack([reference.predict(model, {}, x) for x in case.batch.query_x])
    expected = torch.autograd.grad(
        losses(predictions, case.batch.query_y).mean(), list(model.parameters())
    )
    named = dict(zip(dict(model.named_parameters()), expected, strict=True))
    for settings in ({"inner_steps": 0}, {"inner_lr": 0.0}, {"inner_lr": 0.0, "preset": "fomaml"}):
        assert_close(
            case.learner(**settings).meta_gradients(case.batch), named, rtol=1e-9, atol=1e-10
        )


class Only(Plugin):
    """Adapts the parameters whose names begin, or do not begin, with "0"."""

    class Config(Plugin.Config):
        first: bool

    @hookimpl
    def select_adapted(self, names):
        return tuple(name for name in names if name.startswith("0") == self.config.first)


@given(
    problems(("mlp", "softplus", "max-pool", "batch-norm", "conv4"), steps=(1, 3), lrs=(0.1, 0.5))
)
def test_adapted_sets_partition_the_parameters(case):
    """ANIL and BOIL in small: each moves its own part for every task, and meta-learns all of it as
    a plain loop does."""
    names = {name for name, _ in case.model.named_parameters()}
    parts = []
    for first in (True, False):
        learner = case.learner(plugins=[Only(first=first)])
        part = [name for name in names if name.startswith("0") == first]
        ours = found(learner, case.batch)
        moved = {
            name
            for name, weight in ours.outcome.adapted_parameters.items()
            if not torch.equal(weight, ours.outcome.initial_parameters[name])
        }
        assert set(learner.engine.inner.adapted) == set(part) >= moved
        expected = reference.maml(
            case.model,
            case.batch,
            steps=case.steps,
            lr=case.lr,
            adapted=[n for n, _ in case.model.named_parameters() if n in part],
        )
        assert_close(ours.gradients, expected.gradients, rtol=1e-8, atol=1e-9)
        parts.append(set(part))
    assert parts[0] | parts[1] == names
    assert not parts[0] & parts[1]


# 10. Finite differences, and a closed form.


@given(problems(SMOOTH, steps=(0, 3), lrs=(0.05, 0.3)), seeds, st.booleans())
def test_directional_derivative_equals_finite_differences(case, seed, sharing):
    learner = case.learner(plugins=[GradientSharing(gate=0.4, momentum=0.3)] if sharing else [])
    if sharing:
        size = sum(parameter.numel() for parameter in case.model.parameters())
        past = (
            torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            / size**0.5
        )
        learner.chain.commit(
            {"gradient-sharing": {str(k): past for k in range(max(case.steps, 1))}}
        )
    gradients = learner.meta_gradients(case.batch)
    parameters = {
        name: parameter
        for name, parameter in learner.engine.meta_parameters.items()
        if name in gradients
    }
    generator = torch.Generator().manual_seed(seed)
    direction = {
        name: torch.randn(p.shape, dtype=p.dtype, generator=generator)
        for name, p in parameters.items()
    }
    slope = sum(float((gradients[name] * direction[name]).sum()) for name in parameters)
    numeric = _slope(learner, case.batch, parameters, direction)
    # A fourth-order difference at 1e-3: its own error is about 1e-9 of the scale of the gradient;
    # batch norm's curvature adds to it.
    scale = sum(float(gradients[name].square().sum()) for name in parameters) ** 0.5
    assert numeric == pytest.approx(slope, abs=1e-5 * max(scale, 1e-3))


def _slope(learner, batch, parameters, direction, h=2e-4):
    """(8 [L(h) − L(−h)] − [L(2h) − L(−2h)]) / 12h, along a direction of all meta-parameters."""
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    losses = {}
    for factor in (-2, -1, 1, 2):
        for name, parameter in parameters.items():
            parameter.data = start[name] + factor * h * direction[name]
        losses[factor] = float(found(learner, batch).outer_loss)
    return (8 * (losses[1] - losses[-1]) - (losses[2] - losses[-2])) / (12 * h)


class Point(nn.Module):
    """Answers its weight for every input: the loss of a task is a quadratic in the weight."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x):
        return self.weight.expand(len(x), -1)


def half_square(prediction, target):
    return (prediction - target).square().sum(1).mean() / 2


@given(st.integers(0, 4), st.floats(0, 1), st.integers(1, 6), seeds, st.sampled_from([1, 2]))
def test_quadratic_has_a_closed_form(steps, lr, tasks, seed, order):
    """θ[K] = s + (1 − α)^K (θ − s) with s the support mean; dL/dθ = (1 − α)^K (θ[K] − q), without
    the factor in first order."""
    generator = torch.Generator().manual_seed(seed)
    support, query, weight = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((tasks, 4, 3), (tasks, 5, 3), (3,))
    )
    model = Point(3)
    model.weight.data = weight
    learner = MetaLearner(
        model,
        preset="maml" if order == 2 else "fomaml",
        inner_lr=lr,
        inner_steps=steps,
        kind="regression",
        loss=half_square,
    )
    batch = TaskBatch(torch.zeros(tasks, 4, 1), support, torch.zeros(tasks, 5, 1), query)
    shrink = (1 - lr) ** steps
    end = support.mean(1) + shrink * (weight - support.mean(1))
    assert_close(adapted(learner, batch)["weight"], end)
    expected = ((shrink if order == 2 else 1) * (end - query.mean(1))).mean(0)
    assert_close(learner.meta_gradients(batch)["weight"], expected)


# 11. One meaning, whatever the batching.


@given(problems(), st.booleans(), st.sampled_from(["maml", "fomaml"]))
def test_vectorized_equals_sequential(case, sharing, preset):
    results = []
    for batching in BATCHINGS:
        learner = case.learner(
            preset=preset,
            plugins=[GradientSharing(gate=0.3)] if sharing else [],
            task_batching=batching,
        )
        results.append((adapted(learner, case.batch), learner.meta_gradients(case.batch)))
        assert learner.batching.batching == batching
    for vectorized, sequential in zip(*results, strict=True):
        assert_close(vectorized, sequential, rtol=1e-8, atol=1e-9)


@given(
    problems(steps=(1, 2)),
    st.sampled_from(["sgd", "adam", "rmsprop", "adagrad", "adadelta", "adamax"]),
)
def test_vectorized_equals_sequential_under_every_optimizer(case, optimizer):
    # A bias before batch norm has a gradient of zero up to rounding, by whose size these optimizers
    # divide.
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in case.model.modules()):
        case = Problem(
            MODELS["mlp"]().double(),
            problem("mlp", tasks=case.batch.num_tasks).batch,
            0.05,
            case.steps,
        )
    learners = [
        case.learner(inner_lr=0.05, inner_optimizer=optimizer, task_batching=batching)
        for batching in BATCHINGS
    ]
    assert_close(
        adapted(learners[0], case.batch), adapted(learners[1], case.batch), rtol=1e-7, atol=1e-8
    )


class WithIndices(nn.Module):
    def forward(self, x):
        return F.max_pool2d(x, 2, return_indices=True)[0]


LAYERS = {
    "batch norm": lambda: [nn.BatchNorm2d(3), nn.Tanh()],
    "batch norm without weights": lambda: [nn.BatchNorm2d(3, affine=False), nn.Tanh()],
    "batch norm over sequences": lambda: [nn.Flatten(2), nn.BatchNorm1d(3), nn.Tanh()],
    "instance norm": lambda: [nn.InstanceNorm2d(3, affine=True), nn.Tanh()],
    "max-pool over borders": lambda: [nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)],
    "max-pool with holes": lambda: [nn.MaxPool2d(2, stride=1, dilation=2)],
    "max-pool with indices": lambda: [WithIndices()],
    "adaptive max-pool": lambda: [nn.AdaptiveMaxPool2d(3)],
}


@pytest.mark.parametrize("adapts_all", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_take_the_tasks_as_channels_equal_a_plain_loop(name, adapts_all):
    """With weights of each task's own, and with one weight for all tasks."""
    batch = problem("conv4").batch
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 3, 3, padding=1), *LAYERS[name](), nn.Flatten()]
    width = nn.Sequential(*body)(batch.support_x[0].float()).shape[1]
    case = Problem(nn.Sequential(*body, nn.Linear(width, 3)).double(), batch, 0.3, 2)
    adapted_names = [
        each for each, _ in case.model.named_parameters() if adapts_all or each.startswith("0")
    ]
    expected = reference.maml(case.model, batch, steps=2, lr=0.3, adapted=adapted_names)
    learner = case.learner(
        plugins=[] if adapts_all else [Only(first=True)], task_batching="vectorized"
    )
    assert_close(learner.meta_gradients(batch), expected.gradients, **ROUNDING)


def test_frozen_parameters_are_neither_adapted_nor_meta_learned():
    case = problem()
    case.model[0].weight.requires_grad_(False)
    for batching in BATCHINGS:
        learner = case.learner(task_batching=batching)
        expected = reference.maml(case.model, case.batch, steps=case.steps, lr=case.lr)
        assert_close(learner.meta_gradients(case.batch), expected.gradients, **ROUNDING)
        assert "0.weight" not in expected.gradients
        assert torch.equal(
            adapted(learner, case.batch)["0.weight"], case.model[0].weight.expand(3, -1, -1)
        )


def test_attention_and_parameter_lists_and_parametrizations_equal_a_plain_loop():
    """Modules whose weights are read without the module being called."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(4, 2)
            self.scales = nn.ParameterList([torch.ones(4), torch.zeros(4)])
            self.head = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))

        def forward(self, x):
            hidden, _ = self.attend(x, x, x)
            return self.head(torch.tanh(hidden * self.scales[0] + self.scales[1]))[:, :3]

    torch.manual_seed(0)
    case = Problem(Attention().double(), problem().batch, 0.3, 2)
    expected = reference.maml(case.model, case.batch, steps=2, lr=0.3)
    for batching in ("auto", "sequential"):
        assert_close(
            case.learner(task_batching=batching).meta_gradients(case.batch),
            expected.gradients,
            **ROUNDING,
        )


def test_a_parameter_that_the_loss_does_not_use_is_left_out():
    case = problem()
    case.model.spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
    learner = case.learner(plugins=[GradientSharing()])
    assert "spare" in learner.engine.inner.adapted
    assert "spare" not in learner.meta_gradients(case.batch)


def test_selecting_nothing_is_refused():
    class Nothing(Plugin):
        @hookimpl
        def select_adapted(self):
            return ()

    with pytest.raises(
        RequestError, match=r"^the plugins select no parameter to adapt: leave at least one$"
    ):
        problem().learner(plugins=[Nothing()])
