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
            None,
            min_length=1,
            description="Patterns of weights, as *.query.weight; null: those of linear layers.",
        )
        beside: tuple[str, ...] = Field(
            (), description="Patterns of the model's parameters that adapt too, as head.*."
        )
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
        wide = [name for name in context.layers if len(context.shapes[name]) > 1]
        if self.config.targets is None:
            wide = [name for name in wide if issubclass(context.layers[name], nn.Linear)]
        else:
            wide = list(self.matching("targets", wide, "weights that can change"))
        if not wide:
            raise RequestError(
                f"plugin '{self.name}' changes the weights of linear layers, and the model has "
                "none that is trainable: name others by targets, as *.weight"
            )
        self._names, rank = wide, self.config.rank
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for name in wide:
            outputs, inputs = context.parameters[name].flatten(1).shape
            start = torch.empty(rank, inputs, dtype=context.dtype).uniform_(-1, 1) / inputs**0.5
            self.a[key_of(name)] = start.to(context.device)
            self.b[key_of(name)] = torch.zeros(outputs, rank).to(start).to(context.device)

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
    def transform_learning_rates(self, learning_rates: LearningRates) -> LearningRates | None:
        if (own := self.config.inner_lr) is None:
            return None
        names = [f"{self.name}.{name}" for name, _ in self.named_parameters()]
        return {
            **learning_rates,
            **{name: learning_rates[name].new_full((), own) for name in names},
        }

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        starts = torch.cat([start.detach().flatten() for start in self.b.values()])
        return {"b": float(starts.square().mean().sqrt())}
