"""A step of gradient sharing by its default options as one operation, with a derivative of its own.

Autograd would walk over all gradients of all tasks twice as often, in twice as many calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-12


def blend(  # noqa: PLR0917
    gradients: Sequence[Tensor],
    gate: Tensor,
    momentum: Tensor,
    started: Tensor,
    r_old: Tensor,
    mean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return r (P,), detached, and each gradient's direction (T, *shape); see `_Blend`."""
    r, *directions = _Blend.apply(mean, gate, momentum, started, r_old, *gradients)[3:]
    return r, directions


class _Blend(torch.autograd.Function):
    """Blend T tasks' gradients with r, by a gate λ and a momentum m of one number each.

        l[t] = max(‖g[t]‖, ε),   ū = M(Σ_t g[t] / (T l[t])),   r = σ(m) r_old + (1 − σ(m)) ū
        d[t] = (1 − s) g[t] + s l[t] r,   s = σ(λ)

    with M the mean over ranks, which is its own transpose; σ(m) counts once a step has begun. Of
    D = ∂L/∂d, with a[t] = D[t] · r, q = Σ_t s l[t] D[t] and b = M((1 − σ(m)) q), the derivatives:

        ∂L/∂g[t] = (1 − s) D[t] + b / (T l[t]) + (s a[t] − g[t] · b / (T l[t]²)) ∂l[t]/∂g[t]
        ∂L/∂s = Σ_t l[t] a[t] − g[t] · D[t],   ∂L/∂σ(m) = q · (r_old − ū)

    What they are computed of are inputs and outputs, so they can be differentiated once more.

    A linear layer's weights have gradients that lie transposed in memory. Products with what has
    another layout are up to three times slower, so these are shared, and given back, transposed.
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
        ctx.mean, ctx.layout = mean, (layout := _Layout(gradients))
        g, r_old = layout.joined(gradients, r_old), layout.turned(r_old)
        s, m = torch.sigmoid(gate), started * torch.sigmoid(momentum)
        length = torch.linalg.vector_norm(g, dim=1).clamp_min(EPSILON)
        shared = mean((len(g) * length).reciprocal() @ g)
        r = torch.lerp(shared, r_old, m)
        d = ((1 - s) * g).addcmul_((s * length).unsqueeze(1), r)
        ctx.save_for_backward(gate, momentum, started, r_old, g, length, shared)
        ctx.set_materialize_grads(False)
        natural = layout.turned(r, back=True)
        ctx.mark_non_differentiable(natural)
        return g, length, shared, natural, *layout.parted(d)

    @staticmethod
    def backward(ctx: Any, *into: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return ∂L/∂λ, ∂L/∂m and ∂L/∂g of the outputs' derivatives, None where there is none."""
        gate, momentum, started, r_old, g, length, shared = ctx.saved_tensors
        to_g, to_length, to_shared, _, *parts = into
        s, own = torch.sigmoid(gate), torch.sigmoid(momentum)
        m = started * own
        r = torch.lerp(shared, r_old, m)
        d = ctx.layout.joined(parts, g)
        a, q = d @ r, (s * length) @ d
        to_gate = to_momentum = None
        if ctx.needs_input_grad[1]:
            to_gate = (s * (1 - s) * (length @ a - g.view(-1) @ d.view(-1))).view_as(gate)
        if ctx.needs_input_grad[2]:
            to_momentum = (m * (1 - own) * (q @ (r_old - shared))).view_as(momentum)
        if not any(ctx.needs_input_grad[5:]):
            return None, to_gate, to_momentum, None, None, *[None] * len(parts)
        b = ctx.mean(_plus((1 - m) * q, to_shared))
        along = torch.addcdiv(_plus(s * a, to_length), g @ b, length.square(), value=-1 / len(g))
        along = along * ((length > EPSILON) / length)
        to = _plus((1 - s) * d, to_g).addcmul_(along.unsqueeze(1), g)
        to.addcmul_((len(g) * length).reciprocal().unsqueeze(1), b)
        return None, to_gate, to_momentum, None, None, *ctx.layout.parted(to)


class _Layout:
    """How gradients (T, *shape) lie side by side in (T, P), some of them transposed."""

    def __init__(self, gradients: Sequence[Tensor]) -> None:
        self._turns = [each.dim() == 3 and _lies_transposed(each) for each in gradients]
        self._shapes = [each.shape for each in gradients]
        self._sizes = [shape[1:].numel() for shape in self._shapes]

    def joined(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """(T, P) of the parts; zeros, in the dtype of `like`, where one is None."""
        flat = list[Tensor]()
        for part, turns, shape in zip(parts, self._turns, self._shapes, strict=True):
            whole = like.new_zeros(shape) if part is None else part
            flat.append((whole.mT if turns else whole).reshape(shape[0], -1))
        return torch.cat(flat, 1)

    def parted(self, flat: Tensor) -> list[Tensor]:
        """Undo `joined`."""
        parts = flat.split(self._sizes, 1)
        return [
            part.view(len(part), *shape[:0:-1]).mT if turns else part.view(shape)
            for part, turns, shape in zip(parts, self._turns, self._shapes, strict=True)
        ]

    def turned(self, vector: Tensor, *, back: bool = False) -> Tensor:
        """A (P,) vector with its matrices transposed as those of `joined`, or back again."""
        if not any(self._turns):
            return vector
        parts = list(vector.split(self._sizes))
        for place, shape in enumerate(self._shapes):
            if self._turns[place]:
                form = shape[:0:-1] if back else shape[1:]
                parts[place] = parts[place].view(form).mT.reshape(-1)
        return torch.cat(parts)


def _plus(one: Tensor, other: Tensor | None) -> Tensor:
    return one if other is None else one + other


def _lies_transposed(matrices: Tensor) -> bool:
    return not matrices.is_contiguous() and matrices.mT.is_contiguous()
