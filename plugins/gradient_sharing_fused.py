"""A step of gradient sharing by its default options as one operation, with a derivative of its own.

Autograd would walk over all gradients of all tasks twice as often, in twice as many calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

EPSILON = 1e-12


def blend(  # noqa: PLR0917
    gradients: Sequence[Tensor],
    gate: Tensor,
    momentum: Tensor,
    started: Tensor,
    r_old: Tensor,
    mean: Callable[[Tensor], Tensor],
    *,
    reads: bool = False,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return r (P,), detached, and each gradient's direction (T, *shape); see `_Blend`.

    Args:
        reads: take the weights out of their tensors, which on a CPU saves a third of the calls.
    """
    function = _BlendByNumbers if reads else _Blend
    r, *directions = function.apply(mean, gate, momentum, started, r_old, *gradients)[3:]
    return r, directions


class _Blend(torch.autograd.Function):
    """Blend T tasks' gradients with r, by a gate λ and a momentum m of one number each.

        l[t] = max(‖g[t]‖, ε),   ū = M(Σ_t g[t] / (T l[t])),   r = σ(m) r_old + (1 − σ(m)) ū
        d[t] = (1 − s) g[t] + s l[t] r,   s = σ(λ)

    with M the mean over ranks, which is its own transpose; σ(m) counts once a step has begun. Of
    D = ∂L/∂d, with a[t] = D[t] · r, q = Σ_t l[t] D[t] and b = M(s (1 − σ(m)) q), the derivatives:

        ∂L/∂g[t] = (1 − s) D[t] + b / (T l[t]) + (s a[t] − g[t] · b / (T l[t]²)) ∂l[t]/∂g[t]
        ∂L/∂s = Σ_t l[t] a[t] − g[t] · D[t],   ∂L/∂m = s σ(m) q · (r_old − r)

    What they are computed of are inputs and outputs, so they can be differentiated once more.
    """

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        mean: Callable[[Tensor], Tensor],
        gate: Tensor,
        momentum: Tensor,
        started: Tensor,
        r_old: Tensor,
        *gradients: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return g (T, P), l (T,), ū (P,), r (P,), and d, each as its gradient (T, *shape)."""
        g, length = _begin(ctx, mean, gradients)
        s, m = _weights(gate, momentum, started)
        shared = mean((len(g) * length).reciprocal() @ g)
        r = torch.lerp(shared, r_old, m)
        d = torch.lerp(g, torch.outer(length, r), s)
        ctx.save_for_backward(gate, momentum, started, r_old, g, length, shared)
        ctx.mark_non_differentiable(r)
        return g, length, shared, r, *_parted(d, ctx.shapes)

    @staticmethod
    def backward(ctx: Any, *into: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return ∂L/∂λ, ∂L/∂m and ∂L/∂g of the outputs' derivatives, None where there is none."""
        return _derivatives(ctx, ctx.saved_tensors, into)


