"""The rows of CSV and Parquet files, one after the other."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from metaplug.errors import RequestError


def read_rows(path: Path, separator: str) -> Iterator[tuple[int, Sequence[Any]]]:
    """The header, then the rows, each with its number as a spreadsheet shows it; those of a Parquet file count from 1.

    Args:
        path: a Parquet file, if it ends in .parquet, with cells of any type; else a CSV file in UTF-8, with cells of text.
        separator: of the columns of a CSV file.

    Raises:
        RequestError: the file cannot be read, it is not what it should be, or pyarrow is not installed for Parquet.
    """
    if not path.is_file():
        raise RequestError(f"the table {path}: there is no such file; give the path of a CSV or Parquet file")
    return _parquet_rows(path) if path.suffix.lower() == ".parquet" else _csv_rows(path, separator)


def _csv_rows(path: Path, separator: str) -> Iterator[tuple[int, Sequence[str]]]:
    try:
        data = path.read_bytes()
        text = data.decode().removeprefix("\ufeff")
    except OSError as error:
        raise RequestError(f"cannot read the table {path}: {error.strerror}; give one that you may read") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RequestError(f"the table {path}, line {line} is not UTF-8 text: save it as CSV in UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        yield from ((number, row) for number, row in enumerate(reader, 1) if row)
    except csv.Error as error:
        raise RequestError(f"the table {path}, line {reader.line_num} is not CSV ({error}): correct it there") from None


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
            batches = (zip(*(column.to_pylist() for column in batch.columns), strict=True) for batch in file.iter_batches())
            yield from enumerate(chain.from_iterable(batches), 1)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(f"the table {path} is no readable Parquet file ({reason}): write it anew, or save the table as CSV") from None
