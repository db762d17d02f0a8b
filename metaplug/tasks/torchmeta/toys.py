"""The toys of torchmeta: its functions and ranges, with numbers that depend on the task alone."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from metaplug.tasks.draws import normal, uniform
from metaplug.tasks.toys.functions import Numbers, Words

WORDS = (10, 6)
"""The random words that the hungriest toy needs for a task, and for each of its examples."""


class _Draws:
    """Stand in for torchmeta's random state, for T tasks at once, each with its own words."""

    def __init__(self, words: Words) -> None:
        self._words = words

    def uniform(self, low: float, high: float, size: tuple[int, int] = (1, 1)) -> Numbers:
        """(T, size[0])."""
        return uniform(self._next(size[0]), low, high)

    def randn(self, count: int = 1, _: int = 1) -> Numbers:
        """(T, count)."""
        return normal(self._next(2 * count).reshape(-1, count, 2))[..., 0]

    def _next(self, count: int) -> Words:
        taken, self._words = self._words[:, :count], self._words[:, count:]
        return taken


def _sinusoid(toys: ModuleType, noise_std: float, draws: _Draws, examples: int) -> Numbers:
    amplitude, phase = draws.uniform(0.1, 5), draws.uniform(0, np.pi)
    form = ((-5, 5), noise_std, examples)
    return _rows(toys.sinusoid.SinusoidTask(0, amplitude, phase, *form, np_random=draws), amplitude)


def _harmonic(toys: ModuleType, noise_std: float, draws: _Draws, examples: int) -> Numbers:
    domain, frequency = draws.uniform(-4, 4), draws.uniform(5, 7)
    phases = draws.uniform(0, 2 * np.pi), draws.uniform(0, 2 * np.pi)
    numbers = (domain, frequency, phases, (draws.randn(), draws.randn()), noise_std, examples)
    return _rows(toys.harmonic.HarmonicTask(0, *numbers, np_random=draws), domain)


def _sinusoid_and_line(toys: ModuleType, noise_std: float, draws: _Draws, examples: int) -> Numbers:
    curved, slope, intercept = draws.uniform(0, 1) < 0.5, draws.uniform(-3, 3), draws.uniform(-3, 3)
    form = ((-5, 5), noise_std, examples)
    line = toys.sinusoid_line.LinearTask(0, slope, intercept, *form, np_random=draws)
    # The line's points are drawn when it is made, so before the curve's.
    straight = _rows(line, slope)
    return np.where(curved[..., None], _sinusoid(toys, noise_std, draws, examples), straight)


def _rows(stacked: Any, of_tasks: Numbers) -> Numbers:
    """Inputs and targets (T, 2, examples) of a torchmeta task that was made of T tasks' numbers.

    Its example i is task i.
    """
    return np.array([stacked[index] for index in range(len(of_tasks))])


Toy = Callable[[ModuleType, float, _Draws, int], Numbers]
TOYS: dict[str, Toy] = {
    "sinusoid": _sinusoid,
    "harmonic": _harmonic,
    "sinusoid-and-line": _sinusoid_and_line,
}


def points(
    name: str, toys: ModuleType, noise_std: float, words: Words, examples: int
) -> tuple[Numbers, Numbers]:
    """Inputs and targets of the toy `name`, for FunctionStream."""
    both = TOYS[name](toys, noise_std, _Draws(words), examples)
    return both[:, 0], both[:, 1]
