"""Scales of pictures: where a value stands between two ends, and the ticks in between."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

_STEPS = (1, 2, 5, 10)
_SMALLEST = 1e-200
"""Smaller numbers count as 0."""


@dataclass(frozen=True)
class Scale:
    """From values to places in [0, 1].

    Attributes:
        low: the value at 0.
        high: the value at 1, above `low`.
        ticks: (value, text) in rising order.
        is_log: whether equal ratios have equal lengths; then `low` is above 0.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    is_log: bool = False

    def at(self, value: float) -> float:
        """The place of a value; outside [0, 1] where the scale does not reach it.

        >>> Scale(10, 20, ()).at(15), Scale(1, 4, (), is_log=True).at(2)
        (0.5, 0.5)
        """
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


def linear(values: Iterable[float], most: int = 5, *, tight: bool = False) -> Scale:
    """A scale over finite values, at least one, with about `most` round ticks.

    Args:
        tight: end at the smallest and the largest value, and not at the ticks around them.

    >>> [text for _, text in linear([0.12, 0.34]).ticks]
    ['0.10', '0.15', '0.20', '0.25', '0.30', '0.35']
    """
    found = sorted(values)
    low, high = found[0], found[-1]
    if high - low <= max(1e-9 * max(abs(low), abs(high)), _SMALLEST):
        room = abs(low) / 10 if abs(low) > _SMALLEST else 1.0
        low, high = low - room, high + room
    step = _step((high - low) / most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if tight:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    else:
        low, high = first * step, last * step
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = [(place * step, _text(place * step, digits)) for place in range(first, last + 1)]
    return Scale(low, high, tuple(ticks))


def at_values(values: Iterable[float], texts: Sequence[str], width: float = 340) -> Scale:
    """A scale with its ticks at given values, logarithmic where they suggest it.

    Args:
        values: different ones, rising.
        texts: of the ticks, one for each value; those that would meet are left out.
        width: of the picture, in units in which a letter is about 7 wide.
    """
    found = list(values)
    log = is_geometric(found)
    if len(found) == 1:
        low, high = found[0] - 1, found[0] + 1
    elif log:
        room = (found[-1] / found[0]) ** 0.05
        low, high = found[0] / room, found[-1] * room
    else:
        room = (found[-1] - found[0]) * 0.05
        low, high = found[0] - room, found[-1] + room
    scale = Scale(low, high, (), log)
    kept, end = [], -math.inf
    for value, text in zip(found, texts, strict=True):
        half, centre = 3.7 * len(text) + 4, width * scale.at(value)
        if centre - half >= end:
            kept.append((value, text))
            end = centre + half
    return Scale(low, high, tuple(kept), log)


def is_geometric(values: Sequence[float]) -> bool:
    """Whether rising values are more evenly apart by their ratios than by their differences.

    >>> is_geometric([0.01, 0.1, 1.0]), is_geometric([1, 2, 3]), is_geometric([0, 1, 10])
    (True, False, False)
    """
    if len(values) < 2 or values[0] <= 0:
        return False
    if len(values) == 2:
        return values[1] / values[0] >= 5
    ratios = [math.log(after / before) for before, after in pairwise(values)]
    differences = [after - before for before, after in pairwise(values)]
    return max(ratios) / min(ratios) < max(differences) / min(differences)


def _step(least: float) -> float:
    """The round number 1, 2 or 5 times a power of ten that is at least so large."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in _STEPS if step * power >= least * (1 - 1e-9))


def _text(value: float, digits: int) -> str:
    if value and (abs(value) >= 1e6 or digits > 5):
        return f"{value:.3g}"
    return f"{value + 0.0:,.{digits}f}".replace("-", "−")
