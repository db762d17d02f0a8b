"""Meta-regularised MAML: shared weights as Gaussians, which memorise no more than they must."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from metaplug import (
    Context,
    InnerStep,
    LearnedPluginConfig,
    Outcome,
    Parameters,
    Plugin,
    RequestError,
    hookimpl,
    key_of,
)


class MrMaml(Plugin):
    """Draw shared weights from learned Gaussians in meta-training, and pay for what they know.

        θ[t,0] = μ + σ ⊙ n,  n ~ N(0, 1)        μ the model's own weights, log σ meta-learned
        L[t] ← L[t] + β · KL,  KL = Σ over entries of log(s / σ) + (σ² + μ²) / (2 s²) − ½

    KL is the divergence of N(μ, σ²) from the prior N(0, s²). At evaluation weights are μ. A
    deviation of exactly 0 stays 0 for good.

    Source: Yin et al. 2020 (arXiv 1912.03820), section 4.2, on weights. As in the authors' code,
    what is drawn are the weights, not the biases, of the part that is not adapted, once for all
    tasks of a batch; the code draws anew for query examples, which here see the same weights.
    """

    class Config(LearnedPluginConfig):
        """What is drawn, and what it costs."""

        beta: float = Field(1e-3, ge=0, le=1e6, description="β, the weight of the divergence.")
        deviation: float = Field(0.01, ge=0, le=100, description="Initial value of every σ.")
        prior: float = Field(1.0, gt=0, le=1e6, description="s, the deviation of the prior.")
        weights: tuple[str, ...] | None = Field(
            None,
            min_length=1,
            examples=[("*weight",)],
            description="Patterns of the names that are drawn, as conv*; null: all tensors of two "
            "or more axes that are not adapted.",
        )
        draws: Literal["batch", "task"] = Field(
            "batch", description="One draw for all tasks of a batch, or one for each task."
        )

    config: Config
    divergence: Tensor

    @hookimpl
    def setup(self, context: Context) -> None:
        form: dict[str, Any] = {"dtype": context.dtype, "device": context.device}
        deviation = self.config.deviation
        self.register_buffer("divergence", torch.zeros((), **form), persistent=False)
        if self.config.beta > 0 and deviation == 0:
            raise RequestError(
                f"plugin '{self.name}' weighs the divergence of weights of deviation 0, which has "
                "no bound: give a deviation above 0, or beta = 0"
            )
        self._drawn = self._chosen(context) if deviation > 0 else []
        self.log_deviations = nn.ParameterDict(
            {
                key_of(name): torch.full(context.shapes[name], math.log(deviation), **form)
                for name in self._drawn
            }
        )

    def _chosen(self, context: Context) -> list[str]:
        names, patterns = [*context.parameters], self.config.weights
        if patterns is None:
            chosen = [name for name in names if name not in context.adapted]
            chosen = [name for name in chosen if len(context.shapes[name]) > 1]
            fault = "there are none: put partial-adaptation before it, or say which in weights"
        else:
            chosen = [name for name in names if any(fnmatchcase(name, each) for each in patterns)]
            fault = (
                f"none of {', '.join(names[:6])} is like {' or '.join(patterns)}: correct weights"
            )
        if not chosen:
            what = "weights that are not adapted" if patterns is None else "chosen weights"
            raise RequestError(f"plugin '{self.name}' draws {what}, but {fault}")
        return chosen

    @hookimpl
    def initialize_parameters(self, parameters: Parameters, step: InnerStep) -> Parameters | None:
        if not step.training or not self._drawn:
            return None
        drawn = {}
        for name in self._drawn:
            mean, log_deviation = parameters[name], self.log_deviations[key_of(name)]
            shape = mean.shape if self.config.draws == "task" else mean.shape[1:]
            noise = torch.randn(shape, dtype=mean.dtype, device=mean.device)
            drawn[name] = mean + log_deviation.exp() * noise
        return {**parameters, **drawn}

    @hookimpl
    def transform_outer_losses(self, losses: Tensor, outcome: Outcome) -> Tensor | None:
        if self.config.beta == 0:
            return None
        prior, terms = self.config.prior, []
        for name in self._drawn:
            mean, log_deviation = outcome.model_parameters[name], self.log_deviations[key_of(name)]
            squares = (2 * log_deviation).exp() + mean.square()
            terms.append((squares / (2 * prior**2) - log_deviation + math.log(prior) - 0.5).sum())
        divergence = torch.stack(terms).sum()
        outcome.keep("divergence", divergence)
        return losses + self.config.beta * divergence

    @hookimpl
    def commit(self, kept: Mapping[str, Tensor]) -> None:
        self.divergence = kept.get("divergence", self.divergence)

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        means = [each.detach().exp().mean() for each in self.log_deviations.values()]
        deviation = float(torch.stack(means).mean()) if means else 0.0
        return {"divergence": float(self.divergence), "deviation": deviation}
