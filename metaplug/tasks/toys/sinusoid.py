"""Sinusoid regression: the standard toy problem of meta-learning."""

from __future__ import annotations

import math
from typing import Annotated, final

import numpy as np
from pydantic import AfterValidator, Field

from metaplug.settings import Settings
from metaplug.tasks.draws import uniform
from metaplug.tasks.toys.functions import FunctionTasks, Numbers, Words, in_order

_Range = Annotated[tuple[float, float], AfterValidator(in_order)]


class SinusoidConfig(Settings):
    """The ranges that amplitude, phase and inputs are drawn from, each uniformly."""

    amplitude: _Range = Field((0.1, 5.0), description="Lowest and highest amplitude A.")
    phase: _Range = Field((0.0, math.pi), description="Lowest and highest phase φ, in radians.")
    inputs: _Range = Field((-5.0, 5.0), description="Lowest and highest input x, in radians.")


@final
class Sinusoid(FunctionTasks):
    """Regression of y = A sin(x + φ) from a few points (Finn et al. 2017, section 5.1).

    The three splits draw from the same ranges. Arguments and errors are those of FunctionTasks.
    """

    Config = SinusoidConfig
    name, formula, words = "sinusoid", "y = A sin(x + φ)", (2, 1)

    @staticmethod
    def points(config: SinusoidConfig, words: Words, examples: int) -> tuple[Numbers, Numbers]:
        """Inputs and targets (T, examples) from random words (T, n)."""
        amplitude = uniform(words[:, 0:1], *config.amplitude)
        phase = uniform(words[:, 1:2], *config.phase)
        x = uniform(words[:, 2:], *config.inputs)
        return x, amplitude * np.sin(x + phase)
