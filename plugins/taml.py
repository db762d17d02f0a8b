"""Task-agnostic meta-learning: a start that favours no task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from metaplug import Context, Outcome, Plugin, PluginConfig, RequestError, hookimpl

_INEQUALITIES: dict[str, Callable[..., Tensor]] = {
    "theil": lambda r, mean: mean(r * r.log()),
    "generalized-entropy": lambda r, mean: (mean(r.square()) - 1) / 2,
    "atkinson": lambda r, mean: 1 - mean(r.sqrt()).square(),
    "gini": lambda r, mean: (r - r[:, None]).abs().mean() / 2,
    "variance-of-logarithms": lambda r, mean: mean((r.log() - mean(r.log())).square()),
}


class Taml(Plugin):
    """Regularise the outer loss, so the shared start does not perform better on some tasks.

        L[t] ← L[t] + strength · (H[t](θ[t,K]) − H[t](θ[t,0]))               measure: entropy
        L[t] ← L[t] + strength · I(r),  r[t] = ℓ[t] / mean of ℓ              another measure

    H[t] is the mean entropy of the predictions for query examples, ℓ[t] the support loss at the
    start θ[t,0], at least 1e-12, and I a measure of inequality; the generalized entropy is of α = 2
    and Atkinson's measure of ε = 1/2.

    Source: Jamal and Qi 2019 (arXiv 1805.07722), section 3.
    """

    class Config(PluginConfig):
        """What is regularised, and how strongly."""

        measure: Literal[
            "entropy", "theil", "generalized-entropy", "atkinson", "gini", "variance-of-logarithms"
        ] = Field("entropy", description="What is made small; all but entropy couple the tasks.")
        strength: float = Field(0.1, ge=0, le=1e6, description="Weight of the regulariser.")

    config: Config

    @property
    def couples_tasks(self) -> bool:  # type: ignore[override]
        """All measures but entropy compare tasks."""
        return self.config.measure != "entropy" and self.config.strength > 0

    @hookimpl
    def setup(self, context: Context) -> None:
        measure, off = self.config.measure, self.config.strength == 0
        if measure == "entropy" and context.kind != "classification":
            raise RequestError(
                f"plugin '{self.name}' takes the entropy of class probabilities, and "
                f"{context.kind} has none: choose another measure, such as theil"
            )
        if measure == "gini" and context.ranks > 1 and not off:
            raise RequestError(
                f"plugin '{self.name}' compares every pair of tasks for the Gini coefficient, and "
                f"those of {context.ranks} ranks do not meet: choose another measure, such as theil"
            )

    @hookimpl
    def transform_outer_losses(self, losses: Tensor, outcome: Outcome) -> Tensor | None:
        if self.config.strength == 0:
            return None
        if self.config.measure == "entropy":
            before = _entropy(outcome, outcome.forward(outcome.initial_parameters, index=0)[1])
            bias = _entropy(outcome, outcome.forward({})[1]) - before
        else:
            initial, _ = outcome.forward(outcome.initial_parameters, "support", index=0)
            bias = self._inequality(initial, outcome)
        outcome.log(self.config.measure, bias)
        return losses + self.config.strength * bias

    def _inequality(self, losses: Tensor, outcome: Outcome) -> Tensor:
        """I (), of (T,) losses; negative ones have none."""
        losses = torch.where((losses < 0) | (losses > 1e-12), losses, 1e-12)
        r = losses / outcome.task_mean(losses)
        return _INEQUALITIES[self.config.measure](r, outcome.task_mean)


def _entropy(outcome: Outcome, logits: Tensor) -> Tensor:
    """H (T,), of predictions (T, n, *output)."""
    axis = outcome.class_axis or 2

    def mean(logits: Tensor, targets: Tensor) -> Tensor:
        log_p = logits.log_softmax(axis)
        entropy = -(log_p.exp() * log_p).sum(axis)
        counted = torch.ones_like(entropy) if targets.is_floating_point() else targets != -100
        return (entropy * counted).flatten(1).sum(1) / counted.flatten(1).sum(1)

    return outcome.by_task(mean, outcome.batch.query_y, predictions=logits)
