"""my-idea: inner gradients without some of their mean."""

from __future__ import annotations

from metaplug import Gradients, Plugin, PluginConfig, hookimpl
from pydantic import Field
from torch import Tensor


class MyIdea(Plugin):
    """Take a share of the mean out of every task's inner gradient.

        g[t] ← g[t] − strength · mean(g[t])        the mean over the inputs of each output

    Weights with inputs and outputs change; biases and the like are left alone.

    Source: Yong et al. 2020, "Gradient Centralization" (arXiv 2004.01461), where strength is 1.
    """

    class Config(PluginConfig):
        """How much is taken out."""

        strength: float = Field(0.5, ge=0, le=1, description="Share of the mean; 0 is off.")

    config: Config

    @hookimpl
    def transform_gradients(self, gradients: Gradients) -> Gradients | None:
        if self.config.strength == 0:
            return None
        return {name: self._centred(gradient) for name, gradient in gradients.items()}

    def _centred(self, gradient: Tensor) -> Tensor:
        """Of (tasks, outputs, *inputs); one of fewer axes as it is."""
        if gradient.dim() < 3:
            return gradient
        inputs = tuple(range(2, gradient.dim()))
        return gradient - self.config.strength * gradient.mean(inputs, keepdim=True)
