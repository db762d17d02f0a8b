"""The gate of gradient sharing without what it shares: a learned, smaller rate for each step."""

from __future__ import annotations

import torch
from torch import nn

from metaplug import Context, Gradients, InnerStep, LearnedPluginConfig, Plugin, hookimpl


class GateAlone(Plugin):
    """d[t,k] = (1 − σ(λ[k])) g[t,k]: gradient sharing with r = 0."""

    class Config(LearnedPluginConfig):
        """As gradient sharing has it."""

        meta_lr: float = 1e-2

    config: Config

    @hookimpl
    def setup(self, context: Context) -> None:
        steps = max(context.inner_steps, 1)
        start = torch.zeros(steps, dtype=context.dtype, device=context.device)
        self.gate = nn.Parameter(start)

    @hookimpl
    def transform_gradients(self, gradients: Gradients, step: InnerStep) -> Gradients:
        factor = 1 - torch.sigmoid(self.gate[step.slot])
        return {name: factor * gradient for name, gradient in gradients.items()}

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        weights = torch.sigmoid(self.gate.detach()).tolist()
        return {f"gate/{k}": weight for k, weight in enumerate(weights)}
