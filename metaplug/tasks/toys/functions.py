"""Tasks from functions: the stream and the source that all toys share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metaplug.contract.task_batch import TaskBatch
from metaplug.settings import Settings, validated
from metaplug.tasks.draws import draw
from metaplug.tasks.episodes import ExampleCounts
from metaplug.tasks.identities import identity_of_stream
from metaplug.tasks.sources import TaskSource
from metaplug.tasks.splits import SPLITS

Numbers = NDArray[np.float64]
Points = Callable[[NDArray[np.uint64], int], tuple[Numbers, Numbers]]
"""From random words (T, n) and the number of examples, the inputs and targets (T, examples)."""


def in_order(bounds: tuple[float, float]) -> tuple[float, float]:
    """Check that a range is the lowest and the highest value, for a field of a Config."""
    if bounds[0] > bounds[1]:
        raise ValueError("the lowest comes first")
    return bounds


class FunctionStream:
    """The tasks of one split. A TaskStream.

    Args:
        points: of a batch of tasks.
        words: how many random words a task needs, and each of its examples.
        identity: the name of the function, and its settings as text.
        split, seed: parts of every task's seed.
        shots, queries: as in ExampleCounts.
    """

    def __init__(
        self,
        points: Points,
        words: tuple[int, int],
        identity: tuple[str, str],
        *,
        split: str,
        seed: int,
        shots: int,
        queries: int,
    ) -> None:
        self.form = validated(ExampleCounts, {"shots": shots, "queries": queries}, "tasks")
        self.split, self.seed = split, seed
        self.identities = identity_of_stream(*identity, split, seed)
        self._points, self._words = points, words

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The tasks `indices` of one iteration: tensors (T, examples, 1), float32, on the CPU."""
        parts = [self.form.shots, self.form.queries]
        for_task, for_example = self._words
        count = for_task + for_example * sum(parts)
        words = draw(self.seed, self.split, iteration, indices, count)
        (support_x, query_x), (support_y, query_y) = (
            torch.from_numpy(values).float().unsqueeze(-1).split(parts, dim=1)
            for values in self._points(words, sum(parts))
        )
        return TaskBatch(support_x, support_y, query_x, query_y)


class FunctionTasks(TaskSource):
    """The base of toys: one number to one number, with as many tasks as are asked for.

    Args:
        config: the checked settings of the subclass.
        points, words, identity: as for FunctionStream.
        formula: of the function, for `describe`.
        sizes: shots, queries and seed.
    """

    def __init__(
        self,
        config: Settings,
        points: Points,
        words: tuple[int, int],
        identity: tuple[str, str],
        formula: str,
        **sizes: int,
    ) -> None:
        self.config = config
        self.kind, self.input_shape, self.outputs = "regression", (1,), 1
        self._formula = formula
        self.train, self.val, self.test = (
            FunctionStream(points, words, identity, split=split, **sizes) for split in SPLITS
        )

    def describe(self) -> dict[str, Any]:
        """The data in words and numbers, ready for JSON."""
        sizes = {split: {"tasks": "unbounded"} for split in SPLITS}
        return self._described(f"computed: {self._formula}", "none needed", sizes)
