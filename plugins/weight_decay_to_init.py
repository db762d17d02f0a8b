"""Weight decay to the initial weights: a proximal term that keeps tasks near where they started."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from metaplug import Context, InnerStep, Plugin, PluginConfig, hookimpl, task_vectors


class WeightDecayToInit(Plugin):
    """Pull the fast weights of every task back to the weights that all tasks share.

        ℓ[t,k] ← ℓ[t,k] + (strength / 2) · ‖θ[t,k] − θ‖²        over all adapted parameters

    Its gradient, strength · (θ[t,k] − θ), is zero in the first step.

    Source: Rajeswaran et al. 2019 (arXiv 1909.04630), equation 3.
    """

    class Config(PluginConfig):
        """How strong the pull is."""

        strength: float = Field(
            0.1, ge=0, le=1e6, description="Weight of half the squared distance, in units of loss."
        )

    config: Config

    @hookimpl
    def setup(self, context: Context) -> None:
        self._adapted = context.adapted

    @hookimpl
    def transform_inner_losses(self, losses: Tensor, step: InnerStep) -> Tensor | None:
        if self.config.strength == 0:
            return None
        now, start = step.parameters, step.initial_parameters
        squared = task_vectors(now[name] - start[name] for name in self._adapted).square().sum(1)
        step.log("distance", squared.detach().sqrt())
        return losses + self.config.strength / 2 * squared
