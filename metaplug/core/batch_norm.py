"""Batch norm on a CPU, with a second derivative of a few passes over memory; torch's takes twenty.

With N values in a channel, s = 1 / √(variance + ε) and x̂ = (x - mean) s,

    y  = γ x̂ + β
    dx = γ s P(g),  dγ = Σ g x̂,  dβ = Σ g,  where P(h) = h - Σ h / N - x̂ Σ h x̂ / N,

of a gradient g. Of cotangents v, a, b on dx, dγ, dβ the second derivative is, with
A = Σ v g - Σ v Σ g / N - Σ v x̂ Σ g x̂ / N,

    of g:  γ s P(v) + a x̂ + b
    of x:  c₁ s P(v) + c₂ s P(g) - γ A s² x̂ / N,
           where c₁ = -γ s Σ g x̂ / N and c₂ = a - γ s Σ v x̂ / N
    of γ:  s A.

All sums are over a channel. Higher derivatives are autograd's, of elementary operations.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from metaplug.core.autograd_graph import is_seen_through

LARGE = 2**16
"""Elements from which this takes about torch's time in first order, and a fraction in second."""


def takes(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether `batch_norm` has this input (n, channels, ...), and in less time than torch."""
    dtypes = {each.dtype for each in (x, weight, bias) if each is not None}
    return (
        x.device.type == "cpu"
        and x.dim() > 1
        and x.numel() >= max(LARGE, 2 * x.shape[1])
        and dtypes in ({torch.float32}, {torch.float64})
    )


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalize by the statistics of the batch, as `F.batch_norm(training=True)` does.

    Args:
        x: (n, channels, ...), at least two values in a channel, float32 or float64.
        weight, bias: γ and β, (channels,), in the dtype of x; None for 1 and 0.
    """
    return cast("Tensor", _BatchNorm.apply(x, weight, bias, eps)[0])


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Moments about a value of the channel: torch's own take three times as long, and those
        # about 0 would cancel. A constant channel is exactly 0 from here on, as in torch.
        pivot = _typical(x)
        apart = x - _by_channel(pivot, x)
        zero, one = torch.zeros_like(pivot), torch.ones_like(pivot)
        _, square, offset = _derivatives(apart, apart, None, zero, one, of_x=False)
        square, offset = square / _count(x), offset / _count(x)
        inverse = (square - offset.square()).clamp_min_(0).add_(eps).rsqrt_()
        scale = inverse if weight is None else weight * inverse
        shift = -offset * scale if bias is None else bias - offset * scale
        y = apart.mul_(_by_channel(scale, x)).add_(_by_channel(shift, x))
        return y, pivot + offset, inverse

    @staticmethod
    def vmap(_: Any, in_dims: Any, *inputs: Any) -> tuple[Any, tuple[None, None, None]]:
        return _BatchNorm.apply(*inputs), (None, None, None)  # the tasks are folded already

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, ctx.eps = inputs
        _, mean, inverse = output
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, inverse)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
        x, weight, mean, inverse = ctx.saved_tensors
        if is_seen_through(gradient):
            found: Any = _elementary(gradient, x, weight, ctx.eps)
        else:
            # Without a graph for more, the values alone: `apply` costs more than small sums.
            derive = _Backward.apply if torch.is_grad_enabled() else _Backward.forward
            found = derive(gradient, x, weight, mean, inverse, ctx.eps)
        of_x, of_weight, of_bias = found
        return of_x, None if weight is None else of_weight, of_bias if ctx.has_bias else None, None


