"""A table as numbers by task: the roles of its columns, and the check of every cell."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from metaplug.errors import RequestError, did_you_mean, one_line, unknown
from metaplug.settings import Settings
from metaplug.tasks.reading import UNPRINTABLE, Names
from metaplug.tasks.splits import SPLITS, SplitFractions, in_two_splits
from metaplug.tasks.tables.rows import read_rows

_LARGEST = torch.finfo(torch.float32).max
_SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}
_NO_NAME = "no name, as it has more than 200 characters, a line break or the like"


class Moments(Settings):
    """The mean of every column, and what its distance from it is divided by."""

    mean: tuple[float, ...] = Field(description="Of the features, then of the targets.")
    scale: tuple[Annotated[float, Field(gt=0)], ...] = Field(description="Of the same columns.")


class TabularConfig(SplitFractions):
    """The roles of a table's columns, and the split of its tasks."""

    task: str = Field("task", description="Column with the name of a row's task.")
    features: tuple[str, ...] | None = Field(
        None, min_length=1, description="Input columns; null: every column that has no other role."
    )
    targets: tuple[str, ...] = Field(
        ("target",), min_length=1, description="Target columns, at least one."
    )
    splits: Path | None = Field(None, description="JSON file of task names by split.")
    split_column: str | None = Field(
        None, description="Column with the split of a row's task: train, val or test."
    )
    standardise: bool | Moments = Field(
        True,
        description="Scale columns to mean 0 and deviation 1 over the training tasks' rows; "
        "{mean, scale}: by these, of features, then targets.",
    )
    separator: Literal["comma", "semicolon", "tab", "bar"] = Field(
        "comma", description="What stands between the columns of a CSV file."
    )

    @model_validator(mode="after")
    def _one_role(self) -> Self:
        if self.splits is not None and self.split_column is not None:
            raise ValueError("splits and split_column both split the tasks: give one of them")
        owner: dict[str, str] = {}
        for field, column in self.named_columns():
            if column in owner:
                raise ValueError(
                    f"the column '{column}' is named twice, by {owner[column]} and by {field}: "
                    "name it once"
                )
            owner[column] = field
        return self

    def named_columns(self) -> list[tuple[str, str]]:
        """Every column that a field names, after the name of that field."""
        fields = {
            "task": [self.task],
            "split_column": [] if self.split_column is None else [self.split_column],
            "features": self.features or (),
            "targets": self.targets,
        }
        return [(field, column) for field, columns in fields.items() for column in columns]


@dataclass(frozen=True)
class Table:
    """The numbers of a table.

    Attributes:
        features: the names of the feature columns.
        values: (rows, features + targets), float64, finite in float32 too.
        tasks: by task, the places of its rows.
        splits: by task, the split in the split column; empty where there is none.
    """

    features: tuple[str, ...]
    values: NDArray[np.float64]
    tasks: Mapping[str, Sequence[int]]
    splits: Mapping[str, str]


def read_table(path: Path, config: TabularConfig) -> Table:
    """A CSV or Parquet file as numbers.

    Raises:
        RequestError: the file, a column or a row is wrong; it is named.
    """
    rows = read_rows(path, _SEPARATORS[config.separator])
    _, header = next(rows)
    features = _features(path, header, config)
    places = {name: place for place, name in enumerate(header)}
    values = array("d")
    tasks: dict[str, array[int]] = {}
    splits: dict[str, str] = {}
    known = Names("task")
    for place, (number, cells) in enumerate(rows):
        where = f"the table {path}, row {number}"
        task = _text(cells[places[config.task]])
        if not task:
            raise RequestError(
                f"{where}, column '{config.task}' names no task: name one, or leave the row out"
            )
        if task not in tasks and not _is_name(task):
            raise RequestError(
                f"{where}, column '{config.task}': '{one_line(task, 80)}' is {_NO_NAME}: rename it"
            )
        known.add(task, where)
        tasks.setdefault(task, array("q")).append(place)
        if config.split_column is not None:
            split = _text(cells[places[config.split_column]])
            if split not in SPLITS:
                fault = unknown("split", one_line(split, 80), SPLITS)
                raise RequestError(f"{where}, column '{config.split_column}': {fault}")
            if splits.setdefault(task, split) != split:
                raise RequestError(f"{where}: {in_two_splits('task', task, splits[task], split)}")
        for column in (*features, *config.targets):
            values.append(_number(cells[places[column]], where, column))
    if not tasks:
        raise RequestError(f"the table {path} has a header but no rows: give it some")
    width = len(features) + len(config.targets)
    return Table(features, np.frombuffer(values).reshape(-1, width), tasks, splits)


def _features(path: Path, header: Sequence[str], config: TabularConfig) -> tuple[str, ...]:
    """The feature columns, after checking that the header has every named column once."""
    if len(header) == 1:
        raise RequestError(
            f"the table {path} reads as one column '{one_line(header[0], 80)}': set separator to "
            "what stands between its columns"
        )
    if odd := next((column for column in header if not _is_name(column)), None):
        raise RequestError(
            f"the table {path}: the column '{one_line(odd, 80)}' is {_NO_NAME}: rename it"
        )
    name, times = Counter(header).most_common(1)[0]
    if times > 1:
        raise RequestError(
            f"the table {path} has {times} columns '{one_line(name, 80)}': give each a name of its "
            "own"
        )
    named = {column: field for field, column in config.named_columns()}
    for column, field in named.items():
        if column not in header:
            hint = did_you_mean(column, header)
            raise RequestError(
                f"the table {path} has no column '{column}', which the setting {field} names; set "
                "it to one that it has, for train by --set "
                f"'tasks.settings={{task: COLUMN, targets: [COLUMN]}}': {hint}"
            )
    features = config.features or tuple(column for column in header if column not in named)
    if not features:
        raise RequestError(f"the table {path} has no column that is left for the features: add one")
    if "" in features:
        raise RequestError(
            f"the table {path} has a column without a name, as an index has: name it, or list the "
            "features"
        )
    return features


def _is_name(text: str) -> bool:
    """Whether it can stand in a message."""
    return len(text) <= 200 and not UNPRINTABLE.search(text)


def _text(cell: object) -> str:
    return "" if cell is None else str(cell)


def _number(cell: Any, where: str, column: str) -> float:
    try:
        value = float(cell)
        fault = None if abs(value) <= _LARGEST else "is NaN, Inf or too large for float32"
        # float() takes 1_000 and the digits of every script, which other readers would not.
        if isinstance(cell, str) and ("_" in cell or not cell.isascii()):
            fault = "is not a number"
    except (TypeError, ValueError, OverflowError):
        value, fault = 0.0, "is not a number"
    if fault is not None:
        raise RequestError(
            f"{where}, column '{column}': '{one_line(_text(cell), 80)}' {fault}; correct it, or "
            "leave out that row or column"
        )
    return value
