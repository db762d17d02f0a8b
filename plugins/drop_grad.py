"""Gradient dropout: multiplicative noise on the inner gradients."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from metaplug import Gradients, InnerStep, Plugin, PluginConfig, hookimpl


class DropGrad(Plugin):
    """Multiply every task's inner gradients by noise of mean 1 in meta-training.

        g[t,k] ← n[t,k] ⊙ g[t,k]
        n ~ Bernoulli(1 − p) / (1 − p)             binary: entries are dropped
        n ~ N(1, σ²) with σ² = p / (1 − p)         gaussian: noise of the same variance

    With the schedule "linear" what is drawn grows over the run, from 0 in its first iteration to
    p, or for Gaussian noise to σ, in its last. The noise is a constant to the meta-gradient and
    each task's own. Evaluation is left alone.

    Source: Tseng et al. 2020 (arXiv 2004.05859), section 3; the schedules are those of the
    authors' code.
    """

    class Config(PluginConfig):
        """How gradients are dropped."""

        noise: Literal["binary", "gaussian"] = Field(
            "gaussian", description="binary: drop entries; gaussian: scale them around 1."
        )
        rate: float = Field(0.1, ge=0, lt=1, description="p, the share of entries dropped.")
        schedule: Literal["constant", "linear"] = Field(
            "constant", description="constant; linear: the noise grows from none over the run."
        )

    config: Config

    @hookimpl
    def transform_gradients(self, gradients: Gradients, step: InnerStep) -> Gradients | None:
        if not step.training or self.config.rate == 0:
            return None
        level = self._level(step.meta_iteration, step.meta_iterations)
        return {
            name: gradient * self._noise(gradient, level) for name, gradient in gradients.items()
        }

    @hookimpl
    def end_meta_step(self, iteration: int, total: int) -> dict[str, float]:
        name = "rate" if self.config.noise == "binary" else "deviation"
        return {name: self._level(iteration, total)}

    def _level(self, iteration: int, total: int) -> float:
        """p or σ of an iteration."""
        p = self.config.rate
        full: float = p if self.config.noise == "binary" else (p / (1 - p)) ** 0.5
        if self.config.schedule == "constant":
            return full
        return full * iteration / max(total - 1, 1)

    def _noise(self, like: Tensor, level: float) -> Tensor:
        # Not rand_like: it follows the strides, which another batching of tasks lays out otherwise.
        form: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        if self.config.noise == "gaussian":
            return 1 + level * torch.randn(like.shape, **form)
        return (torch.rand(like.shape, **form) >= level).to(like.dtype) / (1 - level)