class _Backward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # noqa: PLR0917
        gradient: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        inverse: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _derivatives(_alike(gradient, x), x, weight, mean, inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.eps = inputs
        _, of_weight, of_bias = output
        ctx.save_for_backward(*tensors, of_weight, of_bias)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        if torch.is_grad_enabled():
            gradient, x, weight, *_ = ctx.saved_tensors
            found = _by_autograd(gradient, x, weight, ctx.eps, cotangents)
        else:
            found = _second_derivatives(*ctx.saved_tensors, *cotangents)
        return *found, None, None, None


def _derivatives(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    *,
    of_x: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dγ and dβ: γ s P(g), Σ g x̂ and Σ g."""
    kernel: Any = torch.ops.aten.native_batch_norm_backward
    return cast(
        "tuple[Tensor, Tensor, Tensor]",
        kernel(gradient, x, weight, None, None, mean, inverse, True, 0.0, [of_x, True, True]),
    )


def _second_derivatives(  # noqa: PLR0917
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    of_weight: Tensor,
    of_bias: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the derivatives of the gradient, of x and of γ, by the equations of this module."""
    count, one = _count(x), torch.ones_like(mean)
    gradient, v = _alike(gradient, x), _alike(v, x)
    projected, along, _ = _derivatives(v, x, None, mean, inverse)
    _, product, _ = _derivatives(v, gradient, None, of_bias / count, one, of_x=False)
    product = product - along * of_weight / count
    scale = inverse if weight is None else weight * inverse
    slope = a * inverse
    of_gradient = _line(x, slope, b - slope * mean)
    if weight is None:
        of_gradient += projected
    else:
        of_gradient.addcmul_(projected, _by_channel(weight, x))
    first = -scale * of_weight / count
    second = (a - scale * along / count) * inverse
    slope = -(second * of_weight + scale * inverse * product) * inverse / count
    of_x = _line(x, slope, -second * of_bias / count - slope * mean)
    of_x.addcmul_(projected, _by_channel(first, x)).addcmul_(gradient, _by_channel(second, x))
    return of_gradient, of_x, None if weight is None else inverse * product


def _by_autograd(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cotangents: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """Return the same as what can be differentiated further."""
    given = [None if each is None else each.view_as(each) for each in (gradient, x, weight)]
    gradient, x, weight = cast("Any", given)  # views: their own graphs are not to be walked
    derivatives = _elementary(gradient, x, weight, eps)
    wanted = [each for each in given if each is not None and each.requires_grad]
    pairs = zip(derivatives, cotangents, strict=True)  # of a constant gradient, Σ g is constant too
    ends, into = zip(*((one, to) for one, to in pairs if one.requires_grad), strict=True)
    found = iter(torch.autograd.grad(ends, wanted, into, create_graph=True))
    return tuple(next(found) if any(each is one for one in wanted) else None for each in given)


def _elementary(
    gradient: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dγ and dβ by operations that autograd, and whatever else, can see through."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    apart = x - x.mean(axes, keepdim=True)
    inverse = (apart.square().mean(axes, keepdim=True) + eps).rsqrt()
    normal = apart * inverse
    of_x = gradient - gradient.mean(axes, keepdim=True)
    of_x = (of_x - normal * (gradient * normal).mean(axes, keepdim=True)) * inverse
    if weight is not None:
        of_x = of_x * _by_channel(weight, x)
    return of_x, (gradient * normal).sum(axes), gradient.sum(axes)


def _typical(x: Tensor) -> Tensor:
    """A value of every channel (channels,), the median of a few: one at a border may be far off."""
    values = x[0].flatten(1) if x[0, 0].numel() > 1 else x.flatten(1).mT
    stride = -(-values.shape[1] // 9)
    return values[:, stride // 3 :: stride].median(1).values


def _line(x: Tensor, slope: Tensor, start: Tensor) -> Tensor:
    """slope · x + start, channel by channel, in one pass: batch norm by statistics 0 and 1."""
    zero, one = torch.zeros_like(slope), torch.ones_like(slope)
    return torch.native_batch_norm(x, slope, start, zero, one, False, 0.0, 0.0)[0]


def _alike(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient in the layout of x where that is torch's first, which its kernel needs."""
    return gradient.contiguous() if x.is_contiguous() else gradient


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """(channels,) in a form that broadcasts with x."""
    return values.view(-1, *(1,) * (x.dim() - 2))


def _count(x: Tensor) -> int:
    return x.numel() // x.shape[1]
