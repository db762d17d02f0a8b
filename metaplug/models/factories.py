"""Models by name: installed ones, MODULE:FACTORY of a user's own, classifiers of torchvision."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metaplug.contract import registry
from metaplug.errors import (
    MetaplugError,
    RequestError,
    RunError,
    did_you_mean,
    one_line,
    said_by,
    unknown,
)
from metaplug.models.parts import check_images


def make_model(
    name: str, input_shape: tuple[int, ...], outputs: int, settings: Mapping[str, Any]
) -> nn.Module:
    """A new model from inputs (n, *input_shape) to (n, outputs); its output is not checked here.

    Args:
        name: an installed model ("conv4"); MODULE:FACTORY, anything importable that is called as
            factory(input_shape, outputs, **settings) and returns an `nn.Module`; or
            torchvision:NAME, a classifier of torchvision without weights, its first convolution
            made anew where the inputs do not have its number of channels.
        input_shape: of one example.
        outputs: the width of the model's head, >= 1.
        settings: fields of an installed model's Config, or further arguments of the factory.

    Raises:
        RequestError: the name leads to nothing that can be called, the settings are refused, or
            what comes back is no module.
        RunError: the module is there, but importing it fails.
    """
    module, colon, attribute = name.partition(":")
    if module == "torchvision" and colon:
        return _classifier(name, attribute, input_shape, outputs, settings)
    factory = _factory(name, module, attribute) if colon else registry.load("model", name)
    return _made(name, factory, settings, input_shape, outputs)


def is_own(name: str) -> bool:
    """Whether a model is MODULE:FACTORY, which is code that its name makes run."""
    module, colon, _ = name.partition(":")
    return bool(colon) and module != "torchvision"


def origin_of(name: str, settings: Mapping[str, Any]) -> str | None:
    """The file that made a model MODULE:FACTORY, in a line for the user; None for other models."""
    if not is_own(name):
        return None
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    given = f" with the settings {one_line(dict(settings))}" if settings else ""
    return f"the model is made by {name}{f' in {Path(file).resolve()}' if file else ''}{given}"


def names_code(file: object, name: str) -> str:
    """The error for a file that names a model of one's own, with how to let it run."""
    return (
        f"{file} names code for its model, '{one_line(name)}', which nobody lets run because a "
        f"file says so: if it is your own, give --model {one_line(name)}"
    )


def _factory(name: str, module: str, attribute: str) -> Callable[..., Any]:
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise RequestError(
            f"the model '{name}' is no MODULE:FACTORY: write both as Python does, such as "
            "my_package.my_module:make"
        )
    try:
        found = importlib.import_module(module)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name
        if missing and f"{module}.".startswith(f"{missing}."):
            raise RequestError(
                f"the model '{name}' asks for the module '{missing}', which is not found: run in "
                "the folder that holds it, or install it"
            ) from None
        raise RunError(
            f"the module of the model '{name}' does not load ({said_by(error)}): correct it there"
        ) from error
    factory = getattr(found, attribute, None)
    if callable(factory):
        made: Callable[..., Any] = factory
        return made
    if hasattr(found, attribute):
        raise RequestError(
            f"the model '{name}' is of type {type(factory).__name__}, which cannot be called: name "
            "a function or class that takes (input_shape, outputs, **settings)"
        )
    public = {key: value for key, value in vars(found).items() if not key.startswith("_")}
    hint = did_you_mean(attribute, [key for key, value in public.items() if callable(value)])
    raise RequestError(
        f"the model '{name}' asks for '{attribute}', which the module does not have: {hint}"
    )


def _classifier(
    name: str, wanted: str, input_shape: tuple[int, ...], outputs: int, settings: Mapping[str, Any]
) -> nn.Module:
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
    model = _made(name, zoo.get_model_builder(wanted), settings, weights=None, num_classes=outputs)
    # The stem is the first convolution of every one of these classifiers.
    layers = model.named_modules()
    stem, old = next((key, layer) for key, layer in layers if isinstance(layer, nn.Conv2d))
    if old.in_channels != input_shape[0]:
        names = ("out_channels", "kernel_size", "stride", "padding", "dilation")
        form: dict[str, Any] = {key: getattr(old, key) for key in names}
        model.set_submodule(stem, nn.Conv2d(input_shape[0], **form, bias=old.bias is not None))
    return model


def _made(
    name: str, factory: Callable[..., Any], settings: Mapping[str, Any], *args: Any, **kwargs: Any
) -> nn.Module:
    try:
        model = factory(*args, **kwargs, **settings)
    except MetaplugError:
        raise
    except Exception as error:
        raise RequestError(
            f"the model '{name}' cannot be made with the settings {one_line(dict(settings), 400)} "
            f"({said_by(error)}): correct model.settings, or what the factory takes"
        ) from error
    if not isinstance(model, nn.Module):
        raise RequestError(
            f"the model '{name}' gives a {type(model).__name__}, not a torch.nn.Module: let its "
            "factory return one"
        )
    return model
