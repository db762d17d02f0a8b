"""The rows of CSV and Parquet files, one after the other."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from metaplug.errors import RequestError, reason
from metaplug.tasks.reading import UNPRINTABLE, open_regular

_MOST_CHARACTERS = 2**20
"""In a line of a CSV file: a longer one is no table's, and might fill the memory."""
_BATCH = 1024
"""Rows of a Parquet file that are unpacked at a time: a dictionary can make millions of a few bytes."""
_PIECE = 2**16
_ODD = re.compile(f"(?![\t\r\n]){UNPRINTABLE.pattern}")


def read_rows(path: Path, separator: str) -> Iterator[tuple[int, Sequence[Any]]]:
    """The header, then the rows, each with its number as a spreadsheet shows it; those of a Parquet file count from 1.

    Args:
        path: a Parquet file, if it ends in .parquet, with cells of any type; else a CSV file in UTF-8, with cells of text.
        separator: of the columns of a CSV file.

    Raises:
        RequestError: the file cannot be read, it is not what it should be, or pyarrow is not installed for Parquet.
    """
    try:
        open_regular(path).close()
    except FileNotFoundError:
        raise RequestError(
            f"the table {path}: there is no such file; give the path of a CSV or Parquet file"
        ) from None
    except (OSError, ValueError) as error:
        raise RequestError(
            f"cannot read the table {path}: {reason(error)}; give a CSV or Parquet file that you may read"
        ) from None
    return _parquet_rows(path) if path.suffix.lower() == ".parquet" else _csv_rows(path, separator)


def _csv_rows(path: Path, separator: str) -> Iterator[tuple[int, Sequence[str]]]:
    with io.TextIOWrapper(open_regular(path), "utf-8-sig", "surrogateescape", newline="") as file:
        reader = csv.reader(_lines(file, path), delimiter=separator, strict=True)
        try:
            yield from ((number, row) for number, row in enumerate(reader, 1) if row)
        except csv.Error as error:
            raise RequestError(
                f"the table {path}, line {reader.line_num} is not CSV ({reason(error)}): correct it there"
            ) from None
        except OSError as error:
            raise RequestError(
                f"cannot read the table {path}: {reason(error)}; give one that you may read"
            ) from None


def _lines(file: io.TextIOWrapper, path: Path) -> Iterator[str]:
    """The lines with their ends, a piece of the file at a time: a single line may be larger than the memory."""
    number, rest = 1, ""
    while piece := file.read(_PIECE):
        text = rest + piece
        if odd := _ODD.search(text, len(rest)):
            where = (
                f"the table {path}, line {number + len(f'{text[: odd.start()]}.'.splitlines()) - 1}"
            )
            if "\ud800" <= odd[0] <= "\udfff":
                raise RequestError(f"{where} is not UTF-8 text: save it as CSV in UTF-8")
            raise RequestError(
                f"{where} has the control character {odd[0]!a}, which no table needs: save it as CSV in UTF-8"
            )
        *lines, rest = text.splitlines(keepends=True)
        number += len(lines)
        if len(rest) > _MOST_CHARACTERS:
            raise RequestError(
                f"the table {path}, line {number} has more than the {_MOST_CHARACTERS} characters that are read: end it sooner"
            )
        yield from lines
    if rest:
        yield rest


def _parquet_rows(path: Path) -> Iterator[tuple[int, Sequence[Any]]]:
    try:
        # An extra, which these files alone need.
        import pyarrow as pa  # noqa: PLC0415
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError:
        raise RequestError(
            f"the table {path} is Parquet, which needs pyarrow: pip install 'metaplug[parquet]', or save the table as CSV"
        ) from None
    try:
        with pq.ParquetFile(path) as file:
            yield 0, file.schema_arrow.names
            batches = (
                zip(*(column.to_pylist() for column in batch.columns), strict=True)
                for batch in file.iter_batches(_BATCH)
            )
            yield from enumerate(chain.from_iterable(batches), 1)
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise RequestError(
            f"the table {path} is no readable Parquet file ({reason(error)}): write it anew, or save the table as CSV"
        ) from None
