"""Sharp-MAML: sharpness-aware gradients in the inner loop, in the outer loop, or in both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from metaplug import (
    Gradients,
    InnerStep,
    Outcome,
    Plugin,
    PluginConfig,
    gradients_of,
    hookimpl,
    per_task,
    task_vectors,
)


class SharpMaml(Plugin):
    """Take gradients where the loss is about largest within a distance ρ.

        lower:  ε[t,k] = ρ g[t,k] / ‖g[t,k]‖,    g[t,k] ← ∇ℓ[t](θ[t,k] + ε[t,k])     of every task
        upper:  ε = ρ G / ‖G‖,    G ← dL/dθ of tasks that start from θ + ε         for all tasks

    Norms run over all parameters together. ℓ has the regularisers of all plugins. The gradient of
    other meta-parameters, as rates, is taken at θ + ε too. As in the authors' code, meta-gradients
    flow through the lower ε, and none through the upper one.

    Source: Abbas et al. 2022 (arXiv 2206.03996), algorithm 1; Foret et al. 2021 (arXiv 2010.01412).
    """

    class Config(PluginConfig):
        """Which level is sharpness-aware, and how far each looks."""

        level: Literal["lower", "upper", "both"] = Field(
            "both", description="lower: the inner loop; upper: the outer loop."
        )
        lower_rho: float = Field(0.05, ge=0, le=1e3, description="ρ of the inner loop; 0: off.")
        upper_rho: float = Field(0.05, ge=0, le=1e3, description="ρ of the outer loop; 0: off.")
        through_perturbation: bool = Field(
            True, description="Whether meta-gradients flow through the lower level's ε."
        )

    config: Config

    @property
    def couples_tasks(self) -> bool:  # type: ignore[override]
        """The upper level's ε is one for all tasks."""
        return self.config.level != "lower" and self.config.upper_rho > 0

    @property
    def conflicts_with(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those that make the meta-gradient themselves, as the upper level does."""
        return ("imaml", "reptile", "warp-grad") if self.couples_tasks else ()

    @hookimpl
    def transform_gradients(self, gradients: Gradients, step: InnerStep) -> Gradients | None:
        if self.config.level == "upper" or self.config.lower_rho == 0:
            return None
        scale = self.config.lower_rho / _norm(task_vectors(gradients.values()))
        there = {}
        for name, gradient in gradients.items():
            away = per_task(scale, gradient) * gradient
            away = away if self.config.through_perturbation else away.detach()
            there[name] = step.parameters[name] + away
        return step.gradients(step.objective(there), there)

    @hookimpl
    def compute_meta_gradients(
        self, outcome: Outcome, outer_loss: Tensor, meta_parameters: Mapping[str, nn.Parameter]
    ) -> Mapping[str, Tensor] | None:
        if not self.couples_tasks or 0 in outcome.derivative_orders:
            return None
        here = {n: x for n, x in meta_parameters.items() if n in outcome.model_parameters}
        tasks, own = outcome.batch.num_tasks, gradients_of(outer_loss, here)
        mean = {n: outcome.task_mean(g.expand(tasks, *g.shape)) for n, g in own.items()}
        scale = self.config.upper_rho / _norm(task_vectors(g[None] for g in mean.values()))[0]
        there = {n: (x + scale * mean[n]).detach().requires_grad_() for n, x in here.items()}
        loss = outcome.outer_loss(there)
        outcome.log("sharpness", loss - outer_loss)
        return gradients_of(loss, {**meta_parameters, **there})


def _norm(vectors: Tensor) -> Tensor:
    """(T,), of (T, n); a square of 0 has a derivative of 0."""
    return vectors.square().sum(1).clamp_min(1e-24).sqrt()
