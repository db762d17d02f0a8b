"""L2F: every task forgets a part of the shared start before it adapts."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from metaplug import (
    Context,
    InnerStep,
    LearnedPluginConfig,
    Parameters,
    Plugin,
    hookimpl,
    per_task,
    tensor_means,
)


class L2f(Plugin):
    """Attenuate the shared start, layer by layer, by what the task's support gradient asks for.

        μ[t,p] = mean over the entries of ∂ℓ[t] / ∂θ[p]          the support gradient at θ
        γ[t] = σ(W₂ relu(W₁ μ[t] + b₁) + b₂)                     one γ for each adapted tensor p
        θ[t,0,p] = (1 − strength · (1 − γ[t,p])) · θ[p]

    A layer is a parameter tensor, as in the authors' code, and the network's three layers of units
    are as wide as there are tensors. It starts as torch's linear layers do, so γ is near 1/2. The
    meta-gradient flows through the support gradient too; in the code it is a constant (`detach`).

    Source: Baik et al. 2020, "Learning to Forget for Meta-Learning" (arXiv 1906.05895), section 3.
    """

    class Config(LearnedPluginConfig):
        """How much may be forgotten, and what is learned of it."""

        strength: float = Field(
            1.0, ge=0, le=1, description="How far γ acts: 1 as published, 0 not at all."
        )
        detach: bool = Field(
            False, description="Whether the support gradient is a constant to the meta-gradient."
        )

    config: Config

    @hookimpl
    def setup(self, context: Context) -> None:
        self._names, width = context.adapted, len(context.adapted)
        if self.config.strength > 0:
            first, last = (nn.Linear(width, width, **context.factory_kwargs) for _ in range(2))
            self.network = nn.Sequential(first, nn.ReLU(), last)

    @hookimpl
    def initialize_parameters(self, parameters: Parameters, step: InnerStep) -> Parameters | None:
        if self.config.strength == 0:
            return None
        shared = {name: parameters[name] for name in self._names}
        # Variables of their own: what another plugin made of other weights does not lead to them.
        starts = {
            name: each.view_as(each) if each.requires_grad else each.detach().requires_grad_()
            for name, each in shared.items()
        }
        found = step.gradients(step.objective({**parameters, **starts}), starts)
        # Of one that the loss does not reach the gradient is 0.
        seen = tensor_means(found.get(name, torch.zeros_like(starts[name])) for name in starts)
        gates = self.network(seen.detach() if self.config.detach else seen).sigmoid()
        step.log("gamma", gates)
        step.log("smallest", gates.amin(1))
        factors = (1 - self.config.strength * (1 - gates)).unbind(1)
        pairs = zip(shared.items(), factors, strict=True)
        kept = {name: per_task(factor, each) * each for (name, each), factor in pairs}
        return {**parameters, **kept}
