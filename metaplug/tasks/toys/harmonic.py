"""Harmonic regression: sums of two sine waves, seen through noise near a place of each task's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, final

import numpy as np
import torch
from pydantic import AfterValidator, Field

from metaplug.contract.task_batch import TaskBatch
from metaplug.settings import Settings, validated
from metaplug.tasks.draws import draw, normal, uniform
from metaplug.tasks.episodes import ExampleCounts
from metaplug.tasks.identities import identity_of_stream
from metaplug.tasks.sources import SPLITS, TaskSource

_Bound = Annotated[float, Field(ge=-1000, le=1000)]


def _in_order(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError("the lowest comes first")
    return bounds


_Range = Annotated[tuple[_Bound, _Bound], AfterValidator(_in_order)]


class HarmonicConfig(Settings):
    """The ranges that a task's frequency, phases and centre are drawn from, each uniformly; and the noise."""

    frequency: _Range = Field(
        (5.0, 7.0),
        description="Lowest and highest frequency ω, in radians per unit of x; within ±1000.",
    )
    phase: _Range = Field(
        (0.0, 2 * math.pi),
        description="Lowest and highest phase b₁ and b₂, in radians; within ±1000.",
    )
    centre: _Range = Field(
        (-4.0, 4.0), description="Lowest and highest mean μ of a task's inputs; within ±1000."
    )
    noise: float = Field(0.1, ge=0, le=1000, description="Standard deviation of the noise ε.")


class HarmonicStream:
    """The tasks y = a₁ sin(ω x + b₁) + a₂ sin(2 ω x + b₂) + ε of one split. A TaskStream."""

    def __init__(
        self, config: HarmonicConfig, *, split: str, shots: int, queries: int, seed: int
    ) -> None:
        self.config = config
        self.split = split
        self.form = validated(ExampleCounts, {"shots": shots, "queries": queries}, "tasks")
        self.seed = seed
        self.identities = identity_of_stream("harmonic", config.model_dump_json(), split, seed)

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The tasks `indices` of one iteration: every tensor (T, examples, 1), float32, on the CPU."""
        examples = self.form.shots + self.form.queries
        words = draw(self.seed, self.split, iteration, indices, 6 + 2 * examples)
        centre = uniform(words[:, 0:1], *self.config.centre)
        frequency = uniform(words[:, 1:2], *self.config.frequency)
        phase = uniform(words[:, 2:4], *self.config.phase)
        amplitude = normal(words[:, 4:6])
        # An example has one pair of words, so that more queries leave the examples before them as they are.
        points = normal(words[:, 6:].reshape(len(words), examples, 2))
        x = centre + points[..., 0]
        y = amplitude[:, 0:1] * np.sin(frequency * x + phase[:, 0:1]) + amplitude[:, 1:2] * np.sin(
            2 * frequency * x + phase[:, 1:2]
        )
        y += self.config.noise * points[..., 1]
        (support_x, query_x), (support_y, query_y) = (
            torch.from_numpy(values)
            .float()
            .unsqueeze(-1)
            .split([self.form.shots, self.form.queries], dim=1)
            for values in (x, y)
        )
        return TaskBatch(support_x, support_y, query_x, query_y)


@final
class Harmonic(TaskSource):
    """Regression of y = a₁ sin(ω x + b₁) + a₂ sin(2 ω x + b₂) + ε from a few points near one place (Lacoste et al. 2018, arXiv 1806.07528).

    A task has a₁, a₂ ~ N(0, 1), ω ~ U(5, 7), b₁, b₂ ~ U(0, 2π) and μ ~ U(-4, 4); its points have x ~ N(μ, 1) and ε ~ N(0, 0.1²). The
    three splits draw from the same distributions.

    Args:
        shots: support points of a task.
        queries: query points of a task.
        seed: any integer.
        settings: fields of HarmonicConfig.

    Raises:
        RequestError: a size or a setting is out of bounds or unknown.
    """

    Config = HarmonicConfig

    def __init__(
        self, *, shots: int = 10, queries: int = 10, seed: int = 0, **settings: Any
    ) -> None:
        config = validated(HarmonicConfig, settings, "harmonic")
        self.config = config
        self.kind = "regression"
        self.input_shape = (1,)
        self.outputs = 1
        self.train, self.val, self.test = (
            HarmonicStream(config, split=split, shots=shots, queries=queries, seed=seed)
            for split in SPLITS
        )

    def describe(self) -> dict[str, Any]:
        """The data in words and numbers, ready for JSON."""
        return {
            "kind": self.kind,
            "input_shape": list(self.input_shape),
            "outputs": self.outputs,
            "origin": "computed: y = a₁ sin(ω x + b₁) + a₂ sin(2 ω x + b₂) + ε",
            "licence": "none needed",
            "splits": {split: {"tasks": "unbounded"} for split in SPLITS},
        }
