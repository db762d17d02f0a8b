"""Classifiers of torchvision by name, without trained weights."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from metaplug.errors import RequestError, said_by, unknown
from metaplug.models.making import made
from metaplug.models.parts import check_images


def make(
    name: str, wanted: str, input_shape: tuple[int, ...], outputs: int, settings: Mapping[str, Any]
) -> nn.Module:
    """A classifier of torchvision from (n, channels, height, width) to (n, outputs).

    Its first convolution is made anew where the inputs do not have its number of channels.

    Args:
        name: as the user gave it, torchvision:NAME.
        wanted: NAME.
        settings: further arguments of torchvision's own function.

    Raises:
        RequestError: torchvision is missing, does not know the name, or refuses the settings; or
            the inputs are no images.
    """
    try:
        zoo: Any = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch
        raise RequestError(
            f"the model '{name}' needs torchvision, which does not load ({said_by(error)}): pip "
            f"install torchvision, in the version that belongs to torch {torch.__version__}"
        ) from error
    known = zoo.list_models(module=zoo)
    if wanted not in known:
        raise unknown("torchvision model", wanted, known)
    check_images(name, input_shape, outputs)
    model = made(name, zoo.get_model_builder(wanted), settings, weights=None, num_classes=outputs)
    # The stem is the first convolution of every one of these classifiers.
    layers = model.named_modules()
    stem, old = next((key, layer) for key, layer in layers if isinstance(layer, nn.Conv2d))
    if old.in_channels != input_shape[0]:
        names = ("out_channels", "kernel_size", "stride", "padding", "dilation")
        form: dict[str, Any] = {key: getattr(old, key) for key in names}
        model.set_submodule(stem, nn.Conv2d(input_shape[0], **form, bias=old.bias is not None))
    return model
