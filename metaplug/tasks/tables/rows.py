"""The rows of CSV and Parquet files, one after the other."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from metaplug.errors import RequestError, reason
from metaplug.tasks.reading import open_regular

_BLOCK = 2**20
"""Bytes of a CSV file that are read at a time, which no row may exceed."""
_BATCH = 1024
"""Rows of a Parquet file that are unpacked at a time: a few bytes can stand for millions."""


def read_rows(path: Path, separator: str) -> Iterator[tuple[int, Sequence[Any]]]:
    """Yield the header, then the rows, each with its number.

    Args:
        path: a Parquet file, if it ends in .parquet, with cells of any type, whose rows count from
            1; else a CSV file in UTF-8, with cells of text, whose header is row 1. Blank lines
            are passed over and do not count.
        separator: of the columns of a CSV file.

    Raises:
        RequestError: the file cannot be read, or is not what it should be.
    """
    # Slow to import, and tables alone need it.
    import pyarrow as pa  # noqa: PLC0415

    try:
        open_regular(path).close()  # a pipe or a device is refused here
    except FileNotFoundError:
        raise RequestError(
            f"the table {path}: there is no such file; give the path of a CSV or Parquet file"
        ) from None
    except (OSError, ValueError) as error:
        raise RequestError(
            f"cannot read the table {path}: {reason(error)}; give a CSV or Parquet file that you "
            "may read"
        ) from None
    parquet = checked = path.suffix.lower() == ".parquet"
    try:
        names, batches = _parquet(path) if parquet else _csv(path, separator)
        yield int(not parquet), names
        number = int(not parquet)
        for batch in batches:
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                number += 1
                if not checked and any(cell is not None and "\n" in cell for cell in row):
                    _check_quotes(path, separator)
                    checked = True
                yield number, row
    except RequestError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
        help_ = (
            "Parquet file ({}): write it anew, or save the table as CSV"
            if parquet
            else "CSV file in UTF-8 ({}): correct it there"
        )
        raise RequestError(
            f"the table {path} is no readable {help_.format(reason(error))}"
        ) from None


def _csv(path: Path, separator: str) -> tuple[list[str], Iterable[Any]]:
    import pyarrow as pa  # noqa: PLC0415
    from pyarrow import csv as pa_csv  # noqa: PLC0415

    def opened(**types: Any) -> Any:
        return pa_csv.open_csv(
            # pyarrow reads ahead in a thread of its own, also after its reader has failed or gone,
            # and that thread crashes on a file object of Python's.
            pa.OSFile(str(path)),
            pa_csv.ReadOptions(use_threads=False, block_size=_BLOCK),
            pa_csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            pa_csv.ConvertOptions(**types),
        )

    # Twice, since the names must be known to have every cell as text: pyarrow would take a
    # task named 01 for the number 1.
    names = opened().schema.names
    return names, opened(column_types=dict.fromkeys(names, pa.string()))


def _check_quotes(path: Path, separator: str) -> None:
    """Refuse text after a closing quote: the rows between two stray quotes would be one cell."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.reader(file, delimiter=separator, strict=True)
        try:
            for _ in rows:
                pass
        except csv.Error as error:
            if "expected after" in str(error):
                raise RequestError(
                    f"the table {path}, line {rows.line_num}: text follows a closing quote, so a "
                    "quote before it may stand for itself, and rows may be lost: double every "
                    "quote within a cell, and quote that cell"
                ) from None


def _parquet(path: Path) -> tuple[list[str], Iterable[Any]]:
    import pyarrow as pa  # noqa: PLC0415
    from pyarrow import parquet  # noqa: PLC0415

    table = parquet.ParquetFile(pa.OSFile(str(path)))
    return table.schema_arrow.names, table.iter_batches(_BATCH)
