"""Bodies of transformers from local folders, or by their names on huggingface.co."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metaplug.errors import RequestError, quoted, said_by
from metaplug.models.making import imported
from metaplug.models.model_folders import find_folder
from metaplug.models.transformers_config import TransformersConfig

_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def load_body(name: str, wanted: str, config: TransformersConfig) -> nn.Module:
    """Make the body that a folder describes, with its weights, in evaluation mode.

    Code that a folder brings is never run, and pickled weights are read as tensors alone.

    Args:
        name: as the user gave it, for errors.
        wanted: a folder, or a name on huggingface.co.

    Raises:
        RequestError: the library or a file is missing, or the folder holds no such body.
    """
    library: Any = imported(name, "transformers", "text")
    folder = find_folder(name, wanted, download=config.download)
    with _quiet(library):
        try:
            form = library.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # of foreign files, of which anything may be wrong
            raise RequestError(
                f"the model '{name}' is none that transformers {library.__version__} knows by "
                f"{folder / 'config.json'} ({said_by(error)}): give the folder of another model"
            ) from error
        _set_dropout(form, config.dropout)
        # Later calls must give an object with last_hidden_state, and no keys and values.
        form.return_dict, form.use_cache = True, False
        try:
            return _made(name, library, form, folder, config)
        except RequestError:
            raise
        except Exception as error:
            raise RequestError(
                f"the model '{name}' does not load from {folder} ({said_by(error)}): give a folder "
                "that save_pretrained wrote"
            ) from error


def _made(
    name: str, library: Any, form: Any, folder: Path, config: TransformersConfig
) -> nn.Module:
    kind = _class_of(name, library, form)
    options: dict[str, Any] = {}
    if "add_pooling_layer" in inspect.signature(kind.__init__).parameters:
        options = {"add_pooling_layer": False}
    dtype = getattr(torch, config.dtype)
    # Without values, as a checkpoint is first compared with its model, there are none to load.
    if not config.pretrained or torch.get_default_device().type == "meta":
        body: nn.Module = library.AutoModel.from_config(
            form, dtype=dtype, trust_remote_code=False, **options
        )
        return body.eval()
    if not any(file for ending in _WEIGHTS for file in folder.glob(ending)):
        raise RequestError(
            f"the model '{name}' has no weights, as {folder / 'model.safetensors'} is not there: "
            "put it there, or set model.settings.pretrained = false for random weights"
        )
    body, report = kind.from_pretrained(
        folder,
        config=form,
        dtype=dtype,
        weights_only=True,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(report["missing_keys"]):
        raise RequestError(
            f"the weights in {folder} lack {quoted(missing[:3])} of the model '{name}': give the "
            "folder of whole weights, or set model.settings.pretrained = false for random ones"
        )
    return body.eval()


def _class_of(name: str, library: Any, form: Any) -> Any:
    kind = library.AutoModel._model_mapping.get(type(form), None)
    if kind is None or isinstance(kind, tuple | list) or getattr(form, "is_encoder_decoder", False):
        raise RequestError(
            f"the model '{name}' is a {type(form).__name__.removesuffix('Config')}, which has no "
            "single body with hidden states: give an encoder or a decoder, or make it in a "
            "MODULE:FACTORY of your own"
        )
    return kind


def _set_dropout(form: Any, dropout: float | None) -> None:
    """Set the probabilities in a configuration, where functional calls read them too."""
    if dropout is None:
        return
    for key, value in vars(form).items():
        is_rate = isinstance(value, int | float) and not isinstance(value, bool)
        whole_layers = "layerdrop" in key or "drop_path" in key
        if is_rate and "drop" in key and not (whole_layers and dropout):
            setattr(form, key, dropout)


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Keep the library's bars and reports from the terminal; its errors are raised anyway."""
    logging = library.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
