"""A step of gradient sharing where its weights are known as numbers, as on a CPU.

Torch's operations take numbers along, which saves a third of the calls; and a derivative of one row
of the logits is written into one of all rows, without the way of a row through autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from .gradient_sharing_fused import EPSILON, Mean, begin, derivatives, joined, parted


class Weight(NamedTuple):
    """One weight of a step as a number, and what it is learned by.

    Attributes:
        value: σ(logits[row]), or a fixed weight.
        logits: (K, 1) or (1, 1), a row for each inner step or for all; None where it is fixed.
        row: the one of this step.
    """

    value: float
    logits: Tensor | None = None
    row: int = 0


def blend_by_numbers(
    gradients: Sequence[Tensor], gate: Weight, momentum: Weight, r_old: Tensor, mean: Mean
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return r (P,), detached, and each gradient's direction (T, *shape), as `blend` does.

    Args:
        momentum: with a value of 0 before the step has begun.
    """
    weights = gate.value, momentum.value, gate.row, momentum.row
    given = mean, weights, gate.logits, momentum.logits, r_old
    r, *directions = _BlendByNumbers.apply(*given, *gradients)[3:]
    return r, directions


class _BlendByNumbers(torch.autograd.Function):
    """The same as `_Blend`, which has the equations."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        mean: Mean,
        weights: tuple[float, float, int, int],
        gate: Tensor | None,
        momentum: Tensor | None,
        r_old: Tensor,
        *gradients: Tensor,
    ) -> tuple[Tensor, ...]:
        g, length = begin(ctx, mean, gradients)
        s, m, *_ = ctx.weights = weights
        inverse = length.reciprocal()
        shared = mean(torch.addmv(r_old, g.mT, inverse, beta=0, alpha=1 / g.shape[0]))
        r = torch.lerp(shared, r_old, m)
        d = torch.addr(g, length, r, beta=1 - s, alpha=s)
        ctx.save_for_backward(gate, momentum, r_old, g, length, shared, r, inverse)
        ctx.mark_non_differentiable(r)
        return g, length, shared, r, *parted(d, ctx)

    @staticmethod
    def backward(ctx: Any, *into: Tensor | None) -> tuple[Tensor | None, ...]:
        gate, momentum, *saved, inverse = ctx.saved_tensors
        if torch.is_grad_enabled() or not _is_plain(into) or not all(ctx.needs_input_grad[5:]):
            return _by_tensors(ctx, gate, momentum, saved, into)
        (s, m, *rows), (r_old, g, length, _, r) = ctx.weights, saved
        d = joined(into[4:])
        # s a and s (1 − m) q of the equations: ranks exchange the same on every way to here.
        a = torch.addmv(length, d, r, beta=0, alpha=s)
        q = torch.addmv(r_old, d.mT, length, beta=0, alpha=s * (1 - m))
        to_gate = to_momentum = None
        if gate is not None and ctx.needs_input_grad[2]:
            to_gate = torch.zeros_like(gate)
            own = to_gate[rows[0]].addmv_(a.view(1, -1), length, alpha=1 - s)
            own.addmv_(g.view(1, -1), d.view(-1), alpha=-s * (1 - s))
        if momentum is not None and ctx.needs_input_grad[3]:
            to_momentum = torch.zeros_like(momentum)
            if m < 1:  # else r is r_old
                to_momentum[rows[1]].addmv_(q.view(1, -1), r_old - r, alpha=m / (1 - m))
        b, share = ctx.mean(q), 1 / g.shape[0]
        along = torch.addcmul(a, torch.mv(g, b), inverse.square(), value=-share)
        along.div_(torch.threshold(length, EPSILON, math.inf))
        to = d.addr_(inverse, b, beta=1 - s, alpha=share).addcmul_(along.unsqueeze(1), g)
        return None, None, to_gate, to_momentum, None, *parted(to, ctx)


def _by_tensors(
    ctx: Any,
    gate: Tensor | None,
    momentum: Tensor | None,
    saved: Sequence[Tensor],
    into: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The derivatives of `_BlendByNumbers`, of weights that are tensors again."""
    s, m, *rows = ctx.weights
    given = zip((s, m), (gate, momentum), rows, strict=True)
    weights = [
        saved[1].new_tensor(value) if logits is None or not value else logits[row].sigmoid()
        for value, logits, row in given
    ]
    to_gate, to_momentum, to = derivatives(ctx, (weights[0], weights[1]), saved, into)
    learned = _placed(to_gate, gate, rows[0]), _placed(to_momentum, momentum, rows[1])
    return None, None, *learned, None, *to


def _placed(to: Tensor, logits: Tensor | None, row: int) -> Tensor | None:
    """The derivative of one row, as that of all."""
    if logits is None:
        return None
    place = torch.zeros_like(logits)
    place[row] = 1
    return place * to


def _is_plain(into: Sequence[Tensor | None]) -> bool:
    """Whether there is a derivative of every direction alone, and no batch of them."""
    *others, _ = into[:4]
    parts = [each for each in into[4:] if each is not None and not is_legacy_batchedtensor(each)]
    return all(each is None for each in others) and len(parts) == len(into) - 4
