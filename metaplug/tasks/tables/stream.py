"""The rows of the tasks of one split, and the regression tasks that are drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import RequestError
from metaplug.settings import validated
from metaplug.tasks.choice_options import ExampleCounts
from metaplug.tasks.draws import distinct, draw


@dataclass(frozen=True)
class TaskRows:
    """The tasks of one split, with all their rows in one tensor.

    Attributes:
        names: the tasks, sorted.
        values: (N, features + targets), float32, task after task.
        counts: the number of rows of each task, in the order of names; their sum is N.
        digests: of each task's name and rows as they are in the table, in the order of names.
    """

    names: tuple[str, ...]
    values: Tensor
    counts: tuple[int, ...]
    digests: tuple[str, ...]


class TabularStream:
    """Regression tasks over the rows of one split. A TaskStream.

    Each is one of the split's tasks, drawn with replacement, and `shots` + `queries` of its rows,
    all distinct.

    Args:
        rows: the tasks to draw from, at least one.
        features: how many columns are features; those after them are targets.
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
        self.rows, self.features, self.split, self.seed = rows, features, split, seed
        self.identities = dict(zip(rows.names, rows.digests, strict=True))
        self._counts = np.array(rows.counts, np.int64)
        self._offsets = np.cumsum(self._counts) - self._counts
        fewest = int(self._counts.argmin())
        if self._counts[fewest] < shots + queries:
            raise RequestError(
                f"{shots} shots and {queries} queries need {shots + queries} rows of every task, "
                f"but the task '{rows.names[fewest]}' of the {split} split has "
                f"{self._counts[fewest]}: lower shots or queries, or leave that task out"
            )

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The tasks `indices` of one iteration, float32, on the CPU.

        Returns:
            Inputs (T, examples, features) and targets (T, examples, targets).
        """
        parts = [self.form.shots, self.form.queries]
        words = draw(self.seed, self.split, iteration, indices, 1 + sum(parts))
        tasks = (words[:, 0] % np.uint64(len(self._counts))).astype(np.int64)
        places = self._offsets[tasks, None] + distinct(words[:, 1:], self._counts[tasks])
        found = self.rows.values[torch.from_numpy(places)]
        support, query = (
            part.tensor_split([self.features], dim=-1) for part in found.split(parts, dim=1)
        )
        return TaskBatch(*(part.contiguous() for part in (*support, *query)))
