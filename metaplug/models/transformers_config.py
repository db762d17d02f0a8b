"""The settings of models of the library transformers."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from metaplug.models.lora import LoraSettings
from metaplug.models.token_masks import Pooling


class TransformersConfig(LoraSettings):
    """How a body of transformers is loaded, pooled and trained."""

    pooling: Pooling = Field(
        "mean",
        description="Of the last hidden states: the mean over tokens that count, the first (cls) "
        "or the last of them, which suits causal models.",
    )
    train: Literal["lora", "head", "last", "all"] = Field(
        "lora",
        description="What is trained beside the head: low-rank adapters, nothing, the last layers, "
        "or all of the body.",
    )
    last_layers: int = Field(
        1, ge=1, le=1000, description="Layers of the body that train = last trains."
    )
    dropout: float | None = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability of every dropout layer of the body, 0 also keeps every layer from "
        "being dropped as a whole; null leaves them as the folder says.",
    )
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        "float32",
        description="Of the body; adapters and head are float32 beside a body in bfloat16.",
    )
    pretrained: bool = Field(
        True, description="Whether weights are loaded; false: random ones, by config.json alone."
    )
    download: bool = Field(
        False, description="Whether files that are not on this machine may be fetched."
    )

    @model_validator(mode="after")
    def _check_dtype(self) -> Self:
        if self.dtype == "bfloat16" and self.train in ("last", "all"):
            raise ValueError(
                f"dtype = bfloat16 loses the steps of train = {self.train}: use float32, or train "
                "lora or head"
            )
        return self

    @model_validator(mode="after")
    def _check_idle(self) -> Self:
        """Refuse a setting that what is trained does not read."""
        readers = {"last_layers": "last"} | dict.fromkeys(LoraSettings.model_fields, "lora")
        for field, reader in readers.items():
            default = type(self).model_fields[field].default
            if self.train != reader and getattr(self, field) != default:
                raise ValueError(f"{field} is read by train = {reader}, not by {self.train}")
        return self
