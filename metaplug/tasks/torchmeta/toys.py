"""The toys of torchmeta as streams: its functions and ranges, with numbers that depend on the task alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metaplug.contract.task_batch import TaskBatch
from metaplug.settings import validated
from metaplug.tasks.draws import draw, normal, uniform
from metaplug.tasks.episodes import ExampleCounts
from metaplug.tasks.identities import identity_of_stream


class ToyStream:
    """The tasks of one split of a toy. A TaskStream."""

    def __init__(
        self,
        toy: Toy,
        toys: ModuleType,
        noise_std: float,
        *,
        split: str,
        shots: int,
        queries: int,
        seed: int,
    ) -> None:
        self.form = validated(ExampleCounts, {"shots": shots, "queries": queries}, "tasks")
        self.split = split
        self.seed = seed
        self.identities = identity_of_stream(
            f"torchmeta's {toy.__name__.strip('_')}", f"{noise_std}", split, seed
        )
        self._points = partial(toy, toys, noise_std)

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The tasks `indices` of one iteration: every tensor (T, examples, 1), float32, on the CPU."""
        examples = self.form.shots + self.form.queries
        # The most that a toy needs: 10 words for a task, 6 for an example.
        draws = _Draws(draw(self.seed, self.split, iteration, indices, 10 + 6 * examples))
        points = torch.from_numpy(self._points(draws, examples)).float().unsqueeze(-1)
        (support_x, support_y), (query_x, query_y) = (
            part.unbind(1) for part in points.split([self.form.shots, self.form.queries], dim=2)
        )
        return TaskBatch(support_x, support_y, query_x, query_y)


class _Draws:
    """Stands in for the random state that torchmeta's toy tasks draw from, for T tasks at once, each with its own words."""

    def __init__(self, words: NDArray[np.uint64]) -> None:
        self._words = words

    def uniform(
        self, low: float, high: float, size: tuple[int, int] = (1, 1)
    ) -> NDArray[np.float64]:
        """(T, size[0])."""
        return uniform(self._next(size[0]), low, high)

    def randn(self, count: int = 1, _: int = 1) -> NDArray[np.float64]:
        """(T, count)."""
        return normal(self._next(2 * count).reshape(-1, count, 2))[..., 0]

    def _next(self, count: int) -> NDArray[np.uint64]:
        taken, self._words = self._words[:, :count], self._words[:, count:]
        return taken


def _sinusoid(
    toys: ModuleType, noise_std: float, draws: _Draws, examples: int
) -> NDArray[np.float64]:
    amplitude, phase = draws.uniform(0.1, 5), draws.uniform(0, np.pi)
    return _rows(
        toys.sinusoid.SinusoidTask(
            0, amplitude, phase, (-5, 5), noise_std, examples, np_random=draws
        ),
        amplitude,
    )


def _harmonic(
    toys: ModuleType, noise_std: float, draws: _Draws, examples: int
) -> NDArray[np.float64]:
    domain, frequency = draws.uniform(-4, 4), draws.uniform(5, 7)
    phases = draws.uniform(0, 2 * np.pi), draws.uniform(0, 2 * np.pi)
    amplitudes = draws.randn(), draws.randn()
    return _rows(
        toys.harmonic.HarmonicTask(
            0, domain, frequency, phases, amplitudes, noise_std, examples, np_random=draws
        ),
        domain,
    )


def _sinusoid_and_line(
    toys: ModuleType, noise_std: float, draws: _Draws, examples: int
) -> NDArray[np.float64]:
    curved, slope, intercept = draws.uniform(0, 1) < 0.5, draws.uniform(-3, 3), draws.uniform(-3, 3)
    line = toys.sinusoid_line.LinearTask(
        0, slope, intercept, (-5, 5), noise_std, examples, np_random=draws
    )
    return np.where(
        curved[..., None], _sinusoid(toys, noise_std, draws, examples), _rows(line, slope)
    )


def _rows(stacked: Any, of_tasks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inputs and targets, (T, 2, examples), of a toy task of torchmeta that was made of T tasks' numbers: its example i is task i."""
    return np.array([stacked[index] for index in range(len(of_tasks))])


Toy = Callable[[ModuleType, float, _Draws, int], NDArray[np.float64]]
TOYS: dict[str, Toy] = {
    "sinusoid": _sinusoid,
    "harmonic": _harmonic,
    "sinusoid-and-line": _sinusoid_and_line,
}
