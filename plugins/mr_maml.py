"""Meta-regularised MAML: shared weights as Gaussians, which memorise no more than they must."""

from __future__ import annotations

import math

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

    KL is that of N(μ, σ²) from the prior N(0, s²). At evaluation weights are μ. By default tensors
    of two or more axes are drawn that are not adapted.

    Source: Yin et al. 2020 (arXiv 1912.03820), section 4.2, on weights; as in the authors' code one
    draw for all tasks of a batch, which query examples see too (the code draws anew for them).
    """

    class Config(LearnedPluginConfig):
        """What is drawn, and what it costs."""

        beta: float = Field(1e-3, ge=0, le=1e6, description="β, the weight of the divergence.")
        deviation: float = Field(0.01, ge=0, le=100, description="First σ; 0 draws nothing.")
        prior: float = Field(1.0, gt=0, le=1e6, description="s, the deviation of the prior.")
        weights: tuple[str, ...] | None = Field(
            None, min_length=1, examples=[("*weight",)], description="Patterns of what is drawn."
        )

    config: Config

    @hookimpl
    def setup(self, context: Context) -> None:
        names, deviation = tuple(context.parameters), self.config.deviation
        drawn = [n for n in names if n not in context.adapted and len(context.shapes[n]) > 1]
        if self.config.weights is not None:
            drawn = [*self.matching("weights", names, "parameters")]
        self._drawn = drawn if deviation > 0 else []
        if not self._drawn and (deviation > 0 or self.config.beta > 0):
            raise RequestError(
                f"plugin '{self.name}' has no weights to draw: put partial-adaptation before it or "
                "name some by weights, and give a deviation above 0"
            )
        self.log_deviations = nn.ParameterDict()
        for name in self._drawn:
            start = torch.full_like(context.parameters[name], math.log(deviation))
            self.log_deviations[key_of(name)] = start

    @hookimpl
    def initialize_parameters(self, parameters: Parameters, step: InnerStep) -> Parameters | None:
        if not step.training:
            return None
        drawn = {}
        for name in self._drawn:
            mean, deviation = parameters[name], self.log_deviations[key_of(name)].exp()
            noise = torch.randn(mean.shape[1:], dtype=mean.dtype, device=mean.device)
            drawn[name] = mean + deviation * noise
        return {**parameters, **drawn}

    @hookimpl
    def transform_outer_losses(self, losses: Tensor, outcome: Outcome) -> Tensor | None:
        if not self._drawn:
            return None
        prior, terms = self.config.prior, []
        for name in self._drawn:
            mean, log_deviation = outcome.model_parameters[name], self.log_deviations[key_of(name)]
            squares = (2 * log_deviation).exp() + mean.square()
            terms.append((squares / (2 * prior**2) - log_deviation + math.log(prior) - 0.5).sum())
        divergence = torch.stack(terms).sum()
        outcome.log("divergence", divergence)
        means = [each.exp().mean() for each in self.log_deviations.values()]
        outcome.log("deviation", torch.stack(means))
        return losses + self.config.beta * divergence
