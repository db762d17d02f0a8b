"""L2F: every task forgets a part of the shared start before it adapts."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from metaplug import Context, InnerStep, LearnedPluginConfig, Parameters, Plugin, hookimpl


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
    gamma: Tensor

    @hookimpl
    def setup(self, context: Context) -> None:
        self._names, width = context.adapted, len(context.adapted)
        if self.config.strength > 0:
            self.network = nn.Sequential(
                nn.Linear(width, width, dtype=context.dtype, device=context.device),
                nn.ReLU(),
                nn.Linear(width, width, dtype=context.dtype, device=context.device),
            )
        ones = torch.ones(width, dtype=context.dtype, device=context.device)
        self.register_buffer("gamma", ones, persistent=False)

    @hookimpl
    def initialize_parameters(self, parameters: Parameters, step: InnerStep) -> Parameters | None:
        if self.config.strength == 0:
            return None
        # Variables of their own: what another plugin made of other weights does not lead to them.
        starts = {name: _variable(parameters[name]) for name in self._names}
        gradients = step.gradients(step.objective({**parameters, **starts}), starts)
        # Of one that the loss does not reach the gradient is 0, as is any multiple of it.
        found = {name: gradients.get(name, 0 * start.detach()) for name, start in starts.items()}
        seen = torch.stack([each.reshape(len(each), -1).mean(1) for each in found.values()], 1)
        gates = self.network(seen.detach() if self.config.detach else seen).sigmoid()
        step.keep("gamma", gates.mean(0))
        factors = (1 - self.config.strength * (1 - gates)).unbind(1)
        return {
            **parameters,
            **{
                name: factor.view(-1, *[1] * (starts[name].dim() - 1)) * parameters[name]
                for name, factor in zip(self._names, factors, strict=True)
            },
        }

    @hookimpl
    def commit(self, kept: dict[str, Tensor]) -> None:
        self.gamma = kept.get("gamma", self.gamma)

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        return {"gamma": float(self.gamma.mean()), "smallest": float(self.gamma.min())}


def _variable(start: Tensor) -> Tensor:
    return start.view_as(start) if start.requires_grad else start.detach().requires_grad_()
