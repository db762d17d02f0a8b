"""Batch norm with its own second derivative is torch's, and what its equation gives."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from metaplug import MetaLearner, TaskBatch
from metaplug.core import batch_norm as module
from metaplug.core import max_pool, vmap_rules
from metaplug.core.batch_norm import batch_norm
from metaplug.core.vmap_rules import TaskRules, for_all_tasks
from metaplug.models.conv4 import Conv4

EPS = 1e-5
SHAPES = [(6, 3), (5, 3, 4), (5, 3, 4, 2), (1, 3, 4, 2), (2, 3, 2, 2, 3)]


def torchs(x, weight, bias):
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)


def by_equation(x, weight, bias):
    axes = [axis for axis in range(x.dim()) if axis != 1]
    form = (-1, *(1,) * (x.dim() - 2))
    apart = x - x.mean(axes, keepdim=True)
    y = apart / (apart.square().mean(axes, keepdim=True) + EPS).sqrt()
    y = y if weight is None else y * weight.view(form)
    return y if bias is None else y + bias.view(form)


def ours(x, weight, bias):
    return batch_norm(x, weight, bias, EPS)


def derivatives(function, given, *, orders=2):
    """The result, and gradients up to an order, each of uneven sums of those before."""
    values, found = [function(*given)], []
    leaves = [each for each in given if each is not None]
    for order in range(orders + 1):
        found += values
        total = sum((each.sin() * uneven(each)).sum() for each in values if each.requires_grad)
        if order < orders:
            more = order + 1 < orders
            values = torch.autograd.grad(total, leaves, create_graph=more, materialize_grads=True)
    return found


def agree(one, other):
    """To 1e-10 of the largest value: those near 0 are sums in which larger ones cancel."""
    bound = 1e-10 * (1 + other.detach().abs().max().item())
    torch.testing.assert_close(one, other, rtol=1e-10, atol=bound)


def uneven(like):
    return torch.linspace(-1, 2, like.numel(), dtype=like.dtype).view(like.shape)


def inputs(shape, seed, *, weight=True, bias=True):
    generator = torch.Generator().manual_seed(seed)
    x, *both = (
        torch.randn(form, generator=generator, dtype=torch.float64).requires_grad_()
        for form in (shape, shape[1], shape[1])
    )
    return x, *(value if given else None for value, given in zip(both, (weight, bias), strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(weight=st.booleans(), bias=st.booleans(), seed=st.integers(0, 99))
def test_derivatives_to_third_order_are_those_of_the_equation(shape, weight, bias, seed):
    given_ = inputs(shape, seed, weight=weight, bias=bias)
    found, expected = (derivatives(each, given_, orders=3) for each in (ours, by_equation))
    for one, other in zip(found, expected, strict=True):
        agree(one, other)
    # Without a graph for more, the second derivative is the one of few passes.
    for one, other in zip(derivatives(ours, given_), expected, strict=False):
        agree(one, other)


def test_a_constant_gradient_is_differentiated_to_third_order():
    found = []
    for norm in (ours, by_equation):
        x, weight, _ = inputs((5, 3, 4, 2), 0, bias=False)
        total = (norm(x, weight.detach(), None) * uneven(x)).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(total, x, create_graph=True)
            total = gradient.square().sum()
        found.append(gradient)
    agree(*found)


@pytest.mark.parametrize("case", ["zero scale", "constant channel", "channels last", "strided"])
def test_second_derivatives_are_torchs(case):
    x, weight, bias = inputs((5, 3, 4, 6), 0)
    with torch.no_grad():
        if case == "zero scale":
            weight.zero_()
        if case == "constant channel":
            x[:, 1] = 0.3
    if case == "channels last":
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    function = {"strided": lambda norm: lambda x, *more: norm(x.mT, *more).mT}.get(case)
    pair = [function(norm) if function else norm for norm in (ours, torchs)]
    found, expected = (derivatives(each, (x, weight, bias)) for each in pair)
    for one, other in zip(found, expected, strict=True):
        # Rounding in a channel of variance 0 is magnified by s³ = ε ** -1.5.
        agree(one, other)


def test_a_constant_channel_is_its_shift():
    x = torch.full((5, 2, 4, 4), 0.3)
    y = batch_norm(x, torch.ones(2), torch.zeros(2), EPS)
    assert torch.equal(y, torch.zeros_like(y))


def test_channels_far_from_zero_keep_their_digits():
    x = torch.randn(8, 2, 16, 16, generator=torch.Generator().manual_seed(0)) + 1000
    exact = batch_norm(x.double(), None, None, EPS).float()
    torch.testing.assert_close(batch_norm(x, None, None, EPS), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(25, 2, 18, 18), (2000, 2), (2000, 2, 1, 1)], ids=str)
def test_one_value_far_from_the_others_costs_no_digits(shape):
    """As at a padded corner."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[0].view(2, -1)[:, 0] = 1000.0
    exact = batch_norm(x.double(), None, None, EPS).float()
    torch.testing.assert_close(batch_norm(x, None, None, EPS), exact, rtol=2e-6, atol=2e-6)


