"""Settings of the bilevel loop, as a learner and a configuration file give them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from metaplug.settings import Settings


class LearnerSettings(Settings):
    """The bilevel loop."""

    inner_lr: float = Field(0.4, ge=0, le=1000, description="Inner learning rate.")
    inner_steps: int = Field(3, ge=0, le=1000, description="Inner steps K of a task.")
    inner_optimizer: str = Field(
        "sgd", description="sgd, adam, adamax, adagrad, adadelta or rmsprop."
    )
    inner_optimizer_settings: dict[str, Any] = Field(
        default_factory=dict, description="Settings of the inner optimizer, such as momentum."
    )
    meta_optimizer: Literal["adam", "sgd"] = Field(
        "adam", description="Optimizer of the outer loop."
    )
    meta_lr: float = Field(1e-3, gt=0, le=10, description="Its learning rate.")
    batch_norm: Literal["batch", "frozen"] = Field(
        "batch",
        description="Batch norm by the statistics of each task's batch (transductive), or by the "
        "model's stored ones, never updated.",
    )
    output: str | int | None = Field(
        None,
        description="The part of the model's answer that is its prediction, by name or place; "
        "null: the answer, or its logits.",
    )


NonFinite = Literal["stop", "skip"]
"""What a batch does in which something is NaN or Inf: stop training, or be left out and counted."""
