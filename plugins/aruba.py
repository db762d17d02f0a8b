"""ARUBA: inner learning rates by coordinate, from how far tasks moved along each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from metaplug import (
    Context,
    Gradients,
    InnerStep,
    LearningRates,
    Outcome,
    Plugin,
    PluginConfig,
    hookimpl,
    key_of,
)


class Aruba(Plugin):
    """Set the inner learning rate of every coordinate by earlier tasks' ways and gradients.

        α[k] ← α[k] · √(b / G) / (ε / ζ)
        b ← b + ε² / (i + 2)^p + mean over t of ½ (θ[t,K] − θ[t,0])²       at first ε²
        G ← G + ζ² / (i + 2)^p + mean over t of Σ_k g[t,k]²                at first ζ²

    i counts meta-updates from 0, and ε = ζ · inner_lr, as in the authors' code. A batch of tasks
    counts as one round, as the paper's task. b and G are statistics, without a meta-gradient.
    ARUBA++, which refines G within a task, is not part of it.

    Source: Khodak et al. 2019 (arXiv 1906.02717), algorithm 2.
    """

    class Config(PluginConfig):
        """What the sums start from."""

        zeta: float = Field(1.0, gt=0, le=1e6, description="ζ, in units of gradient.")
        power: float = Field(1.0, ge=0, le=10, description="p, how fast what is added fades.")

    config: Config
    updates: Tensor

    @hookimpl
    def setup(self, context: Context) -> None:
        self._adapted = context.adapted
        # Without an inner learning rate nothing moves, and every ε is right.
        self._epsilon = self.config.zeta * (context.inner_lr or 1)
        self.register_buffer("updates", torch.zeros((), **context.factory_kwargs))
        for name in self._adapted:  # b / ε² and G / ζ², so the first rates are exact
            for kind in "bG":
                one = torch.ones(context.shapes[name], **context.factory_kwargs)
                self.register_buffer(f"{kind}/{key_of(name)}", one)

    @hookimpl
    def transform_learning_rates(self, learning_rates: LearningRates) -> LearningRates:
        return {name: rate * self._factor(name) for name, rate in learning_rates.items()}

    @hookimpl
    def transform_gradients(self, gradients: Gradients, step: InnerStep) -> None:
        for name, gradient in gradients.items():
            squared = gradient.detach().square().mean(0) / self.config.zeta**2
            step.keep(f"{step.index} G/{key_of(name)}", squared)

    @hookimpl
    def transform_outer_losses(self, outcome: Outcome) -> None:
        fading = (self.updates + 2) ** -self.config.power
        for name in self._adapted:
            way = outcome.adapted_parameters[name] - outcome.initial_parameters[name]
            squared = way.detach().square().mean(0) / (2 * self._epsilon**2)
            outcome.keep(f"end b/{key_of(name)}", fading + squared)
            outcome.keep(f"end G/{key_of(name)}", fading)  # of what has no gradient too

    @hookimpl
    def commit(self, kept: Mapping[str, Tensor]) -> None:
        self.updates += 1
        for key, added in kept.items():
            self.get_buffer(key.partition(" ")[2]).add_(added)

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        factors = torch.cat([self._factor(name).flatten() for name in self._adapted])
        values = torch.stack([factors.min(), factors.mean(), factors.max()]).tolist()
        names = ("factor/smallest", "factor/mean", "factor/largest")
        return dict(zip(names, values, strict=True))

    def _factor(self, name: str) -> Tensor:
        b, squares = (self.get_buffer(f"{kind}/{key_of(name)}") for kind in "bG")
        return (b / squares).sqrt()
