"""Regression tasks from anyone's table: a file with a column that says which task a row belongs to."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import RequestError, did_you_mean, one_line, unknown
from metaplug.settings import validated
from metaplug.tasks.draws import distinct, draw
from metaplug.tasks.episodes import ExampleCounts
from metaplug.tasks.identities import digest
from metaplug.tasks.reading import UNPRINTABLE
from metaplug.tasks.sources import SPLITS, SplitFractions, TaskSource, by_fractions, read_splits
from metaplug.tasks.tables.files import read_rows

_LARGEST = torch.finfo(torch.float32).max
_NO_NAME = "no name, as it has more than 200 characters, a line break or the like"
_SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}


class TabularConfig(SplitFractions):
    """What the columns of a table mean, and how its tasks are split."""

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
    standardise: bool = Field(
        True,
        description="Whether features and targets get mean 0 and deviation 1 over the training tasks' rows.",
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
                    f"the column '{column}' is named twice, by {owner[column]} and by {field}: name it once"
                )
            owner[column] = field
        return self

    def named_columns(self) -> list[tuple[str, str]]:
        """Every column that a field names, behind the name of that field."""
        fields = {
            "task": (self.task,),
            "split_column": (self.split_column,),
            "features": self.features or (),
            "targets": self.targets,
        }
        return [
            (field, column)
            for field, columns in fields.items()
            for column in columns
            if column is not None
        ]


@dataclass(frozen=True)
class TaskRows:
    """The tasks of one split, with all their rows in one tensor.

    Attributes:
        names: the tasks, sorted.
        values: (N, features + targets), float32, task after task.
        counts: how many of the rows each task has, in the order of names; their sum is N.
        digests: of each task's name and rows as they are in the table, in the order of names; None where nothing is known of them.
    """

    names: tuple[str, ...]
    values: Tensor
    counts: tuple[int, ...]
    digests: tuple[str, ...] | None = None


class TabularStream:
    """Regression tasks over the rows of one split. A TaskStream.

    Each is one of the split's tasks, drawn with replacement, and `shots` + `queries` of its rows, all distinct.

    Args:
        rows: the tasks to draw from, at least one.
        features: how many columns are features; those behind them are targets.
        split: the name of the split, which is part of every task's seed.
        shots, queries: as in ExampleCounts.
        seed: any integer.

    Raises:
        RequestError: a size is out of bounds, or a task has fewer than shots + queries rows.
    """

    def __init__(
        self, rows: TaskRows, *, features: int, split: str, shots: int, queries: int, seed: int
    ) -> None:
        self.form = validated(ExampleCounts, {"shots": shots, "queries": queries}, "tasks")
        self.rows = rows
        self.features = features
        self.split = split
        self.seed = seed
        self.identities = (
            None if rows.digests is None else dict(zip(rows.names, rows.digests, strict=True))
        )
        fewest = min(range(len(rows.counts)), key=rows.counts.__getitem__)
        if rows.counts[fewest] < shots + queries:
            raise RequestError(
                f"{shots} shots and {queries} queries need {shots + queries} rows of every task, but the task '{rows.names[fewest]}' of "
                f"the {split} split has {rows.counts[fewest]}: lower shots or queries, or leave that task out"
            )
        self._counts = np.array(rows.counts, np.int64)
        self._offsets = np.cumsum(self._counts) - self._counts

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The tasks `indices` of one iteration: inputs (T, examples, features), targets (T, examples, targets), float32, on the CPU."""
        words = draw(
            self.seed, self.split, iteration, indices, 1 + self.form.shots + self.form.queries
        )
        tasks = (words[:, 0] % np.uint64(len(self._counts))).astype(np.int64)
        places = self._offsets[tasks, None] + distinct(words[:, 1:], self._counts[tasks])
        found = self.rows.values[torch.from_numpy(places)]
        x, y = (
            part.split([self.form.shots, self.form.queries], dim=1)
            for part in found.tensor_split([self.features], dim=-1)
        )
        return TaskBatch(x[0].contiguous(), y[0].contiguous(), x[1].contiguous(), y[1].contiguous())


