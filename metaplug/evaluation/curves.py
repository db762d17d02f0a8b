"""Validation curves: their points, their best, and when they reach a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from metaplug.evaluation.results import Metric
from metaplug.evaluation.scores import better


@dataclass(frozen=True)
class Point:
    """One validation: the mean over tasks, and half the width of its 95 % interval.

    Attributes:
        seconds: of meta-training and its validations up to here; None where it is not known.
    """

    iteration: int
    mean: float
    interval: float
    seconds: float | None = None


Curve = tuple[Point, ...]
"""Validations in the order of their iterations, at least one."""


def best_point(metric: Metric, curve: Curve) -> Point:
    """The best validation; the earlier of two equal ones."""
    best = curve[0]
    for point in curve[1:]:
        if better(metric, point.mean, best.mean) or not math.isfinite(best.mean):
            best = point
    return best


def first_reaching(metric: Metric, curve: Curve, target: float) -> Point | None:
    """The first validation that is as good as the target; None where none is."""
    for point in curve:
        if point.mean == target or better(metric, point.mean, target):
            return point
    return None


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over curves at every validation that all have; its interval is over all tasks."""
    return tuple(
        Point(
            points[0].iteration,
            fmean(point.mean for point in points),
            math.hypot(*(point.interval for point in points)) / len(points),
            _mean([point.seconds for point in points]),
        )
        for points in zip(*curves, strict=False)
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
