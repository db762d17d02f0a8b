"""A step of gradient sharing by its default options as one operation, with a derivative of its own.

Autograd would walk over all gradients of all tasks twice as often, in twice as many calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

EPSILON = 1e-12

Mean: TypeAlias = Callable[[Tensor], Tensor]
"""Over ranks: M, which is its own transpose."""


def blend(  # noqa: PLR0917
    gradients: Sequence[Tensor],
    gate: Tensor,
    momentum: Tensor,
    started: Tensor,
    r_old: Tensor,
    mean: Mean,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return r (P,), detached, and each gradient's direction (T, *shape); see `_Blend`."""
    r, *directions = _Blend.apply(mean, gate, momentum, started, r_old, *gradients)[3:]
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
        mean: Mean,
        gate: Tensor,
        momentum: Tensor,
        started: Tensor,
        r_old: Tensor,
        *gradients: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return g (T, P), l (T,), ū (P,), r (P,), and d, each as its gradient (T, *shape)."""
        g, length = begin(ctx, mean, gradients)
        s, m = _weights(gate, momentum, started)
        shared = mean((len(g) * length).reciprocal() @ g)
        r = torch.lerp(shared, r_old, m)
        d = torch.lerp(g, torch.outer(length, r), s)
        ctx.save_for_backward(gate, momentum, started, r_old, g, length, shared, r)
        ctx.mark_non_differentiable(r)
        return g, length, shared, r, *parted(d, ctx)

    @staticmethod
    def backward(ctx: Any, *into: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return ∂L/∂λ, ∂L/∂m and ∂L/∂g of the outputs' derivatives, None where there is none."""
        gate, momentum, started, *saved = ctx.saved_tensors
        weights = _weights(gate, momentum, started)
        to_gate, to_momentum, to = derivatives(ctx, weights, saved, into)
        return None, to_gate.view_as(gate), to_momentum.view_as(momentum), None, None, *to


def derivatives(
    ctx: Any,
    weights: tuple[Tensor, Tensor],
    saved: Sequence[Tensor],
    into: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return ∂L/∂λ, ∂L/∂m and ∂L/∂g by operations that can be differentiated themselves."""
    s, m = weights
    r_old, g, length, shared, r = saved
    to_g, to_length, to_shared, _, *parts = into
    if torch.is_grad_enabled():
        r = torch.lerp(shared, r_old, m)
    given = zip(parts, ctx.shapes, strict=True)
    d = joined([g.new_zeros(shape) if part is None else part for part, shape in given])
    a, q = d @ r, length @ d
    to_gate = s * (1 - s) * (length @ a - g.view(-1) @ d.view(-1))
    to_momentum = s * m * (q @ (r_old - r))
    if not any(ctx.needs_input_grad[5:]):
        return to_gate, to_momentum, [None] * len(parts)
    per_task = (len(g) * length).reciprocal()
    b = ctx.mean(_plus(s * (1 - m) * q, to_shared))
    along = _plus(s * a, to_length) - (g @ b) * per_task / length
    along = along * ((length > EPSILON) / length)
    to = _plus((1 - s) * d, to_g).addcmul_(along.unsqueeze(1), g)
    to.addcmul_(per_task.unsqueeze(1), b)
    return to_gate, to_momentum, [*parted(to, ctx)]


def begin(ctx: Any, mean: Mean, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return g (T, P) and l (T,)."""
    ctx.mean, ctx.shapes = mean, [each.shape for each in gradients]
    ctx.sizes = [shape[1:].numel() for shape in ctx.shapes]
    ctx.set_materialize_grads(False)
    g = joined(gradients)
    return g, torch.linalg.vector_norm(g, dim=1).clamp_min(EPSILON)


def _weights(gate: Tensor, momentum: Tensor, started: Tensor) -> tuple[Tensor, Tensor]:
    """Return s = σ(λ), and σ(m) once a step has begun."""
    return torch.sigmoid(gate), started * torch.sigmoid(momentum)


def joined(parts: Sequence[Any]) -> Tensor:
    """(T, P) of parts (T, *shape)."""
    tasks = parts[0].shape[0]
    return torch.cat([part if part.dim() == 2 else part.reshape(tasks, -1) for part in parts], 1)


def parted(flat: Tensor, ctx: Any) -> list[Tensor]:
    """Undo `joined`."""
    found = zip(torch.split_with_sizes(flat, ctx.sizes, 1), ctx.shapes, strict=True)
    # Sizes one by one: torch takes a whole torch.Size three times as long.
    return [part if len(shape) == 2 else part.view(*shape) for part, shape in found]


def _plus(one: Tensor, other: Tensor | None) -> Tensor:
    return one if other is None else one + other
