"""ALFA: inner learning rates and weight decay that are generated for each task and step."""

from __future__ import annotations

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
    per_task,
    tensor_means,
)


class Alfa(Plugin):
    """Replace the inner update by one whose rates α and factors β a network generates.

        τ[t,k] = means of θ[t,k,p] over its entries for all tensors p, then those of g[t,k,p]
        (a, b)[t,k] = 1 + W₂ relu(W₁ τ[t,k] + b₁) + b₂        one network for all steps
        α[t,k,p] = (α_in[p] / α₀) · rates[k,p] · a[t,k,p]     α₀ the inner learning rate
        θ[t,k+1,p] = factors[k,p] · b[t,k,p] · θ[t,k,p] − α[t,k,p] · g[t,k,p]

    Rates start at α₀, factors at 1, W₂ and b₂ at 0, so learning begins as MAML; the authors' code
    adds no 1, and its decays, 1 − β, start at 0.0005·α₀.

    Source: Baik et al. 2020 (arXiv 2011.00209), section 3.
    """

    class Config(LearnedPluginConfig):
        """What is generated, and whether meta-gradients flow through what it is generated from."""

        rates: bool = Field(True, description="Whether α is generated; otherwise it is α_in.")
        factors: bool = Field(True, description="Whether β is generated; otherwise it is 1.")
        detach: bool = Field(False, description="Whether g is a constant in τ, as in their code.")

    config: Config

    @hookimpl
    def setup(self, context: Context) -> None:
        if self.config.rates and context.inner_lr == 0:
            raise RequestError(
                f"plugin '{self.name}' starts rates at inner_lr = 0: raise it, or set rates = false"
            )
        self._start, width, form = context.inner_lr, len(context.adapted), context.factory_kwargs
        bases = torch.ones(max(context.inner_steps, 1), width, **form)
        starts = {"rates": context.inner_lr * bases, "factors": bases}
        chosen = [(kind, start) for kind, start in starts.items() if getattr(self.config, kind)]
        self.bases = nn.ParameterDict(chosen)  # of pairs, as it sorts a mapping
        if chosen:
            last = nn.Linear(2 * width, len(chosen) * width, **form)
            for each in last.parameters():
                nn.init.zeros_(each)
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
        found = [gradients.get(name, torch.zeros_like(each)) for name, each in parameters.items()]
        found = [each.detach() for each in found] if self.config.detach else found
        generated = 1 + self.network(tensor_means([*parameters.values(), *found]))
        parts = generated.split(len(parameters), 1)
        weights, rates = dict(parameters), dict(learning_rates)
        for (kind, base), part in zip(self.bases.items(), parts, strict=True):
            changed, unit = (rates, self._start) if kind == "rates" else (weights, 1)
            scales = base[step.slot] * part
            step.log(f"{kind}/{step.slot}", scales)
            for name, scale in zip(parameters, scales.unbind(1), strict=True):
                changed[name] = changed[name] / unit * per_task(scale, parameters[name])
        moved = {name: weights[name] - rates[name] * each for name, each in gradients.items()}
        return {**parameters, **moved}
