"""Sinusoid regression: the standard toy problem of meta-learning."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Any, final

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from metaplug.settings import Settings, validated
from metaplug.tasks.draws import uniform
from metaplug.tasks.toys.functions import FunctionTasks, Numbers, in_order

_Range = Annotated[tuple[float, float], AfterValidator(in_order)]


class SinusoidConfig(Settings):
    """The ranges that amplitude, phase and inputs are drawn from, each uniformly."""

    amplitude: _Range = Field((0.1, 5.0), description="Lowest and highest amplitude A.")
    phase: _Range = Field((0.0, math.pi), description="Lowest and highest phase φ, in radians.")
    inputs: _Range = Field((-5.0, 5.0), description="Lowest and highest input x, in radians.")


def _points(
    config: SinusoidConfig, words: NDArray[np.uint64], examples: int
) -> tuple[Numbers, Numbers]:
    amplitude = uniform(words[:, 0:1], *config.amplitude)
    phase = uniform(words[:, 1:2], *config.phase)
    x = uniform(words[:, 2:], *config.inputs)
    return x, amplitude * np.sin(x + phase)


@final
class Sinusoid(FunctionTasks):
    """Regression of y = A sin(x + φ) from a few points (Finn et al. 2017, section 5.1).

    The three splits draw from the same ranges.

    Args:
        shots, queries: support and query points of a task.
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
        identity, formula = ("sinusoid", config.model_dump_json()), "y = A sin(x + φ)"
        sizes = {"shots": shots, "queries": queries, "seed": seed}
        super().__init__(config, partial(_points, config), (2, 1), identity, formula, **sizes)
