"""Harmonic regression: sums of two sine waves with noise, near a place of each task's own."""

from __future__ import annotations

import math
from typing import Annotated, final

import numpy as np
from pydantic import AfterValidator, Field

from metaplug.settings import Settings
from metaplug.tasks.draws import normal, uniform
from metaplug.tasks.toys.functions import FunctionTasks, Numbers, Words, in_order

_Bound = Annotated[float, Field(ge=-1000, le=1000)]
_Range = Annotated[tuple[_Bound, _Bound], AfterValidator(in_order)]


class HarmonicConfig(Settings):
    """The ranges of frequency, phases and centre, each drawn uniformly; and the noise."""

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


@final
class Harmonic(FunctionTasks):
    """Regression of y = a₁ sin(ω x + b₁) + a₂ sin(2 ω x + b₂) + ε from a few points near one place.

    A task has a₁, a₂ ~ N(0, 1), ω ~ U(5, 7), b₁, b₂ ~ U(0, 2π) and μ ~ U(-4, 4); its points have
    x ~ N(μ, 1) and ε ~ N(0, 0.1²) (Lacoste et al. 2018, arXiv 1806.07528). The three splits draw
    from the same distributions. Arguments and errors are those of FunctionTasks.
    """

    Config = HarmonicConfig
    name, words = "harmonic", (6, 2)
    formula = "y = a₁ sin(ω x + b₁) + a₂ sin(2 ω x + b₂) + ε"

    @staticmethod
    def points(config: HarmonicConfig, words: Words, examples: int) -> tuple[Numbers, Numbers]:
        """Inputs and targets (T, examples) from random words (T, n)."""
        centre = uniform(words[:, 0:1], *config.centre)
        frequency = uniform(words[:, 1:2], *config.frequency)
        phase = uniform(words[:, 2:4], *config.phase)
        amplitude = normal(words[:, 4:6])
        # An example has its own pair of words, so more queries leave those before them as they are.
        pairs = normal(words[:, 6:].reshape(len(words), examples, 2))
        x = centre + pairs[..., 0]
        first = amplitude[:, 0:1] * np.sin(frequency * x + phase[:, 0:1])
        second = amplitude[:, 1:2] * np.sin(2 * frequency * x + phase[:, 1:2])
        return x, first + second + config.noise * pairs[..., 1]
