"""The rows of JSON lines: one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from metaplug.errors import RequestError, reason
from metaplug.tasks.reading import keys_once, no_number, open_regular

_MOST_BYTES = 2**20
"""Of a line."""


def read_json_lines(path: Path) -> Iterator[tuple[int, Sequence[Any]]]:
    """Yield the keys of the first object, then the values of every one, each with its line.

    A key that an object lacks is None there; keys that the first object lacks are passed over, as
    are blank lines.

    Raises:
        RequestError: the file cannot be read, or a line is no JSON object in UTF-8; it is named.
    """
    header: list[str] | None = None
    try:
        with open_regular(path) as file:
            number = 0
            while line := file.readline(_MOST_BYTES + 1):
                number += 1
                row = _object(path, number, line) if line.strip() else None
                if row is None:
                    continue
                if header is None:
                    header = list(row)
                    yield 0, header
                yield number, [row.get(name) for name in header]
    except OSError as error:
        raise RequestError(
            f"cannot read the table {path}: {reason(error)}; give a file that you may read"
        ) from None
    if header is None:
        raise RequestError(f"the table {path} has no row: give it some, one JSON object a line")


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    row: Any = None
    fault = None
    if len(line) > _MOST_BYTES:
        fault = f"it has more than {_MOST_BYTES} bytes"
    else:
        try:
            words = line.decode("utf-8-sig")
            row = json.loads(words, object_pairs_hook=keys_once, parse_constant=no_number)
        except (ValueError, RecursionError) as error:
            fault = reason(error)
    if isinstance(row, dict):
        return row
    raise RequestError(
        f"the table {path}, line {number} is no JSON object in UTF-8 "
        f"({fault or f'it is of type {type(row).__name__}'}): write one object a line, such as "
        '{"text": "...", "label": "..."}'
    )
