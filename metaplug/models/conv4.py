"""The four-block convolutional network of few-shot learning."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self, final

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from metaplug.errors import RequestError
from metaplug.models.parts import check_images
from metaplug.settings import Settings, validated

_BLOCKS = 4
_GROUPS = 8


class Conv4Config(Settings):
    """The layers of a Conv4."""

    filters: int = Field(32, ge=1, le=1024, description="Channels of every block.")
    pooling: Literal["max", "stride"] = Field(
        "stride", description="How a block halves its size: max-pooling 2 x 2, or stride 2."
    )
    leaky_slope: float = Field(
        0.0, ge=0, le=1, description="Slope of the activation below zero; 0 is ReLU."
    )
    norm: Literal["batch", "group", "layer", "none"] = Field(
        "batch", description="Norm over the batch, eight groups of channels, all channels, or none."
    )
    initialisation: Literal["torch", "xavier"] = Field(
        "torch", description="First weights: torch's, or Xavier's uniform ones with biases of zero."
    )

    @model_validator(mode="after")
    def _groups_divide(self) -> Self:
        if self.norm == "group" and self.filters % _GROUPS:
            raise ValueError(f"filters = {self.filters}: group norm needs a multiple of {_GROUPS}")
        return self


@final
class Conv4(nn.Module):
    """Four blocks, each halving the size, and a linear head (Vinyals et al. 2016).

    A block is a 3 x 3 convolution, a normalisation and ReLU. Batch norm always uses the
    statistics of the batch and stores none.

    Args:
        input_shape: (channels, height, width) of one image.
        outputs: the width of the head, >= 1.
        settings: fields of Conv4Config.

    Raises:
        RequestError: a setting is wrong, or the images are too small for four poolings.
    """

    Config: ClassVar[type[Conv4Config]] = Conv4Config

    def __init__(self, input_shape: tuple[int, ...], outputs: int, **settings: Any) -> None:
        super().__init__()
        self.config = validated(Conv4Config, settings, "conv4")
        self.input_shape = tuple(input_shape)
        self.outputs = outputs
        check_images("conv4", self.input_shape, outputs)
        channels, *size = self.input_shape
        if self.config.pooling == "max" and min(size) < 2**_BLOCKS:
            raise RequestError(
                f"conv4 halves an image four times, but {size[0]} x {size[1]} pixels are fewer "
                "than 16 x 16: enlarge the images, or set pooling = 'stride'"
            )
        filters = self.config.filters
        self.body = nn.Sequential(
            *(_Block(channels if block == 0 else filters, self.config) for block in range(_BLOCKS))
        )
        # A strided convolution with padding 1 rounds up, max-pooling down.
        divide = math.floor if self.config.pooling == "max" else math.ceil
        places = math.prod(divide(side / 2**_BLOCKS) for side in size)
        self.head = nn.Linear(filters * places, outputs)
        if self.config.initialisation == "xavier":
            self.apply(_xavier)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) to (n, outputs)."""
        logits: Tensor = self.head(self.body(x).flatten(1))
        return logits


class _Block(nn.Module):
    def __init__(self, channels: int, config: Conv4Config) -> None:
        super().__init__()
        self.slope = config.leaky_slope
        self.pool = config.pooling == "max"
        self.conv = nn.Conv2d(channels, config.filters, 3, stride=1 if self.pool else 2, padding=1)
        self.norm = _norm(config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x = F.leaky_relu(x, self.slope) if self.slope else F.relu(x)
        return F.max_pool2d(x, 2) if self.pool else x


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        assert module.bias is not None
        nn.init.zeros_(module.bias)


def _norm(config: Conv4Config) -> nn.Module:
    match config.norm:
        case "batch":
            return nn.BatchNorm2d(config.filters, track_running_stats=False)
        case "group":
            return nn.GroupNorm(_GROUPS, config.filters)
        case "layer":
            return nn.GroupNorm(1, config.filters)
        case "none":
            return nn.Identity()
