"""A batch of gradients (is_grads_batched), torch.func and forward mode see through what has
derivatives written by hand, and what they give can be differentiated."""

import pytest
import torch
from support.blends import BLENDS
from torch.autograd import forward_ad
from torch.nn import functional as F

from metaplug.core import batch_norm, max_pool, vmap_rules
from metaplug.core.linear import linear
from metaplug.core.vmap_rules import TaskRules
from metaplug.testing import problem


def sharing(form):
    def function(x, weight):
        state = torch.tensor(True), torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype)
        gate, momentum = weight[0, 0, :1], weight[0, 0, 1:2]
        return BLENDS[form]([x], gate, momentum, *state, lambda mean: mean)[1][0]

    return function


def with_rules(function):
    def run(x, weight):
        with TaskRules():
            return function(x, weight)

    return run


FUNCTIONS = {
    "linear": lambda x, weight: linear(x[..., 0], weight, weight[..., 0]),
    "batch norm": lambda x, weight: batch_norm.batch_norm(x, weight[0, 0], weight[0, 1], 1e-5),
    "pooling of ReLU": with_rules(lambda x, weight: F.max_pool2d(F.relu(x * weight[0, 0, 0]), 2)),
    **{f"sharing {form}": sharing(form) for form in BLENDS},
}


def leaves():
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 4, 4), (2, 4, 4)
    drawn = [torch.randn(form, generator=generator, dtype=torch.float64) for form in shapes]
    return [each.requires_grad_() for each in drawn], generator


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_batch_of_gradients_is_that_of_one_after_the_other_and_so_are_its_derivatives(
    name, monkeypatch
):
    for module in (vmap_rules, max_pool):
        monkeypatch.setattr(module, "LARGE", 0)
    given, generator = leaves()
    result = FUNCTIONS[name](*given)
    ends = torch.randn(3, *result.shape, generator=generator, dtype=torch.float64)
    kept = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}

    def further(found):
        total = sum(each.sin().sum() for each in found)
        return torch.autograd.grad(total, given, **kept)

    at_once = torch.autograd.grad(result, given, ends, is_grads_batched=True, create_graph=True)
    apart = [torch.autograd.grad(result, given, end, create_graph=True) for end in ends]
    apart = [torch.stack(each) for each in zip(*apart, strict=True)]
    without = torch.autograd.grad(result, given, ends, is_grads_batched=True, retain_graph=True)
    for one, other in zip(
        (*at_once, *without, *further(at_once)), (*apart, *apart, *further(apart)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["linear", "batch norm"])
def test_a_tangent_goes_through_a_gradient(name):
    given, generator = leaves()
    result = FUNCTIONS[name](*given)
    end, tangent = (
        torch.randn(result.shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(end, tangent)
        found = torch.autograd.grad(result, given, dual, create_graph=True)
        along = [forward_ad.unpack_dual(each).tangent for each in found]
    expected = torch.autograd.grad(result, given, tangent)
    for one, other in zip(along, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_plugin_may_take_the_gradients_of_all_tasks_as_a_batch():
    def transform_inner_losses(losses, step):
        adapted = [each for each in step.parameters.values() if each.requires_grad]
        eye = torch.eye(len(losses), dtype=losses.dtype)
        given = {"is_grads_batched": True, "create_graph": True}
        found = torch.autograd.grad(losses, adapted, eye, **given)
        return losses + 0.1 * sum(each.square().flatten(2).sum((1, 2)) for each in found)

    case = problem(steps=2)
    stacked, apart = (
        case.learner(plugins=[transform_inner_losses], task_batching=batching).meta_gradients(
            case.batch
        )
        for batching in ("vectorized", "sequential")
    )
    for name, gradient in apart.items():
        torch.testing.assert_close(stacked[name], gradient, rtol=1e-10, atol=1e-10)
