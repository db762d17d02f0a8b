"""Linear layers of all tasks: values and derivatives of every order are those of plain products."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metaplug.core.linear import linear, takes


def plain(x, weight, bias):
    return torch.bmm(x, weight.mT) + (0 if bias is None else bias.unsqueeze(1))


def derivatives(function, inputs, order):
    """What the function gives, and the gradients of squares of gradients, as often as asked."""
    found = [function(*inputs).sin()]
    leaves = [each for each in inputs if each is not None and each.requires_grad]
    for _ in range(order):
        total = sum(each.square().sum() for each in found)
        found = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
    return found


@given(
    tasks=st.integers(1, 3),
    rows=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    learn=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any),
    with_bias=st.booleans(),
    shared=st.booleans(),
    turned=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_derivative_is_that_of_plain_products(  # noqa: PLR0917
    tasks, rows, sizes, learn, with_bias, shared, turned, seed
):
    generator = torch.Generator().manual_seed(seed)
    inner, outer = sizes
    shapes = [(tasks, rows, inner), (tasks, outer, inner), (tasks, outer)]
    given = [torch.randn(form, generator=generator, dtype=torch.float64) for form in shapes]
    if turned:
        given[:2] = [each.mT.contiguous().mT for each in given[:2]]
    if shared:  # as in the first step, when all tasks have the same weights
        given[1:] = [each[:1].expand_as(each) for each in given[1:]]
    given = [each.requires_grad_(wanted) for each, wanted in zip(given, learn, strict=True)]
    if not with_bias:
        given[2] = None
    if not any(each is not None and each.requires_grad for each in given):
        return
    for order in range(4):
        ours, theirs = (derivatives(function, given, order) for function in (linear, plain))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_derivative_that_nobody_asks_for_is_not_computed(monkeypatch):
    x, weight = torch.randn(2, 3, 4), torch.randn(2, 5, 4, requires_grad=True)
    y = linear(x, weight, None)
    products, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args: products.append(args) or bmm(*args))
    torch.autograd.grad(y.sum(), weight)
    assert len(products) == 1


@pytest.mark.parametrize(
    ("dtypes", "taken"),
    [
        ((torch.float32, torch.float32), True),
        ((torch.bfloat16, torch.bfloat16), True),
        ((torch.float32, torch.float64), False),
        ((torch.complex64, torch.complex64), False),
        ((torch.int64, torch.int64), False),
    ],
)
def test_dtypes_that_products_mix_or_conjugate_are_left_to_torch(dtypes, taken):
    assert takes(*(torch.ones(1, dtype=dtype) for dtype in dtypes), None) is taken
    with torch.autocast("cpu"):
        assert not takes(*(torch.ones(1, dtype=dtype) for dtype in dtypes), None)
