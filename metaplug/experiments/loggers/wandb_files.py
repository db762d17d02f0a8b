"""The files that wandb writes offline, read back: a log of protocol buffers in blocks of 32 KiB.

Each block holds pieces: a checksum (4 bytes), a length (2), a kind (1: whole, 2 to 4: the first, a
middle and the last piece of a record), and the bytes; as LevelDB's logs do.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

_BLOCK, _HEADER, _PIECE = 2**15, 7, struct.Struct("<IHB")
_ENDS = (1, 4)


def last_step(folder: Path, run: str) -> int:
    """The last step of a run's history in any of its files; 0 without any.

    Args:
        folder: that wandb keeps its offline runs in.
        run: the id.
    """
    files = sorted(folder.glob(f"offline-run-*-{run}/run-{run}.wandb"))
    return max((step for file in files for step, _ in read_history(file)), default=0)


def read_history(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read step and figures of a history's whole records; a killed process leaves a part of one."""
    for record in read_records(file):
        if record.HasField("history"):
            items = record.history.item
            values = {
                ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items
            }
            yield record.history.step.num, values


def read_records(file: Path) -> Iterator[Any]:
    """Read every whole record, a `Record` of wandb's protocol."""
    form: Any = import_module("wandb.proto.wandb_internal_pb2").Record
    yield from map(form.FromString, _contents(file.read_bytes()))


def _contents(data: bytes) -> Iterator[bytes]:
    place, record = _HEADER, b""
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:  # too short for a piece, and filled up
            place += left
            continue
        _, size, kind = _PIECE.unpack_from(data, place)
        piece = data[place + _HEADER : place + _HEADER + size]
        place += _HEADER + size
        if not kind or len(piece) < size:
            return
        record += piece
        if kind in _ENDS:
            yield record
            record = b""