@final
class Tabular(TaskSource):
    """Regression tasks from the rows of a table: `tabular:PATH`, with its columns in `tasks.settings`, on the command line.

    A table is a CSV file (UTF-8, with a header and decimal points), or a Parquet file (named .parquet; it needs pyarrow). The rows with
    one name in the task column are one task. Tasks are split by a file {"train": [names], "val": [names], "test": [names]}, where one
    that is not named is left out; else by a column; else by `fractions`, in the order of a hash of their names. No seed changes a split.

    Standardised columns have mean 0 and deviation 1 over the training tasks' rows; one that is constant there is only centred.

    Args:
        path: the file.
        shots: support rows of a task.
        queries: query rows of a task.
        seed: any integer.
        settings: fields of TabularConfig.

    Raises:
        RequestError: a setting, the file, a column, a row or a split is wrong; it is named. Or as TabularStream raises.
    """

    Config = TabularConfig
    argument = "path"

    config: TabularConfig
    train: TabularStream
    val: TabularStream
    test: TabularStream

    def __init__(
        self,
        path: str | Path,
        *,
        shots: int = 10,
        queries: int = 10,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self.config = config = validated(TabularConfig, settings, "tabular")
        self._path = Path(path).expanduser()
        table = _read(self._path, config)
        names = _split(table, self._path, config)
        places = {
            split: [place for name in names[split] for place in table.tasks[name]]
            for split in SPLITS
        }
        self._features = table.features
        self._mean, self._scale = _moments(table.values[places["train"]], config.standardise)
        values = torch.from_numpy((table.values - self._mean) / self._scale).float()
        digests = {
            name: digest(name, table.values[list(table.tasks[name])].tobytes())
            for split in SPLITS
            for name in names[split]
        }
        self.kind = "regression"
        self.input_shape = (len(table.features),)
        self.outputs = len(config.targets)
        self.train, self.val, self.test = (
            TabularStream(
                TaskRows(
                    tuple(names[split]),
                    values[places[split]],
                    tuple(len(table.tasks[name]) for name in names[split]),
                    tuple(digests[name] for name in names[split]),
                ),
                features=len(table.features),
                split=split,
                shots=shots,
                queries=queries,
                seed=seed,
            )
            for split in SPLITS
        )

    def describe(self) -> dict[str, Any]:
        """The data in words and numbers, ready for JSON. Mean and scale have the order of features, then targets; a value was
        mean + scale * number."""
        return {
            "kind": self.kind,
            "input_shape": list(self.input_shape),
            "outputs": self.outputs,
            "origin": str(self._path),
            "licence": "not stated",
            "features": list(self._features),
            "targets": list(self.config.targets),
            "standardisation": {"mean": self._mean.tolist(), "scale": self._scale.tolist()}
            if self.config.standardise
            else None,
            "splits": {
                stream.split: {"tasks": len(stream.rows.names), "rows": len(stream.rows.values)}
                for stream in (self.train, self.val, self.test)
            },
        }


@dataclass(frozen=True)
class _Table:
    features: tuple[str, ...]
    values: NDArray[np.float64]
    """(rows, features + targets), finite in float32 too."""
    tasks: Mapping[str, Sequence[int]]
    """By task, the places of its rows."""
    stated: Mapping[str, str]
    """By task, the split in the split column; empty where there is none."""


def _read(path: Path, config: TabularConfig) -> _Table:
    rows = read_rows(path, _SEPARATORS[config.separator])
    _, header = next(rows, (0, ()))
    features = _features(path, header, config)
    places = {name: place for place, name in enumerate(header)}
    values = array("d")
    tasks: dict[str, array[int]] = {}
    stated: dict[str, str] = {}
    for place, (number, cells) in enumerate(rows):
        where = f"the table {path}, row {number}"
        if len(cells) != len(header):
            raise RequestError(
                f"{where} has {len(cells)} values for {len(header)} columns: give one for each"
            )
        task = _text(cells[places[config.task]])
        if not task:
            raise RequestError(
                f"{where}, column '{config.task}' names no task: name one, or leave out that row"
            )
        if task not in tasks and not _is_name(task):
            raise RequestError(
                f"{where}, column '{config.task}': '{one_line(task, 80)}' is {_NO_NAME}: rename the task"
            )
        tasks.setdefault(task, array("q")).append(place)
        if config.split_column is not None:
            split = _text(cells[places[config.split_column]])
            if split not in SPLITS:
                raise RequestError(
                    f"{where}, column '{config.split_column}': {unknown('split', one_line(split, 80), SPLITS)}"
                )
            _assign(stated, task, split, where)
        for column in (*features, *config.targets):
            values.append(_number(cells[places[column]], where, column))
    if not tasks:
        raise RequestError(f"the table {path} has a header but no rows: give it some")
    return _Table(
        features,
        np.frombuffer(values).reshape(-1, len(features) + len(config.targets)),
        tasks,
        stated,
    )


def _features(path: Path, header: Sequence[str], config: TabularConfig) -> tuple[str, ...]:
    """The names of the feature columns, where the header has every column that the settings name, and none twice."""
    if not header:
        raise RequestError(f"the table {path} is empty: give it a header and rows")
    if len(header) == 1:
        only = one_line(header[0], 80)
        raise RequestError(
            f"the table {path} reads as one column '{only}': set separator to what stands between its columns"
        )
    if odd := next((column for column in header if not _is_name(column)), None):
        raise RequestError(
            f"the table {path}: the column '{one_line(odd, 80)}' is {_NO_NAME}: rename it"
        )
    name, times = Counter(header).most_common(1)[0]
    if times > 1:
        raise RequestError(
            f"the table {path} has {times} columns '{one_line(name, 80)}': give each a name of its own"
        )
    named = {column: field for field, column in config.named_columns()}
    known = [one_line(column, 80) for column in header]
    for column, field in named.items():
        if column not in header:
            raise RequestError(
                f"the table {path} has no column '{column}', which the setting {field} names; set it to one that it has, for train by "
                f"--set 'tasks.settings={{task: COLUMN, targets: [COLUMN]}}': {did_you_mean(column, known)}"
            )
    features = config.features or tuple(column for column in header if column not in named)
    if not features:
        raise RequestError(f"the table {path} has no column that is left for the features: add one")
    if "" in features:
        raise RequestError(
            f"the table {path} has a column without a name, as an index has: name it, or list the features"
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
        # float() takes 1_000 and the digits of every script too, which another reader of the same table would not.
        if isinstance(cell, str) and ("_" in cell or not cell.isascii()):
            fault = "is not a number"
    except (TypeError, ValueError, OverflowError):
        value, fault = 0.0, "is not a number"
    if fault is not None:
        text = one_line(_text(cell), 80)
        raise RequestError(
            f"{where}, column '{column}': '{text}' {fault}; correct it, or leave out that row or column"
        )
    return value


def _split(table: _Table, path: Path, config: TabularConfig) -> dict[str, list[str]]:
    """The names of every split's tasks, sorted."""
    if config.splits is None and config.split_column is None:
        names = by_fractions(list(table.tasks), config.fractions)
    else:
        owner = table.stated if config.splits is None else _read_splits(config.splits, table.tasks)
        names = {split: sorted(name for name in owner if owner[name] == split) for split in SPLITS}
    for split in SPLITS:
        if not names[split]:
            raise RequestError(
                f"the {split} split has none of the {len(table.tasks)} tasks of the table {path}: give it some, by splits, by split_column "
                f"or by a larger share in fractions"
            )
    return names


def _read_splits(path: Path, tasks: Collection[str]) -> dict[str, str]:
    """By task that the file names, its split."""
    owner: dict[str, str] = {}
    for split, names in read_splits(path, "task").items():
        for name in map(str, names):  # numbers too, which a table may have for names
            if name not in tasks:
                raise RequestError(
                    f"the splits {path}, {split}: {unknown('task', one_line(name, 80), tasks)}"
                )
            _assign(owner, name, split, f"the splits {path}")
    return owner


def _assign(owner: dict[str, str], task: str, split: str, where: str) -> None:
    if owner.setdefault(task, split) != split:
        raise RequestError(
            f"{where}: the task '{task}' stands in the {owner[task]} and in the {split} split, so it would not be new to the model: "
            f"keep it in one"
        )


def _moments(
    values: NDArray[np.float64], standardise: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What to subtract from every column and to divide it by. Rounding may hide that a column is constant, its range does not."""
    if not standardise:
        return np.zeros(values.shape[1]), np.ones(values.shape[1])
    deviation = values.std(axis=0)
    return values.mean(axis=0), np.where(
        (np.ptp(values, axis=0) > 0) & (deviation > 0), deviation, 1.0
    )
