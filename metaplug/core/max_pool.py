"""Max-pooling on a CPU, as one unit with the activation before it, and the activation alone.

A maximum of max(h, 0) is max(h, 0) of a maximum, and the same with a slope s > 0 below zero: so
the activation's derivative is taken after pooling, at a part of the places, and its result need not
be kept. Places, values and gradients are those of one after the other, bit for bit; of a slope
where windows overlap, sums of gradients to rounding.

torch differentiates both with respect to their results too, which gives zeros that it fills and
adds; here results are detached.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

LARGE = 2**16
"""Elements from which this takes less time than torch's own."""


def activate(x: Tensor, slope: float) -> Tensor:
    """Return max(x, 0), or where `slope` > 0 max(x, slope · x)."""
    return cast("Tensor", _Activation.apply(x, slope))


def pool(x: Tensor, source: Tensor, slope: float | None, settings: tuple[Any, ...]) -> Tensor:
    """Return the maxima of x by torch's kernel for channels that lie last, in less time.

    Args:
        x: (n, channels, height, width), contiguous: `activate(source, slope)`, or the source where
            the slope is None.
        source: what autograd differentiates with respect to.
        settings: kernel size, stride, padding, dilation, and whether the size is rounded up.
    """
    return cast("Tensor", _MaxPool2d.apply(x.detach(), source, slope, settings)[0])


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, slope: float) -> Tensor:
        return F.leaky_relu(x, slope) if slope else torch.relu(x)

    @staticmethod
    def vmap(_: Any, in_dims: Any, x: Tensor, slope: float) -> tuple[Any, None]:
        return _Activation.apply(x, slope), None  # the tasks are one axis among others already

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.slope = inputs[1]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (result,) = ctx.saved_tensors
        aten, result = torch.ops.aten, result.detach()
        if ctx.slope:
            return aten.leaky_relu_backward(gradient, result, ctx.slope, True), None
        return aten.threshold_backward(gradient, result, 0), None


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, source: Tensor, slope: float | None, settings: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        channels = x.shape[1] if x.shape[1] <= 128 else math.gcd(x.shape[1], 64)
        planes = x.view(-1, channels, *x.shape[2:]).contiguous(memory_format=torch.channels_last)
        pooled, indices = torch.ops.aten.max_pool2d_with_indices(planes, *settings)
        form = (*x.shape[:2], *pooled.shape[2:])
        # No view: what a Function returns as a view cannot be written to in place.
        pooled = torch.ops.aten._unsafe_view(pooled.contiguous(), form)
        return pooled, indices.contiguous().view(form)

    @staticmethod
    def vmap(_: Any, in_dims: Any, *inputs: Any) -> tuple[Any, tuple[None, None]]:
        return _MaxPool2d.apply(*inputs), (None, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, _, ctx.slope, _ = inputs
        pooled, indices = output
        ctx.form = x.shape
        # Of the maxima the signs alone are kept: others may write to what follows a pooling.
        kept = () if ctx.slope is None else (pooled > 0 if ctx.slope else pooled <= 0,)
        ctx.save_for_backward(indices, *kept)
        ctx.mark_non_differentiable(indices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Any:
        indices, *signs = ctx.saved_tensors
        for sign in signs:
            gradient = (
                torch.where(sign, gradient, gradient * ctx.slope)
                if ctx.slope
                else torch.where(sign, 0.0, gradient)
            )
        # Written to as it was made: autograd copies what is written to as a view. The others are
        # views, as a batch of gradients (is_grads_batched) has no rule for flatten.
        form = (*ctx.form[:2], -1)
        planes = gradient.new_zeros(*ctx.form[:2], ctx.form[2] * ctx.form[3])
        planes.scatter_add_(2, indices.view(form), gradient.contiguous().view(form))
        return None, planes.view(ctx.form), None, None
