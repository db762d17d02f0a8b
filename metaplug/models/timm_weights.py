"""Weights of timm's models from local files."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from torch import nn

from metaplug.errors import RequestError, quoted, said_by

_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")


def load_weights(name: str, timm: Any, body: nn.Module, wanted: str, path: Path) -> None:
    """Load every weight from a file, but those of a head with another number of classes.

    Args:
        name: of the model as the user gave it, for errors.
        timm: the library.
        body: what it made as `wanted`.
        path: a file of weights; of a pickled one tensors alone are read.

    Raises:
        RequestError: the file is not there, cannot be read, or does not fit.
    """
    if path.suffix not in _ENDINGS or not path.is_file():
        what = "is not there" if path.suffix in _ENDINGS else f"ends in none of {quoted(_ENDINGS)}"
        raise RequestError(
            f"the model '{name}' asks for the weights {path} (model.settings.pretrained), which "
            f"{what}: put model.safetensors of the model there, or leave the setting out"
        )
    own = body.state_dict()
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
        # It renames old weights, and resizes the places of patches.
        adapt = getattr(_module_of(timm, wanted), "checkpoint_filter_fn", None)
        if adapt is not None and len(inspect.signature(adapt).parameters) > 1:
            state = adapt(state, body)
        shapes = {key: tuple(value.shape) for key, value in state.items()}
    except Exception as error:  # of a foreign file, of which anything may be wrong
        raise RequestError(
            f"the weights {path} of the model '{name}' cannot be read ({said_by(error)}): give a "
            "file of that model's weights, in timm's own form"
        ) from error
    differ = {key for key in {*own, *shapes} if key not in own or shapes.get(key) != own[key].shape}
    head = {id(value) for value in body.get_classifier().parameters()}  # type: ignore[operator]
    differ -= {key for key, value in body.named_parameters() if id(value) in head}
    if differ:
        raise RequestError(
            f"the weights {path} do not fit the model '{name}' at {quoted(sorted(differ)[:3])}: "
            "give those of this model and number of channels"
        )
    fits = {key: value for key, value in state.items() if shapes[key] == own[key].shape}
    body.load_state_dict(fits, strict=False)


def _module_of(timm: Any, wanted: str) -> Any:
    return sys.modules[timm.models.model_entrypoint(wanted).__module__]
