"""How the cost of a metaplug step grows, with the tasks and with the inner steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from metaplug.bench.contestants import by_metaplug
from metaplug.bench.measuring import spread, surroundings
from metaplug.bench.meters import ON_CPU, Meter
from metaplug.bench.workloads import WORKLOADS, Workload

Axis = Literal["tasks", "inner_steps"]

GRID: Mapping[str, Mapping[Axis, Sequence[int]]] = {
    "sinusoid-25x5": {"tasks": (8, 16, 32, 64, 128, 256), "inner_steps": (0, 1, 2, 5, 10, 20)},
    "conv4-32-stride-32x3": {
        "tasks": (8, 16, 32, 64, 128, 256),
        "inner_steps": (0, 1, 2, 5, 10, 20),
    },
}
"""By workload, what grows from it, and to what; the rest stays as its name says. A step without an inner step is what the others add to."""

MOST_MIB = 1024.0
"""A series ends before the step that would hold more of torch's memory, MiB; what it holds grows in proportion."""


@dataclass(frozen=True)
class Series:
    """Steps that differ in one number.

    Attributes:
        axis: which.
        recomputed: whether of K inner steps the graph of about √K at a time is kept, and that of the others made again; else all are kept.
    """

    workload: str
    axis: Axis
    recomputed: bool

    def __str__(self) -> str:
        return f"{self.workload}, more {self.axis.replace('_', ' ')}{', recomputed' if self.recomputed else ''}"


@dataclass(frozen=True)
class Point:
    """One step of one size.

    Attributes:
        axis: what grows in the series that it belongs to.
        checkpoint_steps: the inner steps whose graph is kept at a time; None where all are.
        milliseconds, spread: median over the repeats, and half the distance of the quartiles.
        peak_mib: the most that torch's allocator holds in the course of the step, MiB.
        milliseconds_per_task, mib_per_task: the same for each task.
    """

    workload: str
    axis: Axis
    tasks: int
    inner_steps: int
    checkpoint_steps: int | None
    milliseconds: float
    spread: float
    peak_mib: float
    milliseconds_per_task: float
    mib_per_task: float

    @property
    def series(self) -> Series:
        """What it is a point of."""
        return Series(self.workload, self.axis, self.checkpoint_steps is not None)

    @property
    def size(self) -> int:
        """What grows: its tasks, or its inner steps."""
        return self.tasks if self.axis == "tasks" else self.inner_steps


@dataclass(frozen=True)
class Growth:
    """What a series comes to.

    Attributes:
        smallest, largest: its first and last size.
        time_per_task, memory_per_task: of tasks, those of the largest step over those of the smallest; else None.
        time_exponent, memory_exponent: of inner steps, how what they add to the fixed cost of a step grows with their number: the slope of
            a line through all points, both scales logarithmic. 1 is proportional, 0.5 a square root. The fixed time is that of a step
            without inner steps; the fixed memory is where a line through the steps that keep all graphs meets no inner step, as the first
            one brings the second derivative, whatever follows. None of tasks, and where noise leaves nothing above the fixed cost.
        times_as_long: the time of recomputed steps over that of kept ones, at the largest size that both have; else None.
    """

    series: Series
    smallest: int
    largest: int
    time_per_task: float | None = None
    memory_per_task: float | None = None
    time_exponent: float | None = None
    memory_exponent: float | None = None
    times_as_long: float | None = None


