"""Wrong when they are off, among others, or in longer loops."""

import torch
from pydantic import Field
from torch import nn

from metaplug import Plugin, PluginConfig, hookimpl


class RunsPastItsSteps(Plugin):
    """A value for each step, by the step's index."""

    caught_by = "more-steps"
    says = "take the place of a per-step value from step.slot"

    @hookimpl
    def setup(self, context):
        self.rates = nn.ParameterList(
            [
                torch.tensor(0.1, dtype=context.dtype, device=context.device)
                for _ in range(context.inner_steps)
            ]
        )

    @hookimpl
    def transform_learning_rates(self, learning_rates, step):
        return {name: rate * self.rates[step.index] for name, rate in learning_rates.items()}


class IsNeverQuiteOff(Plugin):
    """Off, it is a product and a quotient that change the last digit."""

    caught_by = "off-is-baseline"
    says = "with the plugin off (strength = 0.0) and without it"
    off = {"strength": 0.0}

    class Config(PluginConfig):
        strength: float = Field(0.3, ge=0, description="How strong.")

    @hookimpl
    def transform_gradients(self, gradients):
        return {
            name: gradient * (1 + self.config.strength) * 7 / 7.0 / 3 * 3
            for name, gradient in gradients.items()
        }


class DoesNothing(Plugin):
    """Returns what it was given."""

    caught_by = "does-something"
    says = "weights and predictions are the same as without it"

    @hookimpl
    def transform_gradients(self, gradients):
        return dict(gradients)


class TakesAllWeightsAsAdapted(Plugin):
    """Looks for the first layer among the gradients, which others leave as it is."""

    caught_by = "composes"
    says = (
        "; nor does it go with 'lora', 'partial-adaptation': fix it, or declare "
        'conflicts_with = ("cavia", "lora", "partial-adaptation")\nsee'
    )

    @hookimpl
    def transform_gradients(self, gradients):
        return {**gradients, "0.weight": gradients["0.weight"] * 0.9}
