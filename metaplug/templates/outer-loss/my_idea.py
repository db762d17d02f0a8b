"""my-idea: an outer loss that keeps tasks near their start."""

from __future__ import annotations

import torch
from metaplug import Outcome, Plugin, PluginConfig, hookimpl
from pydantic import Field
from torch import Tensor


class MyIdea(Plugin):
    """Add half the squared distance that a task's weights moved to its outer loss.

        L[t] ← L[t] + (strength / 2) · ‖θ[t,K] − θ‖²        over all parameters

    Through θ[t,K] the meta-gradient sees what makes the inner loop move.
    """

    class Config(PluginConfig):
        """How much it counts."""

        strength: float = Field(0.1, ge=0, le=1e6, description="Weight of the distance; 0 is off.")

    config: Config

    @hookimpl
    def transform_outer_losses(self, losses: Tensor, outcome: Outcome) -> Tensor | None:
        if self.config.strength == 0:
            return None
        first, last = outcome.initial_parameters, outcome.adapted_parameters
        squares = [(last[name] - first[name]).square().flatten(1).sum(1) for name in last]
        return losses + self.config.strength / 2 * torch.stack(squares).sum(0)
