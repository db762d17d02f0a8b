"""Files that hold a learner's state: written atomically, read without executing anything."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from metaplug.errors import RunError

FORMAT = 1
"""The number of the layout; a file with another is refused."""


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a state so that at every moment `path` holds either the whole old file or the whole new one.

    Raises:
        RunError: the disk is full, or the folder cannot be written; an older file at `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write the checkpoint {path}: {error}; an older one there is untouched") from error


def read(path: Path) -> dict[str, Any]:
    """The state that `write` wrote, on the CPU.

    Raises:
        RunError: no such file, not a checkpoint (truncated, damaged, or with code inside), or one of another version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path}: train first, or give another path") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} is not a whole metaplug checkpoint ({str(error).splitlines()[0][:120]}): use another one of the run") from None
    if not isinstance(state, dict) or "format" not in state:
        raise RunError(f"{path} is not a metaplug checkpoint: give a file that MetaLearner.save or `metaplug train` wrote")
    if state["format"] != FORMAT:
        raise RunError(f"{path} has layout {state['format']}, this metaplug reads {FORMAT}: use the version of metaplug that wrote it")
    return state


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; folders cannot be opened everywhere."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
