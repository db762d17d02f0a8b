"""my-idea: an inner learning rate that falls from step to step."""

from __future__ import annotations

from metaplug import InnerStep, LearningRates, Plugin, PluginConfig, hookimpl
from pydantic import Field


class MyIdea(Plugin):
    """Let the inner learning rate fall geometrically over the inner steps.

        α[k] ← α[k] · decayᵏ

    The inner steps k are counted from 0, so that the first is as it was.
    """

    class Config(PluginConfig):
        """How fast it falls."""

        decay: float = Field(0.8, gt=0, le=1, description="Factor from step to step; 1 is off.")

    config: Config

    @hookimpl
    def transform_learning_rates(
        self, learning_rates: LearningRates, step: InnerStep
    ) -> LearningRates | None:
        if self.config.decay == 1:
            return None
        factor = self.config.decay**step.index
        return {name: rate * factor for name, rate in learning_rates.items()}