def run(
    *,
    repeats: int,
    grid: Mapping[str, Mapping[Axis, Sequence[int]]] = GRID,
    most_mib: float = MOST_MIB,
    meter: Meter = ON_CPU,
    on_series: Callable[[Series], None] = lambda _: None,
) -> list[Point]:
    """Measure every series on the meter's device, batching as "auto" chooses, each from its smallest step to its largest or to `most_mib`;
    inner steps once with all graphs kept, and once recomputed."""
    points = []
    with meter.active():
        for name, axes in grid.items():
            for axis, values in axes.items():
                for recomputed in (False, True) if axis == "inner_steps" else (False,):
                    on_series(Series(name, axis, recomputed))
                    sizes = [
                        value for value in values if value or not recomputed
                    ]  # no inner step, nothing to compute again
                    for value, following in zip(sizes, [*sizes[1:], 0], strict=True):
                        base = WORKLOADS[name]
                        workload = (
                            replace(base, tasks=value)
                            if axis == "tasks"
                            else replace(base, inner_steps=value)
                        )
                        points.append(
                            _measure(
                                workload,
                                axis,
                                max(1, round(math.sqrt(value))) if recomputed else None,
                                repeats,
                                meter,
                            )
                        )
                        if value and points[-1].peak_mib * following / value > most_mib:
                            break
    return points


def growth(points: Sequence[Point]) -> list[Growth]:
    """What every series of points comes to."""
    return [
        _growth(list(series), points) for _, series in groupby(points, lambda point: point.series)
    ]


def as_json_values(points: Sequence[Point], repeats: int, meter: Meter = ON_CPU) -> dict[str, Any]:
    """The points, and what they come to, with what they were measured on."""
    found = [
        {
            **vars(each.series),
            **{name: value for name, value in vars(each).items() if name != "series"},
        }
        for each in growth(points)
    ]
    return {
        **surroundings(repeats, meter),
        "most_mib": MOST_MIB,
        "points": [vars(point) for point in points],
        "growth": found,
    }


def _growth(points: Sequence[Point], every: Sequence[Point]) -> Growth:
    first, last = points[0], points[-1]
    found = Growth(first.series, first.size, last.size)
    if first.axis == "tasks":
        time, memory = (
            last.milliseconds_per_task / first.milliseconds_per_task,
            last.mib_per_task / first.mib_per_task,
        )
        return replace(found, time_per_task=time, memory_per_task=memory)
    kept = {
        point.size: point
        for point in every
        if point.series == replace(first.series, recomputed=False)
    }
    both, grown = (
        [point for point in points if point.size in kept],
        [point for point in points if point.size],
    )
    return replace(
        found,
        time_exponent=_exponent(
            [
                (point.size, point.milliseconds - (kept[0].milliseconds if 0 in kept else 0))
                for point in grown
            ]
        ),
        memory_exponent=_exponent(
            [(point.size, point.peak_mib - _intercept(list(kept.values()))) for point in grown]
        ),
        times_as_long=both[-1].milliseconds / kept[both[-1].size].milliseconds
        if first.series.recomputed and both
        else None,
    )


def _exponent(pairs: Sequence[tuple[int, float]]) -> float | None:
    if len(pairs) < 2 or min(added for _, added in pairs) <= 0:
        return None
    sizes, costs = zip(*((math.log(size), math.log(added)) for size, added in pairs), strict=True)
    return statistics.linear_regression(sizes, costs).slope


def _intercept(kept: Sequence[Point]) -> float:
    """MiB of no inner step, on the line through those that have some; 0 where there is no line."""
    grown = [point for point in kept if point.size]
    if len(grown) < 2:
        return 0.0
    return statistics.linear_regression(
        [point.size for point in grown], [point.peak_mib for point in grown]
    ).intercept


def _measure(
    workload: Workload, axis: Axis, checkpoint_steps: int | None, repeats: int, meter: Meter
) -> Point:
    step = by_metaplug(
        *workload.build(meter.device), workload, batching="auto", checkpoint_steps=checkpoint_steps
    ).step
    for _ in range(meter.warm_ups):
        step()
    taken = [meter.timed(step) for _ in range(repeats)]
    median, peak, tasks = statistics.median(taken), meter.memory(step)[0], workload.tasks
    costs = (median, spread(taken), peak, median / tasks, peak / tasks)
    return Point(workload.name, axis, tasks, workload.inner_steps, checkpoint_steps, *costs)
