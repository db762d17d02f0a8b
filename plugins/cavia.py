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
    per_task,
)

_BATCH_NORM = nn.modules.batchnorm._NormBase
_NORMS = _BATCH_NORM, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm
_MAPS = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d


class Cavia(Plugin):
    """Adapt a context φ alone, from 0 in every task; it modulates the outputs of some layers.

        weight ← γ ⊙ weight,   bias ← γ ⊙ bias + β        γ = 1 + scales φ[t,k],  β = shifts φ[t,k]

    These are all norm layers or, in a model without, all linear and convolution layers but the
    last. The paper's classifiers have a learned offset in place of the 1, and modulate one layer.

    Source: Zintgraf et al. 2019 (arXiv 1810.03642), section 3, and the authors' code.
    """

    class Config(LearnedPluginConfig):
        """How large the context is, and where it enters."""

        meta_lr: float | None = Field(0.01, gt=0, le=10, description="Meta learning rate.")
        size: int = Field(100, ge=0, le=65_536, description="Numbers in φ; 0 adapts nothing.")
        modulation: Literal["film", "shift"] = Field(
            "film", description="film: γ and β; shift: β alone, in the first layer with inputs."
        )
        layers: tuple[str, ...] | None = Field(
            None, min_length=1, description="Patterns of layers, as body.*; null: as said above."
        )

    config: Config
    # Nothing of the model adapts, and the start of φ is always 0: these would change nothing.
    conflicts_with = ("l2f", "partial-adaptation", "reptile")
    runs_after = ("per-step-batch-norm",)  # which would replace what is modulated

    @hookimpl
    def select_adapted(self) -> tuple[str, ...]:
        return ()

    @hookimpl
    def setup(self, context: Context) -> None:
        every, norms = context.layers_of(*_NORMS, *_MAPS), context.layers_of(*_NORMS)
        hidden, film = [*context.layers_of(*_MAPS)], self.config.modulation == "film"
        chosen = ([*norms] or hidden[:-1]) if film else hidden[:1]
        if not film and self.config.layers is None and context.layers_of(_BATCH_NORM):
            raise RequestError(
                f"plugin '{self.name}': modulation = 'shift' adds to what the first layer makes, "
                "and batch norm takes such shifts away: name layers behind it by layers, as the "
                "norm layers, or leave modulation at film"
            )
        if self.config.layers is not None:
            chosen = [*self.matching("layers", [*every], "layers that it can modulate")]
        self._layers = [every[name] for name in chosen]
        if not chosen or not (film or all(bias for _, bias in self._layers)):
            raise RequestError(
                f"plugin '{self.name}' finds no trainable norm, hidden linear or convolution layer "
                "to modulate, with a bias for modulation shift: name others by layers"
            )
        self.scales, self.shifts = nn.ParameterDict(), nn.ParameterDict()
        for name, (weight, bias) in zip(chosen, self._layers, strict=True):
            shape = context.shapes[weight] if name in norms else context.shapes[weight][:1]
            for maps in [self.scales] * film + [self.shifts] * (bias is not None):
                drawn = torch.empty(*shape, self.config.size, dtype=context.dtype)
                # Of variance 1 / size: a step of rate α on φ is about one of rate α on γ and β.
                drawn.uniform_(-1, 1).mul_((3 / max(self.config.size, 1)) ** 0.5)
                maps[key_of(weight)] = drawn.to(context.device)

    @hookimpl
    def task_parameters(self, context: Context) -> dict[str, Tensor]:
        return {"context": torch.zeros(self.config.size, **context.factory_kwargs)}

    @hookimpl
    def transform_parameters(self, parameters: Parameters) -> Parameters:
        changed, context = dict(parameters), parameters[f"{self.name}.context"]
        for weight, bias in self._layers:
            if (key := key_of(weight)) in self.scales:
                gamma = 1 + torch.tensordot(context, self.scales[key], ([1], [-1]))
                for name in (weight, bias) if bias else (weight,):
                    changed[name] = per_task(gamma, changed[name]) * changed[name]
            if bias:
                beta = torch.tensordot(context, self.shifts[key], ([1], [-1]))
                changed[bias] = changed[bias] + beta
        return changed
