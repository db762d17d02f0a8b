"""my-idea: a start that is weaker the harder a task is."""

from __future__ import annotations

import torch
from metaplug import InnerStep, Parameters, Plugin, PluginConfig, hookimpl, per_task
from pydantic import Field


class MyIdea(Plugin):
    """Let every task start from weights that are scaled down by its support loss.

        λ[t] = 1 − strength · tanh(ℓ[t])        ℓ[t] the support loss at the shared weights θ
        θ[t] ← λ[t] · θ

    Source: after Baik et al. 2020, "Learning to Forget for Meta-Learning" (arXiv 1906.05895), where
    a network finds λ from the gradients.
    """

    class Config(PluginConfig):
        """How much is forgotten."""

        strength: float = Field(
            0.1, ge=0, lt=1, description="Largest share that is taken off; 0 is off."
        )

    config: Config

    @hookimpl
    def initialize_parameters(self, parameters: Parameters, step: InnerStep) -> Parameters | None:
        if self.config.strength == 0:
            return None
        losses, _ = step.forward(parameters)  # the meta-gradient flows through this pass too
        kept = 1 - self.config.strength * torch.tanh(losses)
        return {name: start * per_task(kept, start) for name, start in parameters.items()}
