"""L2F, ALFA and MeTAL against loops written from their equations, task by task, and what must hold
of each."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import plugins
from support.plain_loop import one, predict
from torch.nn import functional as F

from metaplug import MetaLearner, RequestError, TaskBatch
from metaplug.testing import MODELS, Stream, assert_close, found, problem
from metaplug.testing.comparing import evaluation, training
from metaplug.testing.strategies import problems, seeds

EXACT = {"rtol": 1e-10, "atol": 1e-12}
MODES = ("task_batching", "vectorized"), ("task_batching", "sequential"), ("checkpoint_steps", 1)
CLOSE = {"rtol": 1e-7, "atol": 1e-9}
"""Over drawn models: other kernels, whose rounding batch norm over few examples amplifies."""


def learner_of(case, plugin, *, seed=0, spread=0.3, **given):
    """A learner whose plugin's meta-parameters are not where they start, so that all act."""
    torch.manual_seed(seed)
    learner = case.learner(plugins=[plugin], **given)
    generator = torch.Generator().manual_seed(seed)
    for parameter in learner.chain.named_parameters().values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data += spread * noise
    return learner


def tasks_of(batch):
    return [one(batch.tasks(slice(row, row + 1))) for row in range(batch.num_tasks)]


def grad(loss, weights, **given):
    """The gradient of a loss by name."""
    taken = torch.autograd.grad(loss, list(weights.values()), create_graph=True, **given)
    return dict(zip(weights, taken, strict=True))


def own(weights):
    """The same values as variables of their own."""
    return {name: value.view_as(value) for name, value in weights.items()}


def plain(case, learner, *, start=None, objective=None, update=None):
    """MAML task by task, with what a plugin changes as functions; the meta-parameters of `learner`.

    Args:
        start: (model, weights, x, y) → weights.
        objective: (model, weights, step, task, its prediction, its loss) → what is descended.
        update: (weights, gradients, step) → weights.
    """
    model = learner.model
    weights = dict(model.named_parameters())
    losses, adapted = [], []
    for task in tasks_of(case.batch):
        x, y, query_x, query_y = task
        fast = own(weights)
        if start is not None:
            fast = start(model, fast, x, y)
        for step in range(case.steps):
            fast = own(fast)
            prediction = predict(model, fast, x)
            loss = F.cross_entropy(prediction, y)
            if objective is not None:
                loss = objective(model, fast, step, task, prediction, loss)
            gradients = grad(loss, fast)
            if update is None:
                fast = {name: fast[name] - case.lr * gradients[name] for name in fast}
            else:
                fast = update(fast, gradients, step)
        losses.append(F.cross_entropy(predict(model, fast, query_x), query_y))
        adapted.append(fast)
    outer = torch.stack(losses).mean()
    wanted = {**weights, **learner.chain.named_parameters()}
    return adapted, outer, grad(outer, wanted)


def assert_equals(learner, case, expected):
    adapted, outer, gradients = expected
    taken = found(learner, case.batch)
    for name, value in taken.outcome.adapted_parameters.items():
        torch.testing.assert_close(value, torch.stack([each[name] for each in adapted]), **EXACT)
    torch.testing.assert_close(taken.outer_loss, outer.detach(), **EXACT)
    assert taken.gradients.keys() == gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(taken.gradients[name], value.detach(), **EXACT)


def named(learner, plugin):
    """A plugin's meta-parameters by their own names."""
    given = learner.chain.named_parameters().items()
    return {name.removeprefix(f"{plugin}."): value for name, value in given}


def two_layers(given, x, prefix="network"):
    """W₂ relu(W₁ x + b₁) + b₂."""
    hidden = (given[f"{prefix}.0.weight"] @ x + given[f"{prefix}.0.bias"]).relu()
    return given[f"{prefix}.2.weight"] @ hidden + given[f"{prefix}.2.bias"]


def bits_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# L2F.


def attenuation(learner, *, strength=1.0, detach=False):
    given = named(learner, "l2f")

    def start(model, weights, x, y):
        gradients = grad(F.cross_entropy(predict(model, weights, x), y), weights)
        means = torch.stack([gradient.mean() for gradient in gradients.values()])
        gates = two_layers(given, means.detach() if detach else means).sigmoid()
        return {
            name: (1 - strength * (1 - gate)) * weight
            for (name, weight), gate in zip(weights.items(), gates, strict=True)
        }

    return start


@pytest.mark.parametrize("settings", [{}, {"strength": 0.6}, {"detach": True}])
@pytest.mark.parametrize("name", ["mlp", "conv4"])
def test_l2f_is_its_equation(name, settings):
    case = problem(name, tasks=3, steps=2)
    learner = learner_of(case, plugins.make("l2f", **settings))
    assert_equals(learner, case, plain(case, learner, start=attenuation(learner, **settings)))


@given(problems(("mlp", "layer-norm", "tied", "conv4"), tasks=(1, 4), lrs=(0.01, 0.3)), seeds)
def test_l2f_whose_gates_are_open_is_maml(case, seed):
    """γ → 1 as b₂ → ∞, and each task starts from no more than the shared weights."""
    learner = learner_of(case, plugins.make("l2f"), seed=seed)
    started = found(learner, case.batch).outcome.initial_parameters
    for name, weight in learner.model.named_parameters():
        assert (started[name].abs() <= weight.abs()).all()
    learner.engine.meta_parameters["l2f.network.2.bias"].data.fill_(1e4)
    ours, theirs = found(learner, case.batch), found(case.learner(), case.batch)
    shared = {name: ours.gradients[name] for name in theirs.gradients}
    assert_close(shared, dict(theirs.gradients), **CLOSE)
