"""Implicit MAML: meta-gradients from where the inner loop ends, not from the way it took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from metaplug import Context, InnerStep, Outcome, Plugin, PluginConfig, hookimpl


class Imaml(Plugin):
    """Pull every task to its start, and differentiate the solution instead of the steps to it.

        G(θ[t]) = ℓ[t](θ[t]) + (strength / 2) · ‖θ[t] − θ[t,0]‖²      the inner loop descends it
        (∇²G(θ[t,K]) + damping · I) v[t] = ∂L/∂θ[t,K]                 by conjugate gradient
        dL/dφ = ∂L/∂φ − Σ_t ∂⟨∇G(θ[t,K]), v[t]⟩/∂φ                    for every meta-parameter φ

    For φ = θ this is the mean over tasks of (I + H / strength)⁻¹ ∇L, H the support loss's Hessian.
    It is exact at ∇G = 0: the figures are the length of ∇G, `slope`, and the solver's relative
    `residual`. A task's solution stays once that is within tolerance, or curvature is negative.
    What only steers the steps, as a rate or a gate, has no part in a solution: of two or more
    steps, it learns by the last one's update, to first order, which tends to nothing with ∇G.

    The authors' code pulls once, after the last step, and solves (2I + H / (strength + 10)) v = ∂L:
    up to its scale, damping = strength + 20.

    Source: Rajeswaran et al. 2019 (arXiv 1909.04630), equations 3 to 7, algorithms 1 and 2.
    """

    conflicts_with = (
        *("derivative-order", "multi-step-loss", "reptile", "sharp-maml", "warp-grad"),
        "metal",  # whose first steps would never learn
    )

    class Config(PluginConfig):
        """The inner problem, and how closely the linear system is solved."""

        strength: float = Field(2.0, gt=0, le=1e6, description="λ, the weight of the pull.")
        damping: float = Field(0.0, ge=0, le=1e6, description="Added to the matrix's diagonal.")
        iterations: int = Field(5, ge=1, le=1000, description="Of conjugate gradient.")
        tolerance: float = Field(1e-10, ge=0, lt=1, description="Relative residual to stop at.")

    config: Config
    residuals: Tensor

    @hookimpl
    def setup(self, context: Context) -> None:
        self._adapted = context.adapted
        residuals = torch.zeros(2, dtype=context.dtype, device=context.device)
        self.register_buffer("residuals", residuals, persistent=False)

    @hookimpl
    def derivative_order(self, step: InnerStep) -> int:
        return int(0 < step.index == step.count - 1)  # a first step's update would reach the start

    @hookimpl
    def transform_inner_losses(self, losses: Tensor, step: InnerStep) -> Tensor:
        now, start = step.parameters, step.initial_parameters
        moved = _flat([now[name] - start[name] for name in self._adapted])
        return losses + self.config.strength / 2 * moved.square().sum(1)

    @hookimpl
    def compute_meta_gradients(
        self, outcome: Outcome, outer_loss: Tensor, meta_parameters: Mapping[str, nn.Parameter]
    ) -> Mapping[str, Tensor] | None:
        if not outcome.support_losses:
            return None  # no inner step, so no inner problem
        given = {name: outcome.adapted_parameters[name] for name in outcome.adapted}
        ends = {name: each.detach().requires_grad_() for name, each in given.items()}
        slopes = list(outcome.gradients(outcome.objective(ends), ends).values())
        at, meta = list(ends.values()), list(meta_parameters.values())
        # Both losses stand on the starts and on what does not adapt: the graph of these stays.
        taken = torch.autograd.grad(
            outer_loss, [*given.values(), *meta], retain_graph=True, allow_unused=True
        )
        pairs = zip(at, taken, strict=False)
        target = _flat([torch.zeros_like(x) if slope is None else slope for x, slope in pairs])

        def pull(v: Tensor, to: Sequence[Tensor], *, retain: bool = True) -> Sequence[Any]:
            pieces = zip(v.split([x[0].numel() for x in at], 1), at, strict=True)
            back = [piece.reshape(x.shape) for piece, x in pieces]
            return torch.autograd.grad(slopes, to, back, retain_graph=retain, allow_unused=True)

        def product(v: Tensor) -> Tensor:
            return _flat(pull(v, at)) + self.config.damping * v

        v, residual = _solve(product, target, self.config.iterations, self.config.tolerance)
        lengths = torch.stack([_flat(slopes).norm(dim=1), residual]).detach()
        outcome.keep("residuals", lengths.mean(1))
        through = pull(-v, meta, retain=False)
        found = zip(meta_parameters, taken[len(at) :], through, strict=True)
        parts = {name: [part for part in pair if part is not None] for name, *pair in found}
        return {name: torch.stack(pair).sum(0) for name, pair in parts.items() if pair}

    @hookimpl
    def commit(self, kept: Mapping[str, Tensor]) -> None:
        self.residuals = kept["residuals"]

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        return dict(zip(("slope", "residual"), self.residuals.tolist(), strict=True))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.reshape(len(each), -1) for each in tensors], 1)


def _solve(
    product: Callable[[Tensor], Tensor], target: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Solve A[t] v[t] = target[t], (T, n), for all tasks at once; return v and residuals (T,)."""
    v, residual, direction = torch.zeros_like(target), target, target
    first = square = target.square().sum(1, keepdim=True)
    for _ in range(iterations):
        image = product(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        going = (square > tolerance**2 * first) & (curvature > 0)
        length = torch.where(going, square / curvature, 0)
        v, residual = v + length * direction, residual - length * image
        before, square = square, residual.square().sum(1, keepdim=True)
        direction = torch.where(going, residual + square / before * direction, direction)
    # Of a target of length 0, the solution is exact.
    return v, torch.where(first > 0, square / first, 0).sqrt().squeeze(1)
