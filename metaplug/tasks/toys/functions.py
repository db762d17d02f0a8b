"""Tasks from functions: the stream and the source that all toys share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from metaplug.contract.task_batch import TaskBatch
from metaplug.settings import validated
from metaplug.tasks.choice_options import ExampleCounts
from metaplug.tasks.draws import draw
from metaplug.tasks.identities import identity_of_stream
from metaplug.tasks.sources import TaskSource
from metaplug.tasks.splits import SPLITS

Words = NDArray[np.uint64]
Numbers = NDArray[np.float64]


def in_order(bounds: tuple[float, float]) -> tuple[float, float]:
    """Check that a range is the lowest and the highest value, for a field of a Config."""
    if bounds[0] > bounds[1]:
        raise ValueError("the lowest comes first")
    return bounds


class FunctionStream:
    """The tasks of one split. A TaskStream.

    Args:
        points: from random words (T, n) and the number of examples, inputs and targets
            (T, examples).
        words: the number of random words for a task, and for each of its examples.
        identity: the name of the function, and its settings as text.
        split, seed: parts of every task's seed.
        shots, queries: as in ExampleCounts.
    """

    def __init__(
        self,
        points: Callable[[Words, int], tuple[Numbers, Numbers]],
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
    """The base of toys: regression of one number from another, with as many tasks as are asked for.

    Args:
        shots, queries: support and query points of a task.
        seed: any integer.
        settings: fields of the subclass's Config.

    Raises:
        RequestError: a size or a setting is out of bounds or unknown.

    Attributes:
        name: of the source.
        formula: of the function.
        words: as for FunctionStream.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    words: ClassVar[tuple[int, int]]

    def __init__(
        self, *, shots: int = 10, queries: int = 10, seed: int = 0, **settings: Any
    ) -> None:
        self.config = config = validated(self.Config, settings, self.name)
        self.kind, self.input_shape, self.outputs = "regression", (1,), 1
        own = partial(self.points, config), self.words, (self.name, config.model_dump_json())
        self.train, self.val, self.test = (
            FunctionStream(*own, split=split, seed=seed, shots=shots, queries=queries)
            for split in SPLITS
        )

    @staticmethod
    @abstractmethod
    def points(config: Any, words: Words, examples: int) -> tuple[Numbers, Numbers]:
        """Inputs and targets (T, examples) from random words (T, n)."""

    def describe(self) -> dict[str, Any]:
        """The data in words and numbers, ready for JSON."""
        return self._described(f"computed: {self.formula}", "none needed", UNBOUNDED)


UNBOUNDED = {split: {"tasks": "unbounded"} for split in SPLITS}
"""The size of every split of a toy, for `describe`."""
