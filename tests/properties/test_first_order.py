"""First order, for good or until an iteration: against MAML, FOMAML and the analytic first-order
gradient."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from metaplug_plugins.derivative_order import DerivativeOrder

from metaplug.testing import Stream, assert_close, found, reference
from metaplug.testing.strategies import problems


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@given(problems())
def test_switch_zero_is_maml_and_null_is_fomaml_bit_for_bit(case):
    gradients = {
        switch: case.learner(plugins=[DerivativeOrder(switch=switch)]).meta_gradients(case.batch)
        for switch in (0, None, 1_000_000)
    }
    assert same(gradients[0], case.learner(preset="maml").meta_gradients(case.batch))
    assert same(gradients[None], case.learner(preset="fomaml").meta_gradients(case.batch))
    assert same(gradients[None], gradients[1_000_000])


@given(problems(steps=(1, 3)), st.integers(0, 3))
def test_second_order_begins_at_the_switch(case, switch):
    learner = case.learner(plugins=[DerivativeOrder(switch=switch)])
    learner.meta_gradients(case.batch)
    orders = {
        1: case.learner(preset="fomaml").meta_gradients(case.batch),
        2: case.learner(preset="maml").meta_gradients(case.batch),
    }
    for iteration in range(4):
        ours = learner.engine.meta_gradients(case.batch, iteration, 0).gradients
        assert same(dict(ours), orders[2 if iteration >= switch else 1])


@given(problems(steps=(0, 3)))
def test_first_order_is_the_query_gradient_at_the_adapted_weights(case):
    """dL/dθ = mean over t of ∂ℓ(query t; θ[t,K])/∂θ[t,K]: the Jacobian of the inner loop counts as
    the identity."""
    learner = case.learner(preset="fomaml")
    outcome = found(learner, case.batch).outcome
    expected = {
        name: torch.zeros_like(parameter) for name, parameter in case.model.named_parameters()
    }
    for task in range(case.batch.num_tasks):
        weights = {
            name: weight[task].detach().requires_grad_()
            for name, weight in outcome.adapted_parameters.items()
        }
        prediction = reference.predict(case.model, weights, case.batch.query_x[task])
        loss = torch.nn.functional.cross_entropy(prediction, case.batch.query_y[task])
        for name, gradient in zip(
            weights, torch.autograd.grad(loss, list(weights.values())), strict=True
        ):
            expected[name] += gradient / case.batch.num_tasks
    assert_close(learner.meta_gradients(case.batch), expected, rtol=1e-9, atol=1e-10)


@given(problems(("mlp", "batch-norm"), steps=(1, 3)))
def test_evaluation_asks_for_no_order(case):
    results = [
        case.learner(plugins=plugins).evaluate(Stream(split="test"), num_tasks=3).per_task
        for plugins in ([], [DerivativeOrder()], [DerivativeOrder(switch=0)])
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
