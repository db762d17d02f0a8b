"""A step of gradient sharing by its default options as one operation, with a derivative of its own.

Autograd would walk over all gradients of all tasks twice as often, in twice as many calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-12


def blend(
    gradients: Sequence[Tensor], s: Tensor, m: Tensor, r_old: Tensor, mean: Callable[..., Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return r (P,), detached, and each gradient's direction (T, *shape); see `_Blend`.

    A linear layer's weights have gradients that lie transposed in memory. Products with what has
    another layout are up to three times slower, so these are shared, and given back, transposed.
    """
    turned = [each.dim() == 3 and _lies_transposed(each) for each in gradients]
    given = [each.mT if turn else each for each, turn in zip(gradients, turned, strict=True)]
    there, back = ([each.shape[1:] for each in sides] for sides in (gradients, given))
    outputs = _Blend.apply(mean, s, m, _turned(r_old, there, turned), *given)
    r, directions = outputs[3].detach(), outputs[4:]
    found = [each.mT if turn else each for each, turn in zip(directions, turned, strict=True)]
    return _turned(r, back, turned), found


class _Blend(torch.autograd.Function):
    """Blend T tasks' gradients with r, for a gate s and a momentum m of one number each.

        l[t] = max(‖g[t]‖, ε),   ū = M(Σ_t g[t] / (T l[t])),   r = m r_old + (1 − m) ū
        d[t] = (1 − s) g[t] + s l[t] r

    with M the mean over ranks, which is its own transpose. Of D = ∂L/∂d, with a[t] = D[t] · r,
    q = Σ_t s l[t] D[t] and b = M((1 − m) q), the derivatives are

        ∂L/∂g[t] = (1 − s) D[t] + b / (T l[t]) + (s a[t] − g[t] · b / (T l[t]²)) ∂l[t]/∂g[t]
        ∂L/∂s = Σ_t l[t] a[t] − g[t] · D[t],   ∂L/∂m = q · (r_old − ū)

    What they are computed of are outputs, so they can be differentiated once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mean: Callable[[Tensor], Tensor],
        s: Tensor,
        m: Tensor,
        r_old: Tensor,
        *gradients: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return g (T, P), l (T,), ū (P,), r (P,), and d, each as its gradient (T, *shape)."""
        tasks, shapes = len(gradients[0]), [gradient.shape for gradient in gradients]
        g = torch.cat([_rows(gradient) for gradient in gradients], 1)
        length = torch.linalg.vector_norm(g, dim=1).clamp_min(EPSILON)
        shared = mean((tasks * length).reciprocal() @ g)
        r = torch.lerp(shared, r_old, m)
        d = ((1 - s) * g).addcmul_((s * length).unsqueeze(1), r)
        ctx.mean, ctx.shapes = mean, shapes
        ctx.save_for_backward(s, m, r_old, g, length, shared, r)
        ctx.set_materialize_grads(False)
        return g, length, shared, r, *_split(d, shapes)

    @staticmethod
    def backward(ctx: Any, *into: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return ∂L/∂s, ∂L/∂m and ∂L/∂g of the outputs' derivatives, None where there is none."""
        s, m, r_old, g, length, shared, r = ctx.saved_tensors
        to_g, to_length, to_shared, to_r, *parts = into
        tasks = len(length)
        d = torch.cat(
            [
                _rows(g.new_zeros(shape) if part is None else part)
                for part, shape in zip(parts, ctx.shapes, strict=True)
            ],
            1,
        )
        a, q = d @ r, _plus((s * length) @ d, to_r)
        to_s = to_m = None
        if ctx.needs_input_grad[1]:
            to_s = (length @ a - g.view(-1) @ d.view(-1)).view_as(s)
        if ctx.needs_input_grad[2]:
            to_m = (q @ (r_old - shared)).view_as(m)
        if not any(ctx.needs_input_grad[4:]):
            return None, to_s, to_m, None, *[None] * len(parts)
        b = ctx.mean(_plus((1 - m) * q, to_shared))
        along = torch.addcdiv(_plus(s * a, to_length), g @ b, length.square(), value=-1 / tasks)
        along = along * ((length > EPSILON) / length)
        own = _plus((1 - s) * d, to_g).addcmul_(along.unsqueeze(1), g)
        own.addcmul_((tasks * length).reciprocal().unsqueeze(1), b)
        return None, to_s, to_m, None, *_split(own, ctx.shapes)


def _plus(one: Tensor, other: Tensor | None) -> Tensor:
    return one if other is None else one + other


def _rows(stacked: Tensor) -> Tensor:
    return stacked if stacked.dim() == 2 else stacked.reshape(len(stacked), -1)


def _split(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = flat.split([shape[1:].numel() for shape in shapes], 1)
    pairs = zip(parts, shapes, strict=True)
    return [part if len(shape) == 2 else part.view(shape) for part, shape in pairs]


def _lies_transposed(matrices: Tensor) -> bool:
    return not matrices.is_contiguous() and matrices.mT.is_contiguous()


def _turned(flat: Tensor, shapes: Sequence[torch.Size], turned: Sequence[bool]) -> Tensor:
    """Transpose some of the matrices that a (P,) vector is made of."""
    if not any(turned):
        return flat
    parts = flat.split([shape.numel() for shape in shapes])
    return torch.cat(
        [
            part.view(shape).mT.reshape(-1) if turn else part
            for part, shape, turn in zip(parts, shapes, turned, strict=True)
        ]
    )
