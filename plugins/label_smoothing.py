"""Label smoothing: the support loss with some of the label's weight spread over all classes."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from metaplug import Context, InnerStep, Plugin, PluginConfig, RequestError, hookimpl


class LabelSmoothing(Plugin):
    """Spread a share of every label evenly over the classes, in the inner loss of a classifier.

        ℓ[t,k] ← (1 − ε) · ℓ[t,k] + ε · mean over examples and classes c of −log p(c)

    Examples whose class index is -100 count for nothing, as in the loss. With cross-entropy this is
    cross-entropy against the smoothed label. The query loss stays.

    Source: Szegedy et al. 2016 (arXiv 1512.00567), section 7.
    """

    class Config(PluginConfig):
        """How much is spread."""

        smoothing: float = Field(
            0.1, ge=0, le=1, description="ε, the share of a label that is spread over all classes."
        )

    config: Config

    @hookimpl
    def setup(self, context: Context) -> None:
        if context.kind != "classification":
            raise RequestError(
                f"plugin '{self.name}' smooths class labels, and {context.kind} has none: "
                "leave it out, or use classification"
            )

    @hookimpl
    def transform_inner_losses(self, losses: Tensor, step: InnerStep) -> Tensor | None:
        if self.config.smoothing == 0:
            return None
        axis = 2 if step.class_axis is None else step.class_axis

        def spread(logits: Tensor, targets: Tensor) -> Tensor:
            even = -logits.log_softmax(axis).mean(axis)
            if targets.is_floating_point():  # probabilities of the classes
                return even.flatten(1).mean(1)
            counted = (targets != -100).flatten(1)
            return (even.flatten(1) * counted).sum(1) / counted.sum(1)

        return (1 - self.config.smoothing) * losses + self.config.smoothing * step.by_task(
            spread, step.targets
        )
