"""Models by name: installed ones, those of the zoos, and MODULE:FACTORY of a user's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from metaplug.contract import registry
from metaplug.errors import RequestError, RunError, did_you_mean, one_line, said_by
from metaplug.models import timm_zoo, torchvision_zoo, transformers_zoo
from metaplug.models.making import made
from metaplug.models.zoo_model import ZooModel

_ZOOS = {
    "torchvision": torchvision_zoo.make,
    "transformers": transformers_zoo.make,
    "timm": timm_zoo.make,
}


def make_model(
    name: str, input_shape: tuple[int, ...], outputs: int, settings: Mapping[str, Any]
) -> nn.Module:
    """A new model from inputs (n, *input_shape) to (n, outputs); its output is not checked here.

    Args:
        name: an installed model ("conv4"); a model of a zoo, torchvision:NAME,
            transformers:NAME_OR_FOLDER or timm:NAME; or MODULE:FACTORY, anything importable that
            is called as factory(input_shape, outputs, **settings) and returns an `nn.Module`.
        input_shape: of one example.
        outputs: the width of the model's head, >= 1.
        settings: fields of an installed model's or a zoo's Config, or further arguments of the
            factory.

    Raises:
        RequestError: the name leads to nothing that can be called, the settings are refused, or
            what comes back is no module.
        RunError: the module is there, but importing it fails.
    """
    module, colon, attribute = name.partition(":")
    if colon and module in _ZOOS:
        return _ZOOS[module](name, attribute, input_shape, outputs, settings)
    factory = _factory(name, module, attribute) if colon else registry.load("model", name)
    return made(name, factory, settings, input_shape, outputs)


def is_own(name: str) -> bool:
    """Whether a model is MODULE:FACTORY, which is code that its name makes run."""
    module, colon, _ = name.partition(":")
    return bool(colon) and module not in registry.ZOOS


def name_of(model: nn.Module) -> str | None:
    """The name by which a file may have a model made again; None for code of the user's own."""
    if isinstance(model, ZooModel):
        return model.name
    return registry.name_of("model", type(model))


def origin_of(name: str, settings: Mapping[str, Any]) -> str | None:
    """The file that made a model MODULE:FACTORY, in a line for the user; None for other models."""
    if not is_own(name):
        return None
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    given = f" with the settings {one_line(dict(settings))}" if settings else ""
    return f"the model is made by {name}{f' in {Path(file).resolve()}' if file else ''}{given}"


def without_download(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from a file, which may use what is on this machine, and fetch nothing."""
    return {key: value for key, value in settings.items() if key != "download"}


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
