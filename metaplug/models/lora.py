"""Low-rank adapters of a frozen body, by PEFT."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from metaplug.errors import RequestError, did_you_mean, quoted, said_by
from metaplug.models.making import imported
from metaplug.settings import Settings

_QUERY_AND_VALUE = (
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("q_lin", "v_lin"),
    ("q", "v"),
    ("c_attn",),
    ("qkv",),
    ("Wqkv",),
    ("qkv_proj",),
    ("query_key_value",),
)
"""Names of the projections in the libraries' architectures; the last ones hold several at once."""


class LoraSettings(Settings):
    """The form of the adapters, which train = lora reads."""

    rank: int = Field(4, ge=1, le=1024, description="Rank of the adapters (train = lora).")
    alpha: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Scale of the adapters, which are multiplied by alpha / rank; null is "
        "2 · rank (train = lora).",
    )
    targets: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="Ends of the names of layers that get adapters; null finds the query and value "
        "projections (train = lora).",
    )
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout before the adapters (train = lora)."
    )


def add_adapters(name: str, body: nn.Module, settings: LoraSettings) -> None:
    """Freeze a body, and add adapters that are trained (Hu et al. 2021, sec. 4.1).

    W x becomes W x + (alpha / rank) B A x, with A random and B = 0: the body answers as before.
    Adapters have the body's dtype, but float32 beside bfloat16.

    Args:
        name: of the model, for errors.

    Raises:
        RequestError: PEFT is missing, or the body has no such layers.
    """
    peft: Any = imported(name, "peft", "text")
    # GPT-2's layers are none of torch's, and hold their weights transposed.
    adaptable = {
        key: type(layer).__name__
        for key, layer in body.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) or type(layer).__name__ == "Conv1D"
    }
    targets = settings.targets or _default_targets(name, adaptable)
    for target in targets:
        if not any(_ends(key, target) for key in adaptable):
            known = sorted({key.rpartition(".")[2] for key in adaptable})
            raise RequestError(
                f"the model '{name}' has no layer '{target}' for an adapter "
                f"(model.settings.targets): {did_you_mean(target, known)}"
            )
    met = {kind for key, kind in adaptable.items() if any(_ends(key, one) for one in targets)}
    lora = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank if settings.alpha is None else settings.alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(targets),
        fan_in_fan_out=met == {"Conv1D"},
    )
    body.requires_grad_(False)
    try:
        peft.inject_adapter_in_model(lora, body)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RequestError(
            f"the model '{name}' gets no adapters at {quoted(targets)} ({said_by(error)}): give "
            "other model.settings.targets"
        ) from error
    for value in body.parameters():
        if value.requires_grad and value.dtype == torch.bfloat16:  # in which small steps are lost
            value.data = value.data.float()


def _default_targets(name: str, adaptable: dict[str, str]) -> tuple[str, ...]:
    ends = {key.rpartition(".")[2] for key in adaptable}
    for targets in _QUERY_AND_VALUE:
        if ends.issuperset(targets):
            return targets
    raise RequestError(
        f"the model '{name}' has no query and value projections of a known name for adapters: name "
        f"layers in model.settings.targets, of {quoted(sorted(ends))}, or set another "
        "model.settings.train"
    )


def _ends(key: str, target: str) -> bool:
    """Whether PEFT takes this layer for the target."""
    return key == target or key.endswith(f".{target}")
