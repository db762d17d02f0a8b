"""How the cost of a metaplug step grows, with the tasks and with the inner steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from statistics import linear_regression
from typing import Any, Literal

from metaplug.bench.contestants import by_metaplug
from metaplug.bench.measuring import median_and_spread, surroundings
from metaplug.bench.meters import ON_CPU, Meter
from metaplug.bench.workloads import WORKLOADS, Workload

Axis = Literal["tasks", "inner_steps"]
Series = tuple[str, Axis, bool]
"""Steps that differ in one number: their workload, what grows, and whether they are recomputed, the
graphs of about √K of K inner steps kept at a time; else all are kept."""

Grid = Mapping[str, Mapping[Axis, Sequence[int]]]

_SIZES: Mapping[Axis, Sequence[int]] = {
    "tasks": (8, 16, 32, 64, 128, 256),
    "inner_steps": (0, 1, 2, 5, 10, 20),
}
GRID: Grid = {"sinusoid-25x5": _SIZES, "conv4-32-stride-32x3": _SIZES}
"""By workload, what grows, and to what; the rest stays as the name of the workload says."""

MOST_MIB = 1024.0
"""A series ends before a step that would hold more of torch's memory, MiB."""


@dataclass(frozen=True)
class Point:
    """One step of one size.

    Attributes:
        axis: what grows in its series.
        checkpoint_steps: the inner steps whose graph is kept at a time; None where all are.
        milliseconds, spread: median over the repeats, and half the distance of the quartiles.
        peak_mib: the most that torch's allocator holds in the course of the step, MiB.
    """

    workload: str
    axis: Axis
    tasks: int
    inner_steps: int
    checkpoint_steps: int | None
    milliseconds: float
    spread: float
    peak_mib: float

    @property
    def milliseconds_per_task(self) -> float:
        """The time, for each task."""
        return self.milliseconds / self.tasks

    @property
    def mib_per_task(self) -> float:
        """The memory, for each task."""
        return self.peak_mib / self.tasks

    @property
    def series(self) -> Series:
        """What it is a point of."""
        return self.workload, self.axis, self.checkpoint_steps is not None

    @property
    def size(self) -> int:
        """What grows: its tasks, or its inner steps."""
        return self.tasks if self.axis == "tasks" else self.inner_steps


@dataclass(frozen=True)
class Growth:
    """What a series comes to.

    Attributes:
        workload, axis, recomputed: the series.
        smallest, largest: its first and last size.
        time_per_task, memory_per_task: of tasks, the largest step's over the smallest's.
        time_exponent, memory_exponent: of inner steps, the e of K^e by which they add to the fixed
            cost of a step: the slope of a line through all points, both scales logarithmic. The
            fixed time is that of no inner step. The fixed memory is where a line through the steps
            that keep all graphs meets no inner step, as the first one brings the second derivative.
            None where noise leaves nothing above the fixed cost.
        times_as_long: the time of recomputed steps over that of kept ones, at the largest size.
    """

    workload: str
    axis: Axis
    recomputed: bool
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
    grid: Grid = GRID,
    most_mib: float = MOST_MIB,
    meter: Meter = ON_CPU,
    on_series: Callable[[str], None] = lambda _: None,
) -> list[Point]:
    """Measure every series, from its smallest step to its largest or to `most_mib`.

    Inner steps are measured once with all graphs kept, and once recomputed.
    """
    kinds = [(name, axis, kept) for name in grid for axis in grid[name] for kept in (True, False)]
    points = []
    with meter.active():
        for name, axis, kept in kinds:
            if not kept and axis == "tasks":
                continue
            grows = axis.replace("_", " ")
            on_series(f"{name}, more {grows}{'' if kept else ', recomputed'}")
            # Without an inner step there is nothing to recompute.
            sizes = [size for size in grid[name][axis] if size or kept]
            for size, following in zip(sizes, [*sizes[1:], 0], strict=True):
                workload = replace(WORKLOADS[name], **{axis: size})  # type: ignore[arg-type]
                checkpoint = None if kept else max(1, round(math.sqrt(size)))
                points.append(_measure(workload, axis, checkpoint, repeats, meter))
                if size and points[-1].peak_mib * following / size > most_mib:
                    break
    return points


def growth(points: Sequence[Point]) -> list[Growth]:
    """Return what every series of points comes to."""
    series = groupby(points, lambda point: point.series)
    return [_growth(list(of_one), points) for _, of_one in series]


def as_json_values(points: Sequence[Point], repeats: int, meter: Meter = ON_CPU) -> dict[str, Any]:
    """Return the points, and what they come to, with what they were measured on."""
    per_task = ("milliseconds_per_task", "mib_per_task")
    return {
        **surroundings(repeats, meter),
        "most_mib": MOST_MIB,
        "points": [
            {**asdict(point), **{name: getattr(point, name) for name in per_task}}
            for point in points
        ],
        "growth": [asdict(each) for each in growth(points)],
    }


def _growth(points: Sequence[Point], every: Sequence[Point]) -> Growth:
    first, last = points[0], points[-1]
    found = Growth(*first.series, first.size, last.size)
    if first.axis == "tasks":
        time = last.milliseconds_per_task / first.milliseconds_per_task
        memory = last.mib_per_task / first.mib_per_task
        return replace(found, time_per_task=time, memory_per_task=memory)
    whole = (first.workload, first.axis, False)
    kept = {point.size: point for point in every if point.series == whole}
    fixed = kept[0].milliseconds if 0 in kept else 0.0
    pairs = [(each.size, each.peak_mib) for each in kept.values() if each.size]
    intercept = linear_regression(*zip(*pairs, strict=True)).intercept if len(pairs) > 1 else 0.0
    grown = [point for point in points if point.size]
    both = [point for point in points if point.size in kept and found.recomputed]
    return replace(
        found,
        time_exponent=_exponent([(point.size, point.milliseconds - fixed) for point in grown]),
        memory_exponent=_exponent([(point.size, point.peak_mib - intercept) for point in grown]),
        times_as_long=both[-1].milliseconds / kept[both[-1].size].milliseconds if both else None,
    )


def _exponent(pairs: Sequence[tuple[int, float]]) -> float | None:
    if len(pairs) < 2 or min(added for _, added in pairs) <= 0:
        return None
    logarithms = ((math.log(size), math.log(added)) for size, added in pairs)
    return linear_regression(*zip(*logarithms, strict=True)).slope


def _measure(
    workload: Workload, axis: Axis, checkpoint_steps: int | None, repeats: int, meter: Meter
) -> Point:
    settings: dict[str, Any] = {"task_batching": "auto", "checkpoint_steps": checkpoint_steps}
    step = by_metaplug(*workload.build(meter.device), workload, **settings).step
    for _ in range(meter.warm_ups):
        step()
    costs = *median_and_spread([meter.timed(step) for _ in range(repeats)]), meter.memory(step)[0]
    steps = workload.inner_steps
    return Point(workload.name, axis, workload.tasks, steps, checkpoint_steps, *costs)
