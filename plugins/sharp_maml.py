"""Sharp-MAML: sharpness-aware gradients in the inner loop, in the outer loop, or in both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from metaplug import Context, Gradients, InnerStep, Outcome, Plugin, PluginConfig, hookimpl


class SharpMaml(Plugin):
    """Take gradients where the loss is about largest within a distance ρ.

        lower:  ε[t,k] = ρ g[t,k] / ‖g[t,k]‖,    g[t,k] ← ∇ℓ[t](θ[t,k] + ε[t,k])     of every task
        upper:  ε = ρ G / ‖G‖,    G ← dL/dθ of tasks that start from θ + ε         for all tasks

    Norms run over all parameters together. The upper level perturbs what tasks start from; the
    gradient of other meta-parameters, as rates, is taken there too. ℓ is the objective with the
    regularisers of all plugins. A task that is adapted for a test takes the lower level's steps.

    In the authors' code meta-gradients flow through the lower ε, and none through the upper one.

    Source: Abbas et al. 2022 (arXiv 2206.03996), algorithm 1; Foret et al. 2021 (arXiv 2010.01412).
    """

    conflicts_with = ("imaml", "reptile", "warp-grad")  # which make the meta-gradient themselves

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
    sharpness: Tensor

    @property
    def couples_tasks(self) -> bool:  # type: ignore[override]
        """The upper level's ε is one for all tasks."""
        return self.config.level != "lower" and self.config.upper_rho > 0

    @hookimpl
    def setup(self, context: Context) -> None:
        sharpness = torch.zeros((), dtype=context.dtype, device=context.device)
        self.register_buffer("sharpness", sharpness, persistent=False)

    @hookimpl
    def transform_gradients(self, gradients: Gradients, step: InnerStep) -> Gradients | None:
        if self.config.level == "upper" or self.config.lower_rho == 0:
            return None
        scale = self.config.lower_rho / _norm(gradients.values())
        there = {}
        for name, gradient in gradients.items():
            away = scale.view(-1, *(1,) * (gradient.dim() - 1)) * gradient
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
        tasks, own = outcome.batch.num_tasks, _gradients(outer_loss, here)
        mean = {n: outcome.task_mean(g.expand(tasks, *g.shape)) for n, g in own.items()}
        scale = self.config.upper_rho / _norm(each.reshape(1, -1) for each in mean.values())[0]
        there = {n: (x + scale * mean[n]).detach().requires_grad_() for n, x in here.items()}
        loss = outcome.outer_loss(there)
        outcome.keep("sharpness", loss - outer_loss)
        return _gradients(loss, {**meta_parameters, **there})

    @hookimpl
    def commit(self, kept: Mapping[str, Tensor]) -> None:
        self.sharpness = kept["sharpness"]

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        return {} if not self.couples_tasks else {"sharpness": float(self.sharpness)}


def _norm(parts: Iterable[Tensor]) -> Tensor:
    """(T,), of (T, *shape) parts; a square of 0 has a derivative of 0."""
    flat = [each.reshape(len(each), -1) for each in parts]
    return torch.cat(flat, 1).square().sum(1).clamp_min(1e-24).sqrt()


def _gradients(loss: Tensor, at: Mapping[str, Tensor]) -> dict[str, Tensor]:
    taken = torch.autograd.grad(loss, list(at.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(at, taken, strict=True))
