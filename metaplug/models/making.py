"""Calling factories and importing libraries that others wrote, with errors in one line."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from metaplug.errors import MetaplugError, RequestError, one_line, said_by


def made(
    name: str, factory: Callable[..., Any], settings: Mapping[str, Any], *args: Any, **kwargs: Any
) -> nn.Module:
    """Call factory(*args, **kwargs, **settings), and return the module that it gives.

    Raises:
        RequestError: it raises, or gives something else; names the model.
    """
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


def imported(name: str, package: str, extra: str) -> Any:
    """Import an optional package that the model `name` needs.

    Args:
        extra: of metaplug, which installs the package.

    Raises:
        RequestError: it is not installed, or does not load.
    """
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == package
        why = "" if is_missing else f", which does not load ({said_by(error)})"
        raise RequestError(
            f"the model '{name}' needs {package}{why}: pip install 'metaplug[{extra}]'"
        ) from error
