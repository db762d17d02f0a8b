"""Regression tasks from anyone's table: a file with a column that says a row's task."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from metaplug.errors import RequestError, one_line, unknown
from metaplug.settings import validated
from metaplug.tasks.identities import digest
from metaplug.tasks.sources import TaskSource
from metaplug.tasks.splits import SPLITS, by_fractions, in_two_splits, read_splits
from metaplug.tasks.tables.stream import TabularStream, TaskRows
from metaplug.tasks.tables.table import Moments, Table, TabularConfig, read_table


@final
class Tabular(TaskSource):
    """Regression tasks from the rows of a table: `tabular:PATH`, its columns in `tasks.settings`.

    A table is a CSV file (UTF-8, with a header and decimal points), or a Parquet file (named
    .parquet). The rows with one name in the task column are one task. Tasks are split by a file
    {"train": [names], "val": [names], "test": [names]}, which leaves out a task that it does not
    name; else by a column; else by `fractions`, in the order of a hash of their names. No seed
    changes a split.

    Standardised columns have mean 0 and deviation 1 over the training tasks' rows; one that is
    constant there is only centred. A mean and a scale that are given take the place of theirs.

    Args:
        path: the file.
        shots, queries: support and query rows of a task.
        seed: any integer.
        settings: fields of TabularConfig.

    Raises:
        RequestError: a setting, the file, a column, a row or a split is wrong; it is named. Or as
            TabularStream raises.
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
        table = read_table(self._path, config)
        names = _split(table, self._path, config)
        train = [place for name in names["train"] for place in table.tasks[name]]
        self._mean, self._scale = _moments(table.values[train], config.standardise, self._path)
        self._features = table.features
        self.kind = "regression"
        self.input_shape = (len(table.features),)
        self.outputs = len(config.targets)
        sizes = {"shots": shots, "queries": queries, "seed": seed}
        self.train, self.val, self.test = (
            TabularStream(
                self._rows(table, names[split]),
                features=len(table.features),
                split=split,
                **sizes,
            )
            for split in SPLITS
        )

    def _rows(self, table: Table, names: list[str]) -> TaskRows:
        raw = [table.values[list(table.tasks[name])] for name in names]
        # Differences may be lost in float32 before the mean is subtracted.
        scaled = (np.concatenate(raw) - self._mean) / self._scale
        values = torch.from_numpy(scaled).float()
        if not (fits := torch.isfinite(values).all(0)).all():
            place = int(fits.int().argmin())
            column = (*table.features, *self.config.targets)[place]
            raise RequestError(
                f"the table {self._path}, column '{column}': divided by its scale, "
                f"{self._scale[place]:.3g}, a number is too large for float32: correct the column, "
                "or set standardise to false or to other moments"
            )
        digests = (digest(name, rows.tobytes()) for name, rows in zip(names, raw, strict=True))
        return TaskRows(tuple(names), values, tuple(map(len, raw)), tuple(digests))

    def describe(self) -> dict[str, Any]:
        """The data in words and numbers, ready for JSON.

        Mean and scale have the order of features, then targets; a value was mean + scale * number.
        """
        streams = (self.train, self.val, self.test)
        sizes = {
            stream.split: {"tasks": len(stream.rows.names), "rows": len(stream.rows.values)}
            for stream in streams
        }
        moments = {"mean": self._mean.tolist(), "scale": self._scale.tolist()}
        return self._described(str(self._path), "not stated", sizes) | {
            "features": list(self._features),
            "targets": list(self.config.targets),
            "standardisation": moments if self.config.standardise else None,
        }

    def resolved(self) -> dict[str, Any]:
        """The columns in their order, and the mean and scale of the training tasks' rows."""
        moments = {"mean": self._mean.tolist(), "scale": self._scale.tolist()}
        return {
            "features": list(self._features),
            "targets": list(self.config.targets),
            "standardise": moments if self.config.standardise else False,
        }


def _split(table: Table, path: Path, config: TabularConfig) -> dict[str, list[str]]:
    """The names of every split's tasks, sorted."""
    if config.splits is None and config.split_column is None:
        names = by_fractions(list(table.tasks), config.fractions)
    else:
        owner = table.splits if config.splits is None else _by_file(config.splits, table.tasks)
        names = {split: sorted(name for name in owner if owner[name] == split) for split in SPLITS}
    for split in SPLITS:
        if not names[split]:
            raise RequestError(
                f"the {split} split has none of the {len(table.tasks)} tasks of the table {path}: "
                "give it some, by splits, by split_column or by a larger share in fractions"
            )
    return names


def _by_file(path: Path, tasks: Collection[str]) -> dict[str, str]:
    """By task that the file names, its split."""
    owner: dict[str, str] = {}
    for split, names in read_splits(path, "task").items():
        for name in map(str, names):  # numbers too, which a table may have for names
            if name not in tasks:
                fault = unknown("task", one_line(name, 80), tasks)
                raise RequestError(f"the splits {path}, {split}: {fault}")
            if owner.setdefault(name, split) != split:
                raise RequestError(
                    f"the splits {path}: {in_two_splits('task', name, owner[name], split)}"
                )
    return owner


def _moments(
    values: NDArray[np.float64], standardise: bool | Moments, path: Path
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The number to subtract from every column, and the one to divide it by."""
    columns = values.shape[1]
    if isinstance(standardise, Moments):
        counts = len(standardise.mean), len(standardise.scale)
        if counts != (columns, columns):
            raise RequestError(
                f"standardise has {counts[0]} means and {counts[1]} scales, but the table {path} "
                f"has {columns} columns of features and targets: give one of each for every column"
            )
        return np.array(standardise.mean), np.array(standardise.scale)
    if not standardise:
        return np.zeros(columns), np.ones(columns)
    deviation = values.std(axis=0)
    # Rounding may hide from the deviation that a column is constant, but not from its range.
    varies = (np.ptp(values, axis=0) > 0) & (deviation > 0)
    return values.mean(axis=0), np.where(varies, deviation, 1.0)
