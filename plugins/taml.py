"""Task-agnostic meta-learning: a start that favours no task."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from metaplug import Context, Outcome, Plugin, PluginConfig, RequestError, hookimpl


class Taml(Plugin):
    """Regularise the outer loss, so the shared start does not perform better on some tasks.

        L[t] ← L[t] + strength · (H[t](θ[t,K]) − H[t](θ[t,0]))               measure: entropy
        L[t] ← L[t] + strength · I(ℓ[1], …, ℓ[T])                            another measure

    H[t] is the mean over examples of the entropy −Σ_c p(c) log p(c) of the predictions, ℓ[t] the
    support loss at the start θ[t,0], r[t] = ℓ[t] / mean of ℓ, and I is, with means over all tasks,

        theil                     mean of r log r
        generalized-entropy       (mean of r^α − 1) / (α (α − 1));  α = 1: theil, 0: mean of −log r
        atkinson                  1 − (mean of r^(1−ε))^(1/(1−ε));  ε = 1: 1 − exp(mean of log r)
        gini                      mean over pairs of |r[s] − r[t]| / 2
        variance-of-logarithms    mean of (log ℓ − mean of log ℓ)²

    Losses below 1e-12 count as 1e-12, and negative ones have no such measure.

    Source: Jamal and Qi 2019 (arXiv 1805.07722), section 3. The paper takes H over a task's
    samples without saying which: here they are an option.
    """

    class Config(PluginConfig):
        """What is regularised, and how strongly."""

        measure: Literal[
            "entropy", "theil", "generalized-entropy", "atkinson", "gini", "variance-of-logarithms"
        ] = Field("entropy", description="What is made small; all but entropy couple the tasks.")
        strength: float = Field(0.1, ge=0, le=1e6, description="Weight of the regulariser.")
        examples: Literal["support", "query"] = Field(
            "query", description="Those whose predictions' entropy is taken."
        )
        alpha: float = Field(2.0, ge=-10, le=10, description="α of generalized-entropy.")
        epsilon: float = Field(0.5, gt=0, le=10, description="ε of atkinson.")

    config: Config
    couples_tasks = True
    measured: Tensor

    @hookimpl
    def setup(self, context: Context) -> None:
        measure, off = self.config.measure, self.config.strength == 0
        self.couples_tasks = measure != "entropy" and not off
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
        measured = torch.zeros((), dtype=context.dtype, device=context.device)
        self.register_buffer("measured", measured, persistent=False)

    @hookimpl
    def transform_outer_losses(self, losses: Tensor, outcome: Outcome) -> Tensor | None:
        if self.config.strength == 0:
            return None
        if self.config.measure == "entropy":
            bias = self._entropy(outcome, None) - self._entropy(outcome, 0)
        else:
            initial = outcome.initial_parameters
            bias = self._inequality(outcome.forward(initial, "support", index=0)[0], outcome)
        outcome.keep("measured", bias.mean())
        return losses + self.config.strength * bias

    def _entropy(self, outcome: Outcome, index: int | None) -> Tensor:
        """H (T,), at the start (0) or after adaptation (None)."""
        weights = outcome.adapted_parameters if index is None else outcome.initial_parameters
        _, predictions = outcome.forward(weights, self.config.examples, index=index)
        axis = 2 if outcome.class_axis is None else outcome.class_axis

        def mean_entropy(logits: Tensor, targets: Tensor) -> Tensor:
            log_p = logits.log_softmax(axis)
            entropy = -(log_p.exp() * log_p).sum(axis).flatten(1)
            if targets.is_floating_point():  # probabilities of the classes
                return entropy.mean(1)
            counted = (targets != -100).flatten(1)
            return (entropy * counted).sum(1) / counted.sum(1)

        return outcome.by_task(mean_entropy, predictions, self.config.examples)

    def _inequality(self, losses: Tensor, outcome: Outcome) -> Tensor:
        """I (), of (T,) losses."""
        mean, measure = outcome.task_mean, self.config.measure
        least = torch.full_like(losses, 1e-12)
        losses = torch.where((losses < 0) | (losses > least), losses, least)
        if measure == "variance-of-logarithms":
            return mean((losses.log() - mean(losses.log())).square())
        r = losses / mean(losses)
        if measure == "gini":
            return (r - r[:, None]).abs().mean() / 2
        if measure == "atkinson":
            power = 1 - self.config.epsilon
            equal = mean(r.log()).exp() if power == 0 else mean(r**power) ** (1 / power)
            return 1 - equal
        alpha = 1.0 if measure == "theil" else self.config.alpha
        if alpha in (0, 1):
            return mean(r.log() * (r if alpha else -1))
        return (mean(r**alpha) - 1) / (alpha * (alpha - 1))

    @hookimpl
    def commit(self, kept: dict[str, Tensor]) -> None:
        self.measured = kept["measured"]

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        return {self.config.measure: float(self.measured)}
