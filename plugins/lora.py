"""LoRA: a change of low rank of the weights adapts in the inner loop, the weights do not."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from metaplug import (
    Context,
    LearnedPluginConfig,
    LearningRates,
    Parameters,
    Plugin,
    RequestError,
    hookimpl,
    key_of,
)


class Lora(Plugin):
    """Adapt a change of low rank of chosen weights W, (outputs, inputs · places).

        W ← W + scale · b[t,k] a[t,k]        a (rank, inputs · places), b (outputs, rank)
        a[t,0] = a,  b[t,0] = b              meta-learned, as W is, which no task changes

    At first b is 0 and a uniform within ±1/√inputs, as in the authors' code (the paper: Gaussian).
    `scale` is their alpha / rank. Weights that are frozen for good cannot be chosen.

    Source: Hu et al. 2022 (arXiv 2106.09685), section 4.1, as the inner loop's variables.
    """

    class Config(LearnedPluginConfig):
        """Which weights change, by what, and how fast."""

        rank: int = Field(4, ge=1, le=65_536, description="Rank of the change of a weight.")
        scale: float = Field(1.0, gt=0, le=1e6, description="Factor of the product b a.")
        targets: tuple[str, ...] | None = Field(
            None, min_length=1, description="Patterns of weights; null: those of linear layers."
        )
        beside: tuple[str, ...] = Field((), description="Patterns of parameters that adapt too.")
        inner_lr: float | None = Field(
            None, ge=0, le=1e6, description="Inner learning rate of a and b; null: the learner's."
        )

    config: Config
    conflicts_with = ("partial-adaptation",)  # both say what adapts: here it is `beside`

    @hookimpl
    def select_adapted(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return self.matching("beside", names, "parameters that may adapt")

    @hookimpl
    def setup(self, context: Context) -> None:
        self._names = tuple(weight for weight, _ in context.layers_of(nn.Linear).values())
        if self.config.targets is not None:
            wide = [name for name in context.layers if len(context.shapes[name]) > 1]
            self._names = self.matching("targets", wide, "weights that can change")
        if not self._names:
            raise RequestError(
                f"plugin '{self.name}' finds no trainable linear layer: name weights by targets"
            )
        self.a, self.b, rank = nn.ParameterDict(), nn.ParameterDict(), self.config.rank
        for name in self._names:
            outputs, inputs = context.parameters[name].flatten(1).shape
            start = torch.empty(rank, inputs, dtype=context.dtype).uniform_(-1, 1) / inputs**0.5
            self.a[key_of(name)] = start.to(context.device)
            self.b[key_of(name)] = torch.zeros(outputs, rank, **context.factory_kwargs)

    @hookimpl
    def task_parameters(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())

    @hookimpl
    def transform_parameters(self, parameters: Parameters) -> Parameters:
        changed = dict(parameters)
        for name in self._names:
            a, b = (parameters[f"{self.name}.{factor}.{key_of(name)}"] for factor in "ab")
            changed[name] = changed[name] + self.config.scale * (b @ a).view_as(changed[name])
        return changed

    @hookimpl
    def transform_learning_rates(self, learning_rates: LearningRates) -> LearningRates:
        own, mine = self.config.inner_lr, f"{self.name}."
        return {
            name: rate.new_full((), own) if name.startswith(mine) and own is not None else rate
            for name, rate in learning_rates.items()
        }
