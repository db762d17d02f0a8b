"""CAVIA: a context vector adapts, and modulates the layers of a model that all tasks share."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from metaplug import (
    Context,
    LearnedPluginConfig,
    Parameters,
    Plugin,
    RequestError,
    hookimpl,
    key_of,
)

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Cavia(Plugin):
    """Adapt a context φ alone, from 0 in every task; it modulates the outputs of some layers.

        out ← γ ⊙ out + β,   γ = 1 + scales φ[t,k],   β = shifts φ[t,k],   φ[t,0] = 0
        in the layer:        weight ← γ ⊙ weight,   bias ← γ ⊙ bias + β

    The layers are all norm layers, as one of them undoes a modulation just before it; in a model
    without, all linear and convolution layers but the last. Without a bias a layer gets γ alone.
    `shift` changes the bias of the first linear or convolution layer alone, as if φ were put beside
    its inputs: so the paper regresses. Its classifiers have a learned offset in place of the 1, and
    modulate one layer of four, after pooling.

    Source: Zintgraf et al. 2019 (arXiv 1810.03642), section 3, and the authors' code.
    """

    class Config(LearnedPluginConfig):
        """How large the context is, and where it enters."""

        size: int = Field(100, ge=0, le=65_536, description="Numbers in φ; 0 adapts nothing.")
        modulation: Literal["film", "shift"] = Field(
            "film", description="film: γ and β; shift: β alone."
        )
        layers: tuple[str, ...] | None = Field(
            None, min_length=1, description="Patterns of layers, as body.*; null: as said above."
        )

    config: Config
    conflicts_with = ("partial-adaptation",)  # nothing of the model adapts
    runs_after = ("per-step-batch-norm",)  # which would replace what is modulated

    @hookimpl
    def select_adapted(self) -> tuple[str, ...]:
        return ()

    @hookimpl
    def setup(self, context: Context) -> None:
        self.scales, self.shifts = nn.ParameterDict(), nn.ParameterDict()
        self._outputs = self._chosen(context)
        for weight, outputs in self._outputs.items():
            film, has_bias = self.config.modulation == "film", _bias(weight) in context.shapes
            if not film and not has_bias:
                raise RequestError(
                    f"plugin '{self.name}' shifts by a trainable bias, and the layer of '{weight}' "
                    "has none: name others by layers, or use modulation film"
                )
            for maps in [self.scales] * film + [self.shifts] * has_bias:
                drawn = torch.empty(outputs.numel(), self.config.size, dtype=context.dtype)
                # Of variance 1 / size: a step of rate α on φ is about one of rate α on γ and β.
                drawn.uniform_(-1, 1).mul_((3 / max(self.config.size, 1)) ** 0.5)
                maps[key_of(weight)] = drawn.to(context.device)
        self._start = torch.zeros(self.config.size, dtype=context.dtype, device=context.device)

    @hookimpl
    def task_parameters(self) -> dict[str, Tensor]:
        return {"context": self._start}

    @hookimpl
    def transform_parameters(self, parameters: Parameters) -> Parameters:
        changed, context = dict(parameters), parameters[f"{self.name}.context"]
        for weight, outputs in self._outputs.items():
            key, bias = key_of(weight), _bias(weight)
            if key in self.scales:
                scale = (1 + context @ self.scales[key].T).view(-1, *outputs)
                places = [1] * (changed[weight].dim() - scale.dim())
                changed[weight] = scale.view(*scale.shape, *places) * changed[weight]
            if key in self.shifts:
                shift = (context @ self.shifts[key].T).view(-1, *outputs)
                own = scale * changed[bias] if key in self.scales else changed[bias]
                changed[bias] = own + shift
        return changed

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        maps = torch.cat([each.detach().flatten() for each in self.parameters()])
        return {"modulation": float(maps.norm())}

    def _chosen(self, context: Context) -> dict[str, torch.Size]:
        """Return the shape of the outputs of the layers to modulate, by their weights' names."""
        layers = {
            name: layer
            for name, layer in context.layers.items()
            if name.rpartition(".")[2] == "weight" and issubclass(layer, (*_NORMS, *_MAPS))
        }
        norms = [name for name in layers if issubclass(layers[name], _NORMS)]
        maps = [name for name in layers if name not in norms]
        chosen = maps[:1] if self.config.modulation == "shift" else norms or maps[:-1]
        if self.config.layers is not None:
            names = {name.removesuffix(".weight"): name for name in layers}
            what = "layers that it can modulate"
            chosen = [names[name] for name in self.matching("layers", tuple(names), what)]
        if not chosen:
            raise RequestError(
                f"plugin '{self.name}' finds no trainable norm layer and no hidden linear or "
                "convolution layer to modulate: name others by layers"
            )
        shapes = {name: context.shapes[name] for name in chosen}
        return {name: shape if name in norms else shape[:1] for name, shape in shapes.items()}


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"
