"""Per-step learning rates: one for each inner step and parameter tensor (MAML++'s LSLR)."""

from __future__ import annotations

import torch
from torch import nn

from metaplug import (
    Context,
    InnerStep,
    LearnedPluginConfig,
    LearningRates,
    Plugin,
    RequestError,
    hookimpl,
)


class PerStepLearningRates(Plugin):
    """Meta-learn the inner learning rate of every inner step k and adapted tensor p.

        α[k,p] ← (α_in[p] / α₀) · rates[k,p]        α₀ the inner learning rate; shape (K, tensors)

    The rates start at α₀, and alone they are the learning rates. After another plugin that changes
    these they multiply what it gives, so the two compose in either order. The tensors are the
    adapted parameters in the model's order.

    Source: Antoniou et al. 2019 (arXiv 1810.09502), section 4, "Learning Per-Layer Per-Step
    Learning Rates".
    """

    class Config(LearnedPluginConfig):
        """How fast the rates are learned."""

    config: Config

    @hookimpl
    def setup(self, context: Context) -> None:
        if context.inner_lr == 0:
            raise RequestError(
                f"plugin '{self.name}' learns rates that start at inner_lr, which is 0: "
                "give an inner_lr above 0"
            )
        self._start = context.inner_lr
        self._columns = {name: column for column, name in enumerate(context.adapted)}
        shape = (max(context.inner_steps, 1), len(context.adapted))
        self.rates = nn.Parameter(
            torch.full(shape, context.inner_lr, dtype=context.dtype, device=context.device)
        )

    @hookimpl
    def transform_learning_rates(
        self, learning_rates: LearningRates, step: InnerStep
    ) -> LearningRates:
        rates = self.rates[step.slot].unbind()
        return {
            name: rate / self._start * rates[self._columns[name]]
            for name, rate in learning_rates.items()
        }

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        return {
            f"rate/{slot}": float(rate) for slot, rate in enumerate(self.rates.detach().mean(1))
        }
