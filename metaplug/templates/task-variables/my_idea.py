"""my-idea: a temperature that every task adapts, too."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from metaplug import Context, LearnedPluginConfig, Parameters, Plugin, hookimpl, per_task
from pydantic import Field
from torch import Tensor, nn


class MyIdea(Plugin):
    """Scale the weight of the last layer by a number that each task adapts.

        W[t] ← W[t] · exp(v[t])

    The inner loop adapts v[t] beside the weights, at the same rate; where it starts is
    meta-learned.

    Source: after Zintgraf et al. 2019, "Fast Context Adaptation via Meta-Learning" (arXiv
    1810.03642), whose tasks adapt variables that are no weights.
    """

    class Config(LearnedPluginConfig):
        """Where it starts."""

        start: float = Field(0.0, ge=-5, le=5, description="What v is at first; 0 scales by 1.")

    config: Config

    @hookimpl
    def setup(self, context: Context) -> None:
        weights = [name for name in context.layers if len(context.shapes[name]) > 1]
        self.weight = weights[-1]
        start = torch.full((1,), self.config.start, dtype=context.dtype, device=context.device)
        self.log_scale = nn.Parameter(start)

    @hookimpl
    def task_parameters(self) -> Mapping[str, Tensor]:
        # Name only those that a task adapts: leave out meta-parameters that all tasks share.
        return dict(self.named_parameters())

    @hookimpl
    def transform_parameters(self, parameters: Parameters) -> Parameters:
        weight = parameters[self.weight]
        scale = parameters[f"{self.name}.log_scale"].exp()  # (T, 1): one for each task
        return {**parameters, self.weight: weight * per_task(scale, weight)}
