"""Files that hold a learner's state: written atomically, read without executing anything, and held against what they are loaded into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metaplug import registry
from metaplug.checkpoint import archive
from metaplug.checkpoint.form import check_form, not_whole
from metaplug.errors import RequestError, RunError, one_line
from metaplug.files import replacing
from metaplug.preset import PluginUse

FORMAT = 2
"""The number of the layout; a file with another is refused."""


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a state as a whole or not at all.

    Raises:
        RunError: the disk is full, or the folder cannot be written; or the state has something that `read` would refuse. An older file at
            `path` is as it was.
    """
    state = {"format": FORMAT, **state}
    try:
        archive.check(state)
    except archive.ArchiveError as error:
        raise RunError(f"cannot write {path}: {error}, which no checkpoint keeps; keep plain values and tensors in the model") from None
    with replacing(path) as file:
        torch.save(state, file)


def read(path: Path) -> dict[str, Any]:
    """The state that `write` wrote, on the CPU. Nothing in the file is executed, every byte that is used is verified, and its form checked.

    Raises:
        RunError: no such file, not a checkpoint (truncated, damaged, or with code inside), or one of another version.
    """
    try:
        state = archive.load(path)
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path}: train first, or give another path") from None
    except Exception as error:  # bytes that are no checkpoint can lead the readers of zips and pickles into any error
        raise not_whole(path, str(error) or type(error).__name__) from None
    if not isinstance(state, dict) or "format" not in state:
        raise RunError(f"{path} is not a metaplug checkpoint: give a file that MetaLearner.save or `metaplug train` wrote")
    if type(state["format"]) is not int or state["format"] != FORMAT:
        layout = one_line(repr(state["format"]))
        raise RunError(f"{path} has layout {layout}, this metaplug reads {FORMAT}: use the version of metaplug that wrote it")
    check_form(state, str(path))
    return state


def model_spec(model: nn.Module) -> dict[str, Any] | None:
    """How to build an installed model anew; None for any other module."""
    name = registry.name_of("model", type(model))
    if name is None:
        return None
    part: Any = model
    return {"name": name, "input_shape": list(part.input_shape), "outputs": part.outputs, "settings": part.config.model_dump(mode="json")}


def rebuilt_model(spec: Mapping[str, Any] | None, path: str | Path) -> nn.Module:
    """The installed model that `model_spec` described, with new weights."""
    if spec is None:
        raise RequestError(
            f"{path} holds the weights of a model of your own, which a file cannot build: give it as MetaLearner.load(..., model=...)"
        )
    model: nn.Module = registry.load("model", spec["name"])(tuple(spec["input_shape"]), spec["outputs"], **spec["settings"])
    return model


def plugin_use(use: Mapping[str, Any], path: str | Path) -> PluginUse:
    """The installed plugin that a state names, with its settings."""
    if use["part"] is None:
        raise RequestError(
            f"{path} was trained with the plugin '{use['name']}', which is not an installed part: give MetaLearner.load(..., plugins=...)"
        )
    return PluginUse(plugin=use["part"], name=use["name"], settings=use["settings"])
