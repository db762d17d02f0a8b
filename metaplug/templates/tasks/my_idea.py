"""my-idea: tasks of straight lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from metaplug import TaskBatch
from metaplug.settings import Settings, validated
from metaplug.tasks import TaskSource
from metaplug.tasks.draws import draw, uniform
from pydantic import Field

SPLITS = ("train", "val", "test")


class Lines:
    """The tasks y = a x + b of one split: a task follows from seed, split, iteration and index."""

    def __init__(self, split: str, sizes: tuple[int, int], seed: int, slope: float) -> None:
        self.split, self.sizes, self.seed, self.slope = split, sizes, seed, slope

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The tasks of these indices: every tensor (tasks, examples, 1), float32."""
        words = draw(self.seed, self.split, iteration, indices, 2 + sum(self.sizes))
        a = uniform(words[:, 0:1], -self.slope, self.slope)
        b = uniform(words[:, 1:2], -1.0, 1.0)
        inputs = uniform(words[:, 2:], -1.0, 1.0)
        both = inputs, a * inputs + b
        x, y = (torch.from_numpy(each).float().unsqueeze(2) for each in both)
        shots = self.sizes[0]
        return TaskBatch(x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])


@final
class MyIdea(TaskSource):
    """Regression of y = a x + b from a few points; every task has its own slope and offset.

    Args:
        shots: support points of a task, 1 to 1000.
        queries: query points of a task, 1 to 1000.
        seed: another seed draws other tasks.
        settings: fields of Config.

    Raises:
        RequestError: a size or a setting is out of bounds or unknown.
    """

    class Config(Settings):
        """Which lines there are."""

        slope: float = Field(2.0, gt=0, le=1000, description="Largest slope a, up or down.")

    config: Config

    class Sizes(Settings):
        """How many points a task has."""

        shots: int = Field(ge=1, le=1000, description="Support points.")
        queries: int = Field(ge=1, le=1000, description="Query points.")

    def __init__(
        self, *, shots: int = 10, queries: int = 10, seed: int = 0, **settings: Any
    ) -> None:
        self.config = validated(self.Config, settings, "my-idea")
        counts = {"shots": shots, "queries": queries}
        given = validated(self.Sizes, counts, "my-idea")
        sizes = given.shots, given.queries
        self.kind = "regression"
        self.input_shape = (1,)
        self.outputs = 1
        self.train, self.val, self.test = (
            Lines(split, sizes, seed, self.config.slope) for split in SPLITS
        )

    def describe(self) -> dict[str, Any]:
        """The data in words and numbers, ready for JSON."""
        return {
            "kind": self.kind,
            "input_shape": list(self.input_shape),
            "outputs": self.outputs,
            "origin": "computed: y = a x + b",
            "licence": "none needed",
            "splits": {split: {"tasks": "unbounded"} for split in SPLITS},
        }