class _BlendByNumbers(_Blend):
    """The same with weights that are Python's numbers, which torch's operations take along."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        mean: Callable[[Tensor], Tensor],
        gate: Tensor,
        momentum: Tensor,
        started: Tensor,
        r_old: Tensor,
        *gradients: Tensor,
    ) -> tuple[Tensor, ...]:
        g, length = _begin(ctx, mean, gradients)
        s, m = _sigmoid(gate.item()), _sigmoid(momentum.item()) if started.item() else 0.0
        ctx.weights = s, m
        inverse = length.reciprocal()
        shared = mean(torch.addmv(r_old, g.mT, inverse, beta=0, alpha=1 / len(g)))
        r = torch.lerp(shared, r_old, m)
        d = torch.addr(g, length, r, beta=1 - s, alpha=s)
        ctx.save_for_backward(gate, momentum, started, r_old, g, length, shared, r, inverse)
        ctx.mark_non_differentiable(r)
        return g, length, shared, r, *_parted(d, ctx.shapes)

    @staticmethod
    def backward(ctx: Any, *into: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, r, inverse = ctx.saved_tensors
        plain = into[:3] == (None, None, None) and all(each is not None for each in into[4:])
        if torch.is_grad_enabled() or not plain or not all(ctx.needs_input_grad[5:]):
            return _derivatives(ctx, saved, into)
        gate, momentum, _, r_old, g, length, _ = saved
        s, m = ctx.weights
        d = _joined(into[4:])
        a, q = torch.mv(d, r), torch.mv(d.mT, length)
        to_gate = (
            torch.dot(length, a)
            .sub_(torch.dot(g.view(-1), d.view(-1)))
            .mul_(s * (1 - s))
            .view_as(gate)
        )
        to_momentum = torch.dot(q, r_old - r).mul_(s * m).view_as(momentum)
        b, share = ctx.mean(q), (1 - m) / len(g)
        along = torch.addcmul(a, torch.mv(g, b), inverse.square(), value=-share)
        along.mul_(inverse.masked_fill(length <= EPSILON, 0))
        to = d.addr_(inverse, b, beta=1 - s, alpha=s * share)
        to.addcmul_(along.unsqueeze(1), g, value=s)
        return None, to_gate, to_momentum, None, None, *_parted(to, ctx.shapes)


def _derivatives(
    ctx: Any, saved: Sequence[Tensor], into: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return the derivatives by operations that can be differentiated themselves."""
    gate, momentum, started, r_old, g, length, shared = saved
    to_g, to_length, to_shared, _, *parts = into
    s, m = _weights(gate, momentum, started)
    r = torch.lerp(shared, r_old, m)
    given = zip(parts, ctx.shapes, strict=True)
    d = _joined([g.new_zeros(shape) if part is None else part for part, shape in given])
    a, q = d @ r, length @ d
    to_gate = to_momentum = None
    if ctx.needs_input_grad[1]:
        to_gate = (s * (1 - s) * (length @ a - g.view(-1) @ d.view(-1))).view_as(gate)
    if ctx.needs_input_grad[2]:
        to_momentum = (s * m * (q @ (r_old - r))).view_as(momentum)
    if not any(ctx.needs_input_grad[5:]):
        return None, to_gate, to_momentum, None, None, *[None] * len(parts)
    per_task = (len(g) * length).reciprocal()
    b = ctx.mean(_plus(s * (1 - m) * q, to_shared))
    along = _plus(s * a, to_length) - (g @ b) * per_task / length
    along = along * ((length > EPSILON) / length)
    to = _plus((1 - s) * d, to_g).addcmul_(along.unsqueeze(1), g)
    to.addcmul_(per_task.unsqueeze(1), b)
    return None, to_gate, to_momentum, None, None, *_parted(to, ctx.shapes)


def _begin(
    ctx: Any, mean: Callable[[Tensor], Tensor], gradients: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return g (T, P) and l (T,)."""
    ctx.mean, ctx.shapes = mean, [each.shape for each in gradients]
    ctx.set_materialize_grads(False)
    g = _joined(gradients)
    return g, torch.linalg.vector_norm(g, dim=1).clamp_min(EPSILON)


def _weights(gate: Tensor, momentum: Tensor, started: Tensor) -> tuple[Tensor, Tensor]:
    """Return s = σ(λ), and σ(m) once a step has begun."""
    return torch.sigmoid(gate), started * torch.sigmoid(momentum)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def _joined(parts: Sequence[Any]) -> Tensor:
    """(T, P) of parts (T, *shape)."""
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1)


def _parted(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Undo `_joined`."""
    sizes = [shape.numel() // len(flat) for shape in shapes]
    found = zip(torch.split_with_sizes(flat, sizes, 1), shapes, strict=True)
    return [part if len(shape) == 2 else part.view(shape) for part, shape in found]


def _is_plain(part: Tensor | None) -> bool:
    """Whether a part is there, and no batch of gradients, which has no rule for some operations."""
    return part is not None and not is_legacy_batchedtensor(part)


def _plus(one: Tensor, other: Tensor | None) -> Tensor:
    return one if other is None else one + other
