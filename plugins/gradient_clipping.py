"""Gradient clipping in the inner loop, in the outer loop, or in both."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field, model_validator
from torch import Tensor

from metaplug import Gradients, InnerStep, Plugin, PluginConfig, hookimpl, per_task


class GradientClipping(Plugin):
    """Shorten gradients that are longer than a bound, keeping their direction.

        g[t] ← g[t] · min(1, c / ‖g[t]‖)        a task's inner gradient, over adapted parameters
        G    ← G · min(1, C / ‖G‖)              the meta-gradient, over all meta-parameters

    Source: Pascanu et al. 2013, "On the difficulty of training recurrent neural networks", 3.2.
    """

    class Config(PluginConfig):
        """At least one of the two bounds."""

        max_norm: float | None = Field(
            None,
            gt=0,
            examples=[0.1],
            description="c, the longest inner gradient of a task; null leaves inner gradients "
            "alone.",
        )
        max_meta_norm: float | None = Field(
            None,
            gt=0,
            description="C, the longest meta-gradient; null leaves meta-gradients alone.",
        )

        @model_validator(mode="after")
        def _clips_something(self) -> GradientClipping.Config:
            if self.max_norm is None and self.max_meta_norm is None:
                raise ValueError(
                    "neither max_norm nor max_meta_norm is set, so that nothing would be clipped: "
                    "set one"
                )
            return self

    config: Config

    @hookimpl
    def transform_gradients(self, gradients: Gradients, step: InnerStep) -> Gradients | None:
        if self.config.max_norm is None:
            return None
        rows = [gradient.reshape(len(gradient), -1) for gradient in gradients.values()]
        scale = _scale([row.square().sum(1) for row in rows], self.config.max_norm)
        step.log(f"clipped/{step.slot}", (scale < 1).to(scale))  # the share of tasks
        return {name: gradient * per_task(scale, gradient) for name, gradient in gradients.items()}

    @hookimpl
    def transform_meta_gradients(
        self, gradients: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor] | None:
        if self.config.max_meta_norm is None:
            return None
        squares = [gradient.square().sum() for gradient in gradients.values()]
        scale = _scale(squares, self.config.max_meta_norm)
        return {name: gradient * scale for name, gradient in gradients.items()}


def _scale(squares: list[Tensor], bound: float) -> Tensor:
    """min(1, bound / √Σ squares), exactly 1 up to the bound, with a finite derivative at zero."""
    squared = torch.stack(squares).sum(0)
    return torch.where(squared > bound**2, bound / squared.clamp_min(bound**2).sqrt(), 1.0)
