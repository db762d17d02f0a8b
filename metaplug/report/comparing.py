"""Differences and accelerations in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from metaplug.evaluation.results import EvaluationResult
from metaplug.experiments.study.acceleration import Acceleration
from metaplug.experiments.study.results import Row
from metaplug.report.terminal import scale_of

MOST_SEEDS = 5
"""Whose figures stand one by one."""


def difference_text(difference: EvaluationResult | None) -> str:
    """Write a difference of means with its sign: "+7.40 ± 0.90 pp", in percentage points."""
    if difference is None:
        return "other tasks"
    scale, digits, unit = scale_of(difference.metric)
    unit = " pp" if unit else ""
    return f"{difference.mean * scale:+.{digits}f} ± {difference.interval * scale:.{digits}f}{unit}"


def apart_text(row: Row, over: Row) -> str:
    """Write why two rows have no pair of runs."""
    return "other data" if {*row.seeds} & {*over.seeds} else "other seeds"


def mean_text(acceleration: Acceleration | None) -> str:
    """Write the mean acceleration over seeds: "+140 % (2 of 3 seeds)"."""
    if acceleration is None or not acceleration.reached:
        return ""
    return percent_text(acceleration.mean_percent, acceleration)


def percent_text(percent: float | None, acceleration: Acceleration) -> str:
    """Write a mean of an acceleration, with the seeds that it is of where these are not all.

    Of a given target the baseline may miss it, and then there is no mean.
    """
    count, reached = len(acceleration.reached), acceleration.seeds_reached
    if not reached:
        return "not reached"
    if not acceleration.seeds_compared:
        return f"the baseline never{part_text(reached, count)}"
    if percent is None:  # of seconds, which are not known
        return ""
    return f"{percent:+.0f} %{part_text(acceleration.seeds_compared, count)}"


def part_text(part: int, count: int) -> str:
    """Write of how many seeds something is, where these are not all."""
    return "" if part == count else f" ({part} of {count} seeds)"


def by_seed_text(metric: str, differences: Sequence[float]) -> str:
    """Write the difference of every seed: "+7.40, +6.90"; of many the ends, of one nothing."""
    scale, digits, _ = scale_of(metric)
    texts = [f"{each * scale:+.{digits}f}" for each in differences]
    if len(texts) > MOST_SEEDS:
        low, high = min(differences) * scale, max(differences) * scale
        return f"{low:+.{digits}f} to {high:+.{digits}f}"
    return ", ".join(texts) if len(texts) > 1 else ""


def p_text(p_value: float | None) -> str:
    """Write a p-value in three digits after the point, or as smaller than the last of them.

    >>> p_text(0.0423), p_text(1e-9), p_text(1.0)
    ('0.042', '< 0.001', '1.000')
    """
    if p_value is None or math.isnan(p_value):
        return ""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def losses_text(losses: Sequence[float], digits: int, between: str = ", ") -> str:
    """Write losses: "1.68, 1.40"."""
    texts = (f"{each:.{digits}f}" if math.isfinite(each) else "not finite" for each in losses)
    return between.join(texts)
