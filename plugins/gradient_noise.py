"""Gradient noise: annealed Gaussian noise on the inner gradients."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from metaplug import Gradients, InnerStep, Plugin, PluginConfig, hookimpl


class GradientNoise(Plugin):
    """Add Gaussian noise to every task's inner gradients in meta-training, less and less of it.

        g[t,k] ← g[t,k] + N(0, σ²(i)),   σ²(i) = scale / (1 + i)^decay        i the meta-iteration

    The noise follows from the learner's seed and the iteration, and is each task's own. Evaluation
    is left alone.

    Source: Neelakantan et al. 2015 (arXiv 1511.06807), equation 1.
    """

    class Config(PluginConfig):
        """How much noise, and how fast it fades."""

        scale: float = Field(
            1e-6,
            ge=0,
            le=1e6,
            description="Variance of the first iteration's noise, in units of squared gradient.",
        )
        decay: float = Field(
            0.55, ge=0, le=10, description="Exponent of its decay; 0 keeps it for good."
        )

    config: Config

    @hookimpl
    def transform_gradients(self, gradients: Gradients, step: InnerStep) -> Gradients | None:
        if not step.training or self.config.scale == 0:
            return None
        deviation = self._deviation(step.meta_iteration)
        return {
            name: gradient + deviation * _normal(gradient) for name, gradient in gradients.items()
        }

    @hookimpl
    def end_meta_step(self, iteration: int) -> dict[str, float]:
        return {"deviation": self._deviation(iteration)}

    def _deviation(self, iteration: int) -> float:
        deviation: float = (self.config.scale / (1 + iteration) ** self.config.decay) ** 0.5
        return deviation


def _normal(like: Tensor) -> Tensor:
    # randn_like would follow the strides, which another batching of tasks lays out differently.
    return torch.randn(like.shape, dtype=like.dtype, device=like.device)
