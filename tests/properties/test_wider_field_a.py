"""What is differentiated other than through the loop, against loops written from the papers."""

from __future__ import annotations

import pytest
import torch
from support import plugins
from support.counting import operations
from torch.nn import functional as F

from metaplug import RunError
from metaplug.testing import assert_close, problem
from metaplug.testing.reference import predict

LOOSE = {"rtol": 1e-7, "atol": 1e-9}
"""For models with batch norm, which amplifies the order of sums."""
BATCHINGS = [
    {"task_batching": "sequential"},
    {"checkpoint_steps": 1},
    {"chunk_size": 1},
]


def refused(make, error):
    with pytest.raises(error) as told:
        make()
    return str(told.value)


def tasks_of(batch):
    return zip(batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True)


def loss_of(case):
    return F.cross_entropy if case.kind == "classification" else F.mse_loss


def own(weights):
    """The same values as variables of their own."""
    return {name: each.detach().clone().requires_grad_() for name, each in weights.items()}


def flat(tensors):
    return torch.cat([each.flatten() for each in tensors])


def means(by_task):
    """The mean over tasks of meta-gradients by name."""
    return {name: torch.stack([task[name] for task in by_task]).mean(0) for name in by_task[0]}


# Order 0, and Reptile.


def reptile(order, *between):
    return [plugins.make("derivative-order", order=order), *between, plugins.make("reptile")]


@pytest.mark.parametrize("name", ["mlp", "conv4"])
@pytest.mark.parametrize("beside", [(), ("head",), ("body",)])
def test_reptile_of_order_0_has_the_meta_gradients_of_order_1_bit_for_bit(name, beside):
    for steps in (0, 2):
        case = problem(name, steps=steps)
        first, none = (
            case.learner(
                plugins=reptile(
                    order, *(plugins.make("partial-adaptation", adapts=a) for a in beside)
                )
            ).meta_gradients(case.batch)
            for order in (1, 0)
        )
        assert_close(none, first, rtol=0, atol=0)


def test_what_order_0_would_never_teach_is_refused_by_name():
    case = problem()
    given_up = reptile(0, plugins.make("meta-sgd"))
    assert refused(lambda: case.learner(plugins=given_up).meta_gradients(case.batch), RunError) == (
        "plugin 'reptile' in compute_meta_gradients (link 1 of 1, iteration 0) answered names that "
        "are not meta-learned (none) or left out a plugin's parameters ('meta-sgd.rates.0/bias', "
        "'meta-sgd.rates.0/weight', 'meta-sgd.rates.2/bias', 'meta-sgd.rates.2/weight'), which "
        "would then never learn: answer by the names of MetaLearner.meta_gradients"
    )
    alone = [plugins.make("derivative-order", order=0)]
    assert refused(lambda: case.learner(plugins=alone).meta_gradients(case.batch), RunError) == (
        "derivative order 0 leaves no way from the outer loss to what tasks start from, so it would "
        "never learn: add a plugin that makes meta-gradients itself, such as reptile or imaml, or "
        "use order 1 or 2"
    )


def test_order_0_anneals_to_second_order_as_order_1_does():
    case = problem()
    switched = case.learner(plugins=[plugins.make("derivative-order", order=0, switch=0)])
    assert_close(
        switched.meta_gradients(case.batch),
        case.learner().meta_gradients(case.batch),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("name", ["mlp", "conv4"])
def test_order_0_costs_the_forward_and_backward_passes_alone(name):
    case = problem(name, tasks=1, steps=4)
    learner = case.learner(plugins=reptile(0), task_batching="sequential")
    learner.meta_gradients(case.batch)  # what is found out about a model once

    def plain():
        ((x, y, query_x, query_y),) = tasks_of(case.batch)
        weights = own(dict(case.model.named_parameters()))
        for _ in range(case.steps):
            taken = torch.autograd.grad(
                F.cross_entropy(predict(case.model, weights, x), y), list(weights.values())
            )
            weights = {
                name: (each - case.lr * gradient).detach().requires_grad_()
                for (name, each), gradient in zip(weights.items(), taken, strict=True)
            }
        F.cross_entropy(predict(case.model, weights, query_x), query_y)

    assert operations(lambda: learner.meta_gradients(case.batch)) == operations(plain)
