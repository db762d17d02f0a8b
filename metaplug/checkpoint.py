"""Files that hold a learner's state: written atomically, read without executing anything, and held against what they are loaded into."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaplug import registry
from metaplug.errors import RequestError, RunError, quoted
from metaplug.files import replacing
from metaplug.preset import PluginUse

FORMAT = 2
"""The number of the layout; a file with another is refused."""

KEYS = (
    "iteration",
    "total",
    "kind",
    "seed",
    "settings",
    "task_batching",
    "custom_loss",
    "model_spec",
    "model",
    "plugins",
    "plugin_states",
    "optimizer",
)
"""What every learner's state has: see MetaLearner.state_dict."""


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a state as a whole or not at all.

    Raises:
        RunError: the disk is full, or the folder cannot be written; an older file at `path` is as it was.
    """
    with replacing(path) as file:
        torch.save({"format": FORMAT, **state}, file)


def read(path: Path) -> dict[str, Any]:
    """The state that `write` wrote, on the CPU.

    Raises:
        RunError: no such file, not a checkpoint (truncated, damaged, or with code inside), or one of another version.
    """
    try:
        with warnings.catch_warnings():
            # torch doubts pickles that it did not write, which are refused here anyway.
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path}: train first, or give another path") from None
    except Exception as error:  # bytes that are no checkpoint can lead the reader into any error
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise RunError(f"{path} is not a whole metaplug checkpoint ({reason}): use another one of the run") from None
    if not isinstance(state, dict) or "format" not in state:
        raise RunError(f"{path} is not a metaplug checkpoint: give a file that MetaLearner.save or `metaplug train` wrote")
    if state["format"] != FORMAT:
        raise RunError(f"{path} has layout {state['format']}, this metaplug reads {FORMAT}: use the version of metaplug that wrote it")
    if missing := [key for key in KEYS if key not in state]:
        raise RunError(f"{path} is not a whole metaplug checkpoint, as it lacks {quoted(missing)}: use another one of the run")
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


def check_shapes(saved: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str, mend: str = "build the model as it was") -> None:
    """Refuse saved tensors of other names or shapes than `own`; `what` begins the sentence."""
    missing, extra = [name for name in own if name not in saved], [name for name in saved if name not in own]
    if missing or extra:
        raise RunError(f"{what}: it lacks {quoted(missing[:3])} and has {quoted(extra[:3])} beside; {mend}")
    for name, tensor in own.items():
        if saved[name].shape != tensor.shape:
            raise RunError(f"{what}: '{name}' is {tuple(saved[name].shape)} there and {tuple(tensor.shape)} here; {mend}")
