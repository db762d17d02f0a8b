"""ALFA: inner learning rates and weight decay that are generated for each task and step."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn

from metaplug import (
    Context,
    Gradients,
    InnerStep,
    LearnedPluginConfig,
    LearningRates,
    Parameters,
    Plugin,
    RequestError,
    hookimpl,
)


class Alfa(Plugin):
    """Replace the inner update by one whose rates α and factors β a network generates.

        τ[t,k] = means of θ[t,k,p] over its entries for all tensors p, then those of g[t,k,p]
        (a, b)[t,k] = 1 + W₂ relu(W₁ τ[t,k] + b₁) + b₂        one network for all steps
        α[t,k,p] = (α_in[p] / α₀) · rates[k,p] · a[t,k,p]     α₀ the inner learning rate
        β[t,k,p] = factors[k,p] · b[t,k,p]
        θ[t,k+1,p] = β[t,k,p] · θ[t,k,p] − α[t,k,p] · g[t,k,p]

    Rates start at α₀, factors at 1, W₂ and b₂ at 0: learning begins as MAML. On that the paper is
    silent. In the authors' code no 1 is added, W₂ starts as torch has it, and β = 1 − decays[k,p]·b
    with decays that start at 0.0005·α₀. A tensor that receives no gradient stays as it is.

    Source: Baik et al. 2020, "Meta-Learning with Adaptive Hyperparameters" (arXiv 2011.00209),
    section 3.
    """

    class Config(LearnedPluginConfig):
        """What is generated, and whether meta-gradients flow through what it is generated from."""

        rates: bool = Field(True, description="Whether α is generated; otherwise it is α_in.")
        factors: bool = Field(True, description="Whether β is generated; otherwise it is 1.")
        detach: bool = Field(
            False, description="Whether g is a constant in τ, as in the authors' code."
        )

    config: Config

    @hookimpl
    def setup(self, context: Context) -> None:
        if self.config.rates and context.inner_lr == 0:
            raise RequestError(
                f"plugin '{self.name}' learns rates that start at inner_lr, which is 0: "
                "give an inner_lr above 0, or rates = false"
            )
        self._names, self._start = context.adapted, context.inner_lr
        form: dict[str, Any] = {"dtype": context.dtype, "device": context.device}
        starts = {"rates": context.inner_lr, "factors": 1.0}
        shape = _, width = max(context.inner_steps, 1), len(context.adapted)
        self.bases = nn.ParameterDict(
            [  # pairs, which it does not sort as it sorts a mapping
                (kind, torch.full(shape, start, **form))
                for kind, start in starts.items()
                if getattr(self.config, kind)
            ]
        )
        if self.bases:
            last = nn.Linear(2 * width, len(self.bases) * width, **form)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.network = nn.Sequential(nn.Linear(2 * width, 2 * width, **form), nn.ReLU(), last)

    @hookimpl
    def update_parameters(
        self,
        parameters: Parameters,
        gradients: Gradients,
        learning_rates: LearningRates,
        step: InnerStep,
    ) -> Parameters | None:
        if not self.bases:
            return None
        weights = {name: parameters[name] for name in self._names}
        found = [gradients.get(name, 0 * weight.detach()) for name, weight in weights.items()]
        found = [each.detach() for each in found] if self.config.detach else found
        state = [each.reshape(len(each), -1).mean(1) for each in (*weights.values(), *found)]
        generated = (1 + self.network(torch.stack(state, 1))).split(len(weights), 1)
        scales = {
            kind: (base[step.slot] * part).unbind(1)
            for (kind, base), part in zip(self.bases.items(), generated, strict=True)
        }
        for column, (name, weight) in enumerate(weights.items()):
            if name in gradients:
                rate, kept, shape = learning_rates[name], weight, (-1, *[1] * (weight.dim() - 1))
                if "rates" in scales:
                    rate = rate / self._start * scales["rates"][column].view(shape)
                if "factors" in scales:
                    kept = weight * scales["factors"][column].view(shape)
                weights[name] = kept - rate * gradients[name]
        return weights

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        return {
            f"{kind}/{slot}": float(mean)
            for kind, base in self.bases.items()
            for slot, mean in enumerate(base.detach().mean(1))
        }
