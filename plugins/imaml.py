"""Implicit MAML: meta-gradients from where the inner loop ends, not from the way it took."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from metaplug import (
    Context,
    InnerStep,
    Outcome,
    Plugin,
    PluginConfig,
    gradients_of,
    hookimpl,
    task_vectors,
)


class Imaml(Plugin):
    """Pull every task to its start, and differentiate the solution instead of the steps to it.

        G(θ[t]) = ℓ[t](θ[t]) + (strength / 2) · ‖θ[t] − θ[t,0]‖²      the inner loop descends it
        (∇²G(θ[t,K]) + damping · I) v[t] = ∂L/∂θ[t,K]                 by conjugate gradient
        dL/dφ = ∂L/∂φ − Σ_t ∂⟨∇G(θ[t,K]), v[t]⟩/∂φ                    for every meta-parameter φ

    Exact at ∇G = 0. What only steers the steps, as a rate, learns by the last of two or more, to
    first order. The authors' code pulls once, after the last step, and solves
    (2I + H / (strength + 10)) v = ∂L: up to its scale, damping = strength + 20.

    Source: Rajeswaran et al. 2019 (arXiv 1909.04630), equations 3 to 7, algorithms 1 and 2.
    """

    # WarpGrad of trajectories says so itself; what metal learns of first steps would not learn.
    conflicts_with = ("derivative-order", "metal", "multi-step-loss", "reptile", "sharp-maml")

    class Config(PluginConfig):
        """The inner problem, and how closely the linear system is solved."""

        strength: float = Field(2.0, gt=0, le=1e6, description="λ, the weight of the pull.")
        damping: float = Field(0.0, ge=0, le=1e6, description="Added to the matrix's diagonal.")
        iterations: int = Field(5, ge=1, le=1000, description="Of conjugate gradient.")
        tolerance: float = Field(1e-10, ge=0, lt=1, description="Relative residual to stop at.")

    config: Config

    @hookimpl
    def setup(self, context: Context) -> None:
        self._adapted = context.adapted

    @hookimpl
    def derivative_order(self, step: InnerStep) -> int:
        return int(0 < step.index == step.count - 1)  # a first step's update would reach the start

    @hookimpl
    def transform_inner_losses(self, losses: Tensor, step: InnerStep) -> Tensor:
        now, start = step.parameters, step.initial_parameters
        moved = task_vectors(now[name] - start[name] for name in self._adapted)
        return losses + self.config.strength / 2 * moved.square().sum(1)

    @hookimpl
    def compute_meta_gradients(
        self, outcome: Outcome, outer_loss: Tensor, meta_parameters: Mapping[str, nn.Parameter]
    ) -> Mapping[str, Tensor] | None:
        if not outcome.support_losses:
            return None  # no inner step, so no inner problem
        given = {name: outcome.adapted_parameters[name] for name in outcome.adapted}
        ends = {name: each.detach().requires_grad_() for name, each in given.items()}
        slope = task_vectors(outcome.gradients(outcome.objective(ends), ends).values())
        target = task_vectors(gradients_of(outer_loss, given, retain_graph=True).values())

        def product(v: Tensor) -> Tensor:
            image = torch.autograd.grad(slope, list(ends.values()), v, retain_graph=True)
            return task_vectors(image) + self.config.damping * v

        v, residual = _solve(product, target, self.config.iterations, self.config.tolerance)
        outcome.log("slope", slope.norm(dim=1))
        outcome.log("residual", residual)
        total = outer_loss - (slope * v).sum()
        taken = torch.autograd.grad(total, list(meta_parameters.values()), allow_unused=True)
        pairs = zip(meta_parameters, taken, strict=True)
        return {name: each for name, each in pairs if each is not None}


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
