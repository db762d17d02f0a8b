"""Folders of models: local ones, and by their names those of huggingface.co."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metaplug.errors import RequestError, one_line, said_by
from metaplug.models.making import imported

_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json")


def find_folder(name: str, wanted: str, *, download: bool) -> Path:
    """Find the local folder of a model, which has a config.json.

    Args:
        name: as the user gave it, for errors.
        wanted: a folder, or a name on huggingface.co.
        download: whether files of a name that are not on this machine are fetched.

    Raises:
        RequestError: it is not there, or cannot be fetched.
    """
    folder = Path(wanted).expanduser()
    if not folder.is_dir():
        folder = _cached(name, wanted, download)
    if not (folder / "config.json").is_file():
        raise RequestError(
            f"the model '{name}' needs {folder / 'config.json'}, which is not there: give a folder "
            "that save_pretrained wrote"
        )
    return folder


def _cached(name: str, wanted: str, download: bool) -> Path:
    hub: Any = imported(name, "huggingface_hub", "text")
    files = "config.json and model.safetensors"
    try:
        with _without_bars(hub):
            found = hub.snapshot_download(
                wanted, allow_patterns=list(_FILES), local_files_only=not download
            )
    except hub.errors.HFValidationError:
        raise RequestError(
            f"the model '{name}' asks for the folder '{one_line(wanted)}', which is not there: "
            f"give the path of a folder that holds {files}"
        ) from None
    except Exception as error:
        if not download:
            raise RequestError(
                f"the model '{name}' is no folder, and config.json of '{one_line(wanted)}' is not "
                f"in {hub.constants.HF_HUB_CACHE}: put {files} into a folder and give "
                "transformers:FOLDER, or set model.settings.download = true"
            ) from None
        raise RequestError(
            f"the model '{name}' cannot be fetched from {hub.constants.ENDPOINT} "
            f"({said_by(error)}): put {files} into a folder and give transformers:FOLDER"
        ) from error
    return Path(found)


@contextmanager
def _without_bars(hub: Any) -> Iterator[None]:
    is_off = hub.utils.are_progress_bars_disabled()
    hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        if not is_off:
            hub.utils.enable_progress_bars()
