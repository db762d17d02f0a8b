"""A pretrained body with a new linear head."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from metaplug.models.lora import add_adapters
from metaplug.models.trained_part import freeze_unused, last_layers
from metaplug.models.transformers_config import TransformersConfig
from metaplug.models.zoo_model import ZooModel

_HEAD_STD = 0.02  # as the library starts its heads


class BodyAndHead(ZooModel):
    """What models of language and of images share.

    Args:
        body: of transformers, in evaluation mode.
        name, input_shape, outputs, config: as of ZooModel.
    """

    config: TransformersConfig

    def __init__(
        self,
        name: str,
        body: Any,
        input_shape: tuple[int, ...],
        outputs: int,
        config: TransformersConfig,
    ) -> None:
        super().__init__(name, input_shape, outputs, config)
        self.body = body
        width, example = self.try_body()
        self._train_with_head(width, *example)

    @abstractmethod
    def try_body(self) -> tuple[int, tuple[Tensor, ...]]:
        """Return the width of the hidden states that the head is given, and inputs to try.

        Raises:
            RequestError: the tasks' inputs are none that the body takes.
        """

    def _train_with_head(self, width: int, *example: Tensor) -> None:
        """Add a head for hidden states of this width, and choose what is trained."""
        if self.config.train == "lora":
            add_adapters(self.name, self.body, self.config)
        else:
            self.body.requires_grad_(self.config.train == "all")
        if self.config.train == "last":
            for layer in last_layers(self.name, self.body, self.config.last_layers):
                layer.requires_grad_(True)
        # A float32 head beside a body in bfloat16 keeps small steps.
        name = "float32" if self.config.dtype == "bfloat16" else self.config.dtype
        self.head = nn.Linear(width, self.outputs, dtype=getattr(torch, name))
        nn.init.normal_(self.head.weight, std=_HEAD_STD)
        nn.init.zeros_(self.head.bias)
        freeze_unused(self, *example)
