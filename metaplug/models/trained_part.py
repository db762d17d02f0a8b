"""Which weights of a model are trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metaplug.errors import RequestError


def last_layers(name: str, body: nn.Module, count: int) -> list[nn.Module]:
    """Find the last layers in the outermost list of modules, and the longest of several such.

    Raises:
        RequestError: the body has fewer; names the model.
    """
    lists = [
        (key.count("."), -len(each), list(each))
        for key, each in body.named_modules()
        if isinstance(each, nn.ModuleList)
    ]
    layers = min(lists, key=lambda one: one[:2])[2] if lists else []
    if count > len(layers):
        raise RequestError(
            f"the model '{name}' has {len(layers)} layers, so the last {count} cannot be trained: "
            "lower model.settings.last_layers, or set model.settings.train = all"
        )
    return layers[-count:]


def freeze_unused(model: nn.Module, *example: Tensor) -> None:
    """Freeze trainable weights that no answer depends on.

    Such are a pooler beside the way to the head, or the vector that stands for a masked patch.

    Args:
        model: in evaluation mode.
        example: what it is called with.
    """
    trained = [value for value in model.parameters() if value.requires_grad]
    with torch.enable_grad():
        gradients = torch.autograd.grad(model(*example).sum(), trained, allow_unused=True)
    for value, gradient in zip(trained, gradients, strict=True):
        value.requires_grad_(gradient is not None)
