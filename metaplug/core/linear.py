"""Linear layers with weights of every task, y = x Wᵀ + b, and their derivatives in few operations.

Of a gradient g on y and cotangents v, a, c on the first derivatives,

    dx = g W,   dW = gᵀ x,   db = Σ g,
    of g:  v Wᵀ + x aᵀ + c,   of x:  g a,   of W:  gᵀ v.

Autograd would find the same in three times as many calls, some of them products with few columns,
which take longer, and with matrices that lie transposed, which sums with others then go across.
Higher derivatives are autograd's, of these operations.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from metaplug.core.autograd_graph import is_seen_through


def takes(*tensors: Tensor | None) -> bool:
    """Whether `linear` has these: all of one real floating dtype, which autocast leaves alone."""
    given = [each for each in tensors if each is not None]
    dtype, device = given[0].dtype, given[0].device.type
    return (
        dtype.is_floating_point
        and all(each.dtype == dtype for each in given)
        and not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device))
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + b of every task.

    Args:
        x: (T, n, inputs).
        weight: (T, outputs, inputs).
        bias: (T, outputs); None for 0. All of one real floating dtype.

    Example:
        >>> x, weight = torch.ones(3, 4, 2), torch.ones(3, 5, 2)
        >>> linear(x, weight, torch.ones(3, 5)).shape
        torch.Size([3, 4, 5])
    """
    return cast("Tensor", _Linear.apply(x, weight, bias))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        if bias is None:
            return torch.bmm(x, weight.mT)
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        alone = torch.is_grad_enabled() and not is_seen_through(gradient)
        derive = _Backward.apply if alone else _derivatives
        return derive(gradient, x, weight, ctx.needs_input_grad)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...]
    ) -> Any:
        ctx.save_for_backward(gradient, x, weight)
        ctx.set_materialize_grads(False)
        return _derivatives(gradient, x, weight, wanted)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, a: Tensor | None, c: Tensor | None) -> Any:
        gradient, x, weight = ctx.saved_tensors
        to_gradient, to_x, to_weight, _ = ctx.needs_input_grad
        of_gradient = of_x = of_weight = None
        if to_gradient:
            of_gradient = None if c is None else c.unsqueeze(1).expand_as(gradient)
            if v is not None:
                of_gradient = _plus_product(of_gradient, v, weight.mT)
            if a is not None:
                of_gradient = _plus_product(of_gradient, x, a.mT)
        if to_x and a is not None:
            of_x = torch.bmm(gradient, a)
        if to_weight and v is not None:
            of_weight = torch.bmm(gradient.mT, v)
        return of_gradient, of_x, of_weight, None


def _derivatives(
    gradient: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return dx, dW and db, None where not wanted."""
    to_x, to_weight, to_bias = wanted
    return (
        torch.bmm(gradient, weight) if to_x else None,
        torch.bmm(gradient.mT, x) if to_weight else None,
        gradient.sum(1) if to_bias else None,
    )


def _plus_product(start: Tensor | None, one: Tensor, other: Tensor) -> Tensor:
    return torch.bmm(one, other) if start is None else torch.baddbmm(start, one, other)
