"""my-idea: an inner loss that keeps predictions small."""

from __future__ import annotations

from metaplug import InnerStep, Plugin, PluginConfig, hookimpl
from pydantic import Field
from torch import Tensor


class MyIdea(Plugin):
    """Add the mean square of the predictions to every task's support loss.

        ℓ[t] ← ℓ[t] + (strength / 2) · mean(f(x)²)        over examples and outputs; f(x) the logits

    Source: Kannan et al. 2018, "Adversarial Logit Pairing" (arXiv 1803.06373): logit squeezing.
    """

    class Config(PluginConfig):
        """How much it counts."""

        strength: float = Field(0.1, ge=0, le=1e6, description="Weight of the penalty; 0 is off.")

    config: Config

    @hookimpl
    def transform_inner_losses(self, losses: Tensor, step: InnerStep) -> Tensor | None:
        if self.config.strength == 0:
            return None
        # By task: predictions of the smaller tasks of a batch are padded.
        return losses + self.config.strength / 2 * step.by_task(_mean_square)


def _mean_square(predictions: Tensor) -> Tensor:
    """(tasks, examples, *output) to (tasks,)."""
    return predictions.square().flatten(1).mean(1)
