"""my-idea: a multilayer perceptron with one residual block."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from metaplug.settings import Settings, validated
from pydantic import Field
from torch import Tensor, nn


@final
class MyIdea(nn.Module):
    """A hidden layer, a residual block over it, and a linear head.

        h = tanh(A x),    f(x) = C (h + tanh(B h))        each with a bias

    Args:
        input_shape: of one example; it is flattened.
        outputs: the width of the head, >= 1.
        settings: fields of Config.

    Raises:
        RequestError: a setting is out of bounds or unknown.
    """

    class Config(Settings):
        """How large it is."""

        width: int = Field(40, ge=1, le=65536, description="Units of the hidden layer.")

    def __init__(self, input_shape: tuple[int, ...], outputs: int, **settings: Any) -> None:
        super().__init__()
        self.config = validated(self.Config, settings, "my-idea")
        self.input_shape = tuple(input_shape)
        self.outputs = outputs
        width = self.config.width
        self.first = nn.Linear(math.prod(self.input_shape), width)
        self.block = nn.Linear(width, width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, *input_shape) to (n, outputs)."""
        hidden = torch.tanh(self.first(x.flatten(1)))
        result: Tensor = self.head(hidden + torch.tanh(self.block(hidden)))
        return result
