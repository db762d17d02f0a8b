"""The optimizers of the outer loop, against torch's unfused ones."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from metaplug.contract.function_plugins import plugin_of
from metaplug.execution.gradients import first_nonfinite
from metaplug.execution.meta_optimizer import META_OPTIMIZERS, step_fused
from metaplug.testing import assert_close, problem

LAYOUTS = {
    "plain": lambda each: each.contiguous(),
    "transposed": lambda each: each.mT.contiguous().mT,
    "channels-last": lambda each: each.contiguous(memory_format=torch.channels_last),
}


def updated(name, values, gradients, steps, between=lambda parameter, optimizer: None):
    """The parameters after a few steps, by `steps(optimizer)`."""
    parameters = [nn.Parameter(value.clone()) for value in values]
    optimizer = META_OPTIMIZERS[name](parameters, lr=0.1)
    for factor in (1.0, -3.0, 0.5):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = factor * gradient
        steps(optimizer)
        between(parameters, optimizer)
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("name", META_OPTIMIZERS)
@pytest.mark.parametrize("of", list(itertools.product(LAYOUTS, LAYOUTS)), ids="-".join)
def test_any_layout_of_parameters_and_gradients_gives_the_same_update(name, of):
    values, gradients = (
        [LAYOUTS[layout](torch.randn(3, 2, 5, 4, dtype=torch.float64)), torch.randn(7).double()]
        for layout in of
    )
    unfused = updated(name, values, gradients, lambda optimizer: optimizer.step())
    for one, other in zip(updated(name, values, gradients, step_fused), unfused, strict=True):
        assert_close(one, other)


def test_a_state_that_is_loaded_or_a_layout_that_changes_gives_the_same_update():
    values = [LAYOUTS["channels-last"](torch.randn(3, 2, 5, 4, dtype=torch.float64))]
    gradients = [torch.randn(3, 2, 5, 4, dtype=torch.float64)]

    def plain(parameters, optimizer):
        """Let the parameter lie otherwise than its state."""
        with torch.no_grad():
            parameters[0].data = parameters[0].data.contiguous()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    unfused = updated("adam", values, gradients, lambda optimizer: optimizer.step())
    (found,) = updated("adam", values, gradients, step_fused, plain)
    assert_close(found, unfused[0])


def test_complex_weights_and_those_without_a_gradient_are_updated_as_torch_does():
    values = [torch.randn(3, dtype=torch.complex128), torch.randn(2, dtype=torch.float64)]
    parameters = [nn.Parameter(value.clone()) for value in values]
    others = [nn.Parameter(value.clone()) for value in values]
    for given, step in ((parameters, step_fused), (others, lambda each: each.step())):
        optimizer = META_OPTIMIZERS["adam"](given, lr=0.1)
        given[0].grad = torch.ones_like(given[0])
        step(optimizer)
        assert len(optimizer.state) == 1  # else a checkpoint would have an empty one
    assert torch.equal(parameters[0], others[0])
    assert torch.equal(parameters[1], values[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_the_first_parameter_that_is_not_finite_is_found_in_any_dtype(dtype):
    values = {"a": torch.ones(2), "b": torch.full((3,), 2.0, dtype=dtype)}
    assert first_nonfinite(values, torch.device("cpu")) is None
    largest = torch.finfo(torch.float32).max  # a sum that overflows is no fault of an entry
    assert first_nonfinite({**values, "a": torch.full((2,), largest)}, torch.device("cpu")) is None
    for bad in (math.inf, -math.inf, math.nan):
        values["b"][1] = bad
        assert first_nonfinite(values, torch.device("cpu")) == "b"


def test_a_step_without_a_meta_gradient_has_norm_zero_and_updates_nothing():
    def compute_meta_gradients(outcome):
        return {}

    case = problem()
    learner = case.learner(plugins=[plugin_of(compute_meta_gradients)()])
    before = {name: each.clone() for name, each in learner.model.named_parameters()}
    step = learner.engine.meta_step(case.batch, 1)
    assert step.meta_gradient_norm == 0
    assert_close(dict(learner.model.named_parameters()), before, rtol=0, atol=0)
