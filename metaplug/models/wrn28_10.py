"""The wide residual network."""

from __future__ import annotations

from typing import Any, ClassVar, Self, final

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from metaplug.models.parts import batch_norm, check_images, convolution
from metaplug.settings import Settings, validated

_STEM = 16
_GROUPS = ((16, 1), (32, 2), (64, 2))
"""Of each group: its channels before widening, and the stride of its first convolution."""


class WideResNetConfig(Settings):
    """The layers of a WideResNet."""

    depth: int = Field(
        28, ge=10, le=1000, description="Layers, 6n + 4 for n blocks in each of the three groups."
    )
    widen_factor: int = Field(
        10, ge=1, le=64, description="Factor k on the channels 16, 32, 64 of the groups."
    )

    @model_validator(mode="after")
    def _whole_blocks(self) -> Self:
        if self.depth % 6 != 4:
            raise ValueError(f"depth = {self.depth}: it must be 6n + 4, such as 10, 16, 22 or 28")
        return self


@final
class WideResNet(nn.Module):
    """Three groups of pre-activated residual blocks, global average pooling and a linear head.

    A block is twice batch norm, ReLU and a 3 x 3 convolution; the second and third group halve the
    size. Where a block changes the form, its shortcut is a 1 x 1 convolution of the activated
    input, as in the authors' own program (Zagoruyko and Komodakis 2016, WRN-28-10, arXiv
    1605.07146), here without dropout. Batch norm always uses the statistics of the batch and
    stores none.

    Args:
        input_shape: (channels, height, width) of one image, of any size.
        outputs: the width of the head, >= 1.
        settings: fields of WideResNetConfig.

    Raises:
        RequestError: a setting is wrong, or the inputs are no images.
    """

    Config: ClassVar[type[WideResNetConfig]] = WideResNetConfig

    def __init__(self, input_shape: tuple[int, ...], outputs: int, **settings: Any) -> None:
        super().__init__()
        self.config = validated(WideResNetConfig, settings, "wrn28_10")
        self.input_shape = tuple(input_shape)
        self.outputs = outputs
        check_images("wrn28_10", self.input_shape, outputs)
        self.stem = convolution(self.input_shape[0], _STEM, 3)
        channels, blocks = _STEM, []
        for width, stride in _GROUPS:
            for block in range((self.config.depth - 4) // 6):
                filters = width * self.config.widen_factor
                blocks.append(_Block(channels, filters, stride if block == 0 else 1))
                channels = filters
        self.body = nn.Sequential(*blocks)
        self.norm = batch_norm(channels)
        self.head = nn.Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) to (n, outputs)."""
        logits: Tensor = self.head(F.relu(self.norm(self.body(self.stem(x)))).mean((2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = batch_norm(channels), convolution(channels, filters, 3, stride)
        self.norm2, self.conv2 = batch_norm(filters), convolution(filters, filters, 3)
        same = (channels, stride) == (filters, 1)
        self.shortcut = None if same else convolution(channels, filters, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        y: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return y + (x if self.shortcut is None else self.shortcut(active))
