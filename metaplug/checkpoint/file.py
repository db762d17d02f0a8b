"""The bytes of a checkpoint: written as a whole or not at all, and verified when they are read.

Tensors stand under names: `model.NAME`, `plugins.PLUGIN.NAME`, `meta_optimizer...`. The rest is
JSON in the file's metadata, "metaplug": {"sha256", "format", "state"}; the digest is that of the
file with zeros in its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from metaplug.checkpoint.encoding import MOST_HEADER, UnfitError, joined, split
from metaplug.checkpoint.form import State, check_form, not_whole
from metaplug.errors import RequestError, RunError, one_line, quoted
from metaplug.execution.free_memory import available, size_text
from metaplug.files import replacing
from metaplug.settings import validated

FORMAT = 3
"""The number of the layout; 1 and 2 were files of torch.save."""
_START, _ZEROS = b'{"__metadata__":{"metaplug":"{\\"sha256\\":\\"', b"0" * 64
"""How a header begins, up to its digest; and the bytes in its place while it is computed."""


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state as a whole or not at all; equal states make equal files.

    Args:
        path: of the file; its folder is there.
        state: as form.State has it, with tensors on any device.

    Raises:
        RunError: as `check_writable`, or the disk is full; an older file at `path` is as it was.
    """
    check_writable(path, state)
    with replacing(path) as file:
        file.writelines(packed(state))


def check_writable(path: Path, state: Mapping[str, Any]) -> None:
    """Refuse what `read` would refuse, without writing.

    Args:
        path: of the file that would be written, for errors.
        state: as in `write`.

    Raises:
        RunError: names `path` and what cannot be kept.
    """
    try:
        validated(State, state, "its content")
        split(state)
    except (UnfitError, RequestError) as error:
        raise RunError(
            f"cannot write {path}: {error}; change that in the model or plugin"
        ) from None
    except RuntimeError as error:  # torch has no memory to lay out an expanded tensor
        raise RunError(f"cannot write {path}: {one_line(error)}; keep smaller tensors") from None


def packed(state: Mapping[str, Any]) -> list[bytes | memoryview]:
    """The bytes of a file, in pieces, without the checks of `check_writable`.

    Raises:
        UnfitError: the state holds what no file keeps, or too much.
    """
    tensors, values = split(state)
    text = f'{{"sha256":"{_ZEROS.decode()}","format":{FORMAT},"state":{values}}}'
    # A single key: safetensors orders several by chance, and equal states should be equal files.
    content = safetensors.torch.save(tensors, {"metaplug": text})
    place = content.index(_START) + len(_START)
    digest = hashlib.sha256(content).hexdigest().encode()
    return [memoryview(content)[:place], digest, memoryview(content)[place + len(_ZEROS) :]]


def read(path: Path) -> dict[str, Any]:
    """Read what `write` wrote, on the CPU. Executes nothing, and verifies every byte.

    Raises:
        RunError: there is no such file, or it is truncated, damaged, forged or of another version.
    """
    try:
        saved, tensors = _verified(path)
        state: dict[str, Any] = joined(saved, tensors)
        if tensors:
            raise UnfitError(f"nothing in it refers to {quoted(map(one_line, [*tensors][:3]))}")
    except FileNotFoundError:
        raise RunError(
            f"there is no checkpoint {path}: train first, or give another path"
        ) from None
    except RunError as error:
        raise RunError(f"{path} {error}") from None
    except Exception as error:  # forged bytes can lead the readers into any error
        raise not_whole(path, str(error) or type(error).__name__) from None
    check_form(state, str(path))
    return state


def _verified(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """The JSON of a state and its tensors, from bytes that have the digest that they say."""
    size, free = path.stat().st_size, available(torch.device("cpu"))
    if not path.is_file():  # a pipe or device may have no end
        raise UnfitError("it is no regular file")
    if free is not None and 2 * size > free:  # its bytes and its tensors
        most = f"the {size_text(free)} of memory that are free"
        raise UnfitError(f"it takes {size_text(2 * size)} to read, more than {most}")
    content = path.read_bytes()
    if content.startswith(b"PK\3\4"):
        how = "use the version that wrote it, or train again"
        raise RunError(f"is of torch.save (.pt), as older versions of metaplug wrote: {how}")
    end, place = 8 + int.from_bytes(content[:8], "little"), 8 + len(_START)
    if end > min(len(content), MOST_HEADER):
        raise UnfitError("it is no safetensors file, or its header is too long")
    if content[8:place] != _START:
        how = "give a file that MetaLearner.save or `metaplug train` wrote"
        raise RunError(f"is not a metaplug checkpoint: {how}")
    digest = hashlib.sha256(content[:place] + _ZEROS)
    digest.update(memoryview(content)[place + len(_ZEROS) :])
    if content[place : place + len(_ZEROS)] != digest.hexdigest().encode():
        raise UnfitError("its content has another digest than it says")
    saved = json.loads(json.loads(content[8:end])["__metadata__"]["metaplug"])
    if saved["format"] != FORMAT:
        found, how = one_line(saved["format"]), "use the version of metaplug that wrote it"
        raise RunError(f"has layout {found}, this metaplug reads {FORMAT}: {how}")
    return saved["state"], safetensors.torch.load(content)