def test_a_batch_of_gradients_is_taken_at_once():
    x, weight, bias = inputs((5, 3, 4, 2), 0)
    gradients = torch.randn(4, 5, 3, 4, 2, dtype=torch.float64)
    pairs = [
        torch.autograd.grad(norm(x, weight, bias), (x, weight), gradients, is_grads_batched=True)
        for norm in (ours, torchs)
    ]
    for one, other in zip(*pairs, strict=True):
        agree(one, other)


@pytest.mark.parametrize("stacked", [True, False])
def test_layers_of_models_take_it_where_they_are_large(stacked, monkeypatch):
    x, weight, bias = inputs((5, 3, 4, 2), 0)

    def result():
        if stacked:
            rows = [each[None].expand(2, *each.shape) for each in (weight, bias)]
            given = rows, [False, False], x[None].expand(2, *x.shape), torch.zeros(2)
            task = lambda values, x, y: (y, torchs(x, *values))  # noqa: E731
            return for_all_tasks(task, *given)[1][1]
        with TaskRules():
            return torchs(x, weight, bias)

    small = result()
    monkeypatch.setattr(module, "LARGE", 0)
    large = result()
    torch.testing.assert_close(large, small, rtol=1e-12, atol=1e-12)
    assert "_BatchNormBackward" in names(large)
    assert "_BatchNormBackward" not in names(small)


def test_a_trace_gives_the_second_derivative():
    given = inputs((5, 3, 4, 2), 0)

    def second(*values):
        leaves = [each.detach().requires_grad_() for each in values]
        return derivatives(ours, leaves)

    for one, other in zip(make_fx(second)(*given)(*given), second(*given), strict=True):
        agree(one, other)


@pytest.mark.parametrize("x", [torch.ones(1, 3), torch.ones(5, 3, dtype=torch.bfloat16)], ids=str)
def test_torch_decides_on_what_it_does_not_take(x, monkeypatch):
    monkeypatch.setattr(module, "LARGE", 0)
    answers = []
    for mode in (TaskRules, nullcontext):
        with mode():
            try:
                answers.append(torchs(x, None, None))
            except ValueError as error:
                answers.append(str(error))
    assert str(answers[0]) == str(answers[1])


def names(tensor):
    found, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            found.add(node.name())
            waiting += [source for source, _ in node.next_functions]
    return found


@pytest.mark.parametrize("pooling", ["max", "stride"])
@pytest.mark.parametrize(
    "runtime",
    [{}, {"checkpoint_steps": 1}, {"chunk_size": 2}, {"plugins": ["per-step-batch-norm"]}],
    ids=str,
)
def test_meta_gradients_of_convolutional_models_are_those_by_torchs_layers(
    pooling, runtime, monkeypatch
):
    """Tasks stacked, and one by one."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Conv4((1, 16, 16), 3, filters=4, pooling=pooling).double()
    x = torch.randn(2, 3, 6, 1, 16, 16, generator=generator, dtype=torch.float64)
    y = torch.arange(3).repeat(3, 2)
    batch = TaskBatch(x[0], y, x[1], y)

    def gradients(batching):
        learner = MetaLearner(model, inner_steps=2, inner_lr=0.1, task_batching=batching, **runtime)
        return learner.meta_gradients(batch)

    expected = gradients("sequential")
    for each in (module, max_pool, vmap_rules):
        monkeypatch.setattr(each, "LARGE", 0)
    found = [gradients("vectorized"), gradients("sequential")]
    for each in found:
        assert each.keys() == expected.keys()
        for name, value in expected.items():
            agree(each[name], value)
