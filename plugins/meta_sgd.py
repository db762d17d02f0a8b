"""Meta-SGD: a learned inner learning rate for every single weight."""

from __future__ import annotations

import torch
from torch import nn

from metaplug import (
    Context,
    LearnedPluginConfig,
    LearningRates,
    Plugin,
    RequestError,
    hookimpl,
    key_of,
)


class MetaSgd(Plugin):
    """Meta-learn an inner learning rate for every weight, the same in all inner steps.

        α[p] ← (α_in[p] / α₀) · rates[p]        elementwise, of the parameter's shape; any sign

    The rates start at α₀, the inner learning rate (the paper draws them at random), and alone they
    are the learning rates. After another plugin that changes these they multiply what it gives, so
    the two compose in either order.

    Source: Li et al. 2017 (arXiv 1707.09835), section 3.
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
        like = context.parameters
        self.rates = nn.ParameterDict(
            {key_of(name): torch.full_like(like[name], self._start) for name in context.adapted}
        )

    @hookimpl
    def transform_learning_rates(self, learning_rates: LearningRates) -> LearningRates:
        rates = self.rates
        return {
            name: rate / self._start * rates[key_of(name)] for name, rate in learning_rates.items()
        }

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        rates = torch.cat([rate.detach().flatten() for rate in self.rates.values()])
        return {"rate": float(rates.mean()), "negative": float((rates < 0).to(rates.dtype).mean())}
