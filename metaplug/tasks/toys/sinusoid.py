"""Sinusoid regression: the standard toy problem of meta-learning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self, final

import numpy as np
import torch
from pydantic import Field, model_validator

from metaplug.contract.task_batch import TaskBatch
from metaplug.settings import Settings, validated
from metaplug.tasks.draws import draw, uniform
from metaplug.tasks.episodes import ExampleCounts
from metaplug.tasks.identities import identity_of_stream
from metaplug.tasks.sources import SPLITS, TaskSource


class SinusoidConfig(Settings):
    """The ranges that amplitude, phase and inputs are drawn from, each uniformly."""

    amplitude: tuple[float, float] = Field(
        (0.1, 5.0), description="Lowest and highest amplitude A."
    )
    phase: tuple[float, float] = Field(
        (0.0, math.pi), description="Lowest and highest phase φ, in radians."
    )
    inputs: tuple[float, float] = Field(
        (-5.0, 5.0), description="Lowest and highest input x, in radians."
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for name in type(self).model_fields:
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} = ({low}, {high}): the lowest comes first")
        return self


class SinusoidStream:
    """The tasks y = A sin(x + φ) of one split. A TaskStream."""

    def __init__(
        self, config: SinusoidConfig, *, split: str, shots: int, queries: int, seed: int
    ) -> None:
        self.config = config
        self.split = split
        self.form = validated(ExampleCounts, {"shots": shots, "queries": queries}, "tasks")
        self.seed = seed
        self.identities = identity_of_stream("sinusoid", config.model_dump_json(), split, seed)

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The tasks `indices` of one iteration: every tensor (T, examples, 1), float32, on the CPU."""
        words = draw(
            self.seed, self.split, iteration, indices, 2 + self.form.shots + self.form.queries
        )
        amplitude = uniform(words[:, 0:1], *self.config.amplitude)
        phase = uniform(words[:, 1:2], *self.config.phase)
        x = uniform(words[:, 2:], *self.config.inputs)
        y = amplitude * np.sin(x + phase)
        (support_x, query_x), (support_y, query_y) = (
            torch.from_numpy(values)
            .float()
            .unsqueeze(-1)
            .split([self.form.shots, self.form.queries], dim=1)
            for values in (x, y)
        )
        return TaskBatch(support_x, support_y, query_x, query_y)


@final
class Sinusoid(TaskSource):
    """Regression of y = A sin(x + φ) from a few points (Finn et al. 2017, section 5.1). The three splits draw from the same ranges.

    Args:
        shots: support points of a task.
        queries: query points of a task.
        seed: any integer.
        settings: fields of SinusoidConfig.

    Raises:
        RequestError: a size or a setting is out of bounds or unknown.
    """

    Config = SinusoidConfig

    def __init__(
        self, *, shots: int = 10, queries: int = 10, seed: int = 0, **settings: Any
    ) -> None:
        config = validated(SinusoidConfig, settings, "sinusoid")
        self.config = config
        self.kind = "regression"
        self.input_shape = (1,)
        self.outputs = 1
        self.train, self.val, self.test = (
            SinusoidStream(config, split=split, shots=shots, queries=queries, seed=seed)
            for split in SPLITS
        )

    def describe(self) -> dict[str, Any]:
        """The data in words and numbers, ready for JSON."""
        return {
            "kind": self.kind,
            "input_shape": list(self.input_shape),
            "outputs": self.outputs,
            "origin": "computed: y = A sin(x + φ)",
            "licence": "none needed",
            "splits": {split: {"tasks": "unbounded"} for split in SPLITS},
        }
