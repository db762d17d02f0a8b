"""Files that hold a learner's state: written atomically, read without executing anything, and held against what they are loaded into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from metaplug.checkpoint import archive
from metaplug.checkpoint.form import check_form, fault_of, not_whole
from metaplug.checkpoint.values import ArchiveError, TooMuchError
from metaplug.contract import registry
from metaplug.contract.presets import PluginUse
from metaplug.errors import RequestError, RunError, one_line
from metaplug.files import replacing

FORMAT = 2
"""The number of the layout; a file with another is refused."""


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a state as a whole or not at all.

    Raises:
        RunError: the disk is full, or the folder cannot be written; or as `storable`. An older file at `path` is as it was.
    """
    state = storable(path, state)
    with replacing(path) as file:
        archive.save(state, file)


def storable(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """A state as `read` will give it: with plain tensors, apart from one another where they overlap much. Cheap: no bytes are written.

    Raises:
        RunError: it has something that `read` would refuse; `path` is named, and the model or plugin that has it.
    """
    state = {"format": FORMAT, **state}
    if fault := fault_of(state):
        raise RunError(
            f"cannot write {path}: {fault}; change that in the model or plugin, as no such checkpoint can be read"
        )
    try:
        made: dict[str, Any] = archive.check(state)
    except ArchiveError as error:
        mend = (
            "fewer values, or tensors of them,"
            if isinstance(error, TooMuchError)
            else "plain values and tensors"
        )
        raise RunError(
            f"cannot write {path}: {error}, which no checkpoint keeps; keep {mend} in {_holder(state)}"
        ) from None
    except RuntimeError as error:  # torch has no memory for a copy of what overlaps
        raise RunError(
            f"cannot write {path}: {one_line(error)}; keep smaller tensors in the model and plugins"
        ) from None
    return made


def _holder(state: Mapping[str, Any]) -> str:
    """Which part of a state that `archive.check` refuses is refused by itself."""
    plugins = {f"plugin '{name}'": part for name, part in state["plugin_states"].items()}
    for holder, part in {"the model": state["model"], **plugins}.items():
        try:
            archive.check(part)
        except ArchiveError:
            return holder
    return "the model and plugins"


def read(path: Path) -> dict[str, Any]:
    """The state that `write` wrote, on the CPU. Nothing in the file is executed, every byte that is used is verified, and its form checked.

    Raises:
        RunError: no such file, not a checkpoint (truncated, damaged, or with code inside), or one of another version.
    """
    try:
        state = archive.load(path)
    except FileNotFoundError:
        raise RunError(
            f"there is no checkpoint {path}: train first, or give another path"
        ) from None
    except Exception as error:  # bytes that are no checkpoint can lead the readers of zips and pickles into any error
        raise not_whole(path, str(error) or type(error).__name__) from None
    if not isinstance(state, dict) or "format" not in state:
        raise RunError(
            f"{path} is not a metaplug checkpoint: give a file that MetaLearner.save or `metaplug train` wrote"
        )
    if type(state["format"]) is not int or state["format"] != FORMAT:
        layout = one_line(repr(state["format"]))
        raise RunError(
            f"{path} has layout {layout}, this metaplug reads {FORMAT}: use the version of metaplug that wrote it"
        )
    check_form(state, str(path))
    return state


def model_spec(model: nn.Module) -> dict[str, Any] | None:
    """How to build an installed model anew; None for any other module."""
    name = registry.name_of("model", type(model))
    if name is None:
        return None
    part: Any = model
    return {
        "name": name,
        "input_shape": list(part.input_shape),
        "outputs": part.outputs,
        "settings": part.config.model_dump(mode="json"),
    }


def rebuilt_model(spec: Mapping[str, Any] | None, path: str | Path) -> nn.Module:
    """The installed model that `model_spec` described, with new weights."""
    if spec is None:
        raise RequestError(
            f"{path} holds the weights of a model of your own, which a file cannot build: give it as MetaLearner.load(..., model=...)"
        )
    model: nn.Module = registry.load("model", spec["name"])(
        tuple(spec["input_shape"]), spec["outputs"], **spec["settings"]
    )
    return model


def plugin_use(use: Mapping[str, Any], path: str | Path) -> PluginUse:
    """The installed plugin that a state names, with its settings."""
    if use["part"] is None:
        raise RequestError(
            f"{path} was trained with the plugin '{use['name']}', which is not an installed part: give MetaLearner.load(..., plugins=...)"
        )
    return PluginUse(plugin=use["part"], name=use["name"], settings=use["settings"])
