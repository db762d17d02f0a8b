"""The multilayer perceptron."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, final

from pydantic import Field
from torch import Tensor, nn

from metaplug.errors import RequestError
from metaplug.settings import Settings, validated

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


class MlpConfig(Settings):
    """The layers of an Mlp."""

    hidden: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = Field(
        (40, 40), description="Width of every hidden layer; () is linear."
    )
    activation: Literal["relu", "tanh"] = Field(
        "relu", description="Activation after every hidden layer."
    )


@final
class Mlp(nn.Module):
    """Hidden layers with an activation after each, and a linear head.

    The default is MAML's sinusoid network (Finn et al. 2017).

    Args:
        input_shape: of one example; it is flattened.
        outputs: the width of the head, >= 1.
        settings: fields of MlpConfig.

    Raises:
        RequestError: a setting is wrong, or there is no input or output.
    """

    Config: ClassVar[type[MlpConfig]] = MlpConfig

    def __init__(self, input_shape: tuple[int, ...], outputs: int, **settings: Any) -> None:
        super().__init__()
        self.config = validated(MlpConfig, settings, "mlp")
        self.input_shape = tuple(input_shape)
        self.outputs = outputs
        width = math.prod(self.input_shape)
        if width < 1 or outputs < 1:
            raise RequestError(
                "mlp takes at least one input to at least one output, but the tasks have inputs "
                f"{self.input_shape} and {outputs} outputs: choose other tasks"
            )
        widths = (width, *self.config.hidden)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), _ACTIVATIONS[self.config.activation]()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, *input_shape) to (n, outputs)."""
        result: Tensor = self.head(self.body(x.flatten(1)))
        return result
