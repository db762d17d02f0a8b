"""The residual network of few-shot learning."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Self, final

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from metaplug.errors import RequestError
from metaplug.models.parts import batch_norm, check_images, convolution
from metaplug.settings import Settings, validated

_BLOCKS = 4
_SLOPE = 0.1


class ResNet12Config(Settings):
    """The layers of a ResNet12."""

    filters: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        (64, 160, 320, 640), description="Channels of the four blocks, 1 to 4096 each."
    )

    @model_validator(mode="after")
    def _one_for_each_block(self) -> Self:
        if len(self.filters) != _BLOCKS:
            raise ValueError(f"filters = {self.filters}: give 4 numbers, one for each block")
        return self


@final
class ResNet12(nn.Module):
    """Four residual blocks, each halving the size, global average pooling and a linear head.

    A block is three 3 x 3 convolutions with batch norm and leaky ReLU 0.1, beside a 1 x 1
    convolution with batch norm as the shortcut; max-pooling 2 x 2 follows their sum (Oreshkin et
    al. 2018). The widths 64, 160, 320, 640 are those of Lee et al. (arXiv 1904.03758), here without
    dropout. Batch norm always uses the statistics of the batch and stores none.

    Args:
        input_shape: (channels, height, width) of one image, at least 16 x 16 pixels.
        outputs: the width of the head, >= 1.
        settings: fields of ResNet12Config.

    Raises:
        RequestError: a setting is wrong, or the inputs are no images or too small.
    """

    Config: ClassVar[type[ResNet12Config]] = ResNet12Config

    def __init__(self, input_shape: tuple[int, ...], outputs: int, **settings: Any) -> None:
        super().__init__()
        self.config = validated(ResNet12Config, settings, "resnet12")
        self.input_shape = tuple(input_shape)
        self.outputs = outputs
        check_images("resnet12", self.input_shape, outputs)
        channels, *size = self.input_shape
        if min(size) < 2**_BLOCKS:
            raise RequestError(
                f"resnet12 halves an image four times, but {size[0]} x {size[1]} pixels are fewer "
                "than 16 x 16: enlarge the images, or choose the model conv4 or wrn28_10"
            )
        self.body = nn.Sequential(
            *(_Block(before, after) for before, after in pairwise((channels, *self.config.filters)))
        )
        self.head = nn.Linear(self.config.filters[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) to (n, outputs)."""
        logits: Tensor = self.head(self.body(x).mean((2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = convolution(channels, filters, 3), batch_norm(filters)
        self.conv2, self.norm2 = convolution(filters, filters, 3), batch_norm(filters)
        self.conv3, self.norm3 = convolution(filters, filters, 3), batch_norm(filters)
        self.shortcut, self.shortcut_norm = convolution(channels, filters, 1), batch_norm(filters)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm1(self.conv1(x)), _SLOPE)
        y = F.leaky_relu(self.norm2(self.conv2(y)), _SLOPE)
        y = self.norm3(self.conv3(y)) + self.shortcut_norm(self.shortcut(x))
        return F.max_pool2d(F.leaky_relu(y, _SLOPE), 2)
