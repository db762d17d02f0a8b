"""How the cost of a metaplug step grows, with the tasks and with the inner steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from metaplug.bench.contestants import by_metaplug
from metaplug.bench.measuring import spread, surroundings, timed, torch_memory
from metaplug.bench.workloads import WORKLOADS, Workload

Axis = Literal["tasks", "inner_steps"]

GRID: Mapping[str, Mapping[Axis, Sequence[int]]] = {
    "sinusoid-25x5": {"tasks": (8, 16, 32, 64, 128, 256), "inner_steps": (1, 2, 5, 10, 20)},
    "conv4-32-stride-32x3": {"tasks": (8, 16, 32, 64, 128, 256), "inner_steps": (1, 2, 5, 10, 20)},
}
"""By workload, what grows from it, and to what; the rest stays as its name says."""

MOST_MIB = 1024.0
"""A series ends before the step that would hold more of torch's memory, MiB; what it holds grows in proportion."""


@dataclass(frozen=True)
class Point:
    """One step of one size.

    Attributes:
        axis: what grows in the series that it belongs to.
        milliseconds, spread: median over the repeats, and half the distance of the quartiles.
        peak_mib: the most that torch's allocator holds in the course of the step, MiB.
        milliseconds_per_task, mib_per_task: the same for each task.
    """

    workload: str
    axis: Axis
    tasks: int
    inner_steps: int
    milliseconds: float
    spread: float
    peak_mib: float
    milliseconds_per_task: float
    mib_per_task: float


def run(
    *,
    repeats: int,
    grid: Mapping[str, Mapping[Axis, Sequence[int]]] = GRID,
    most_mib: float = MOST_MIB,
    on_series: Callable[[str, Axis], None] = lambda *_: None,
) -> list[Point]:
    """Measure every series, batching as "auto" chooses, each from its smallest step to its largest or to `most_mib`."""
    points = []
    for name, axes in grid.items():
        for axis, values in axes.items():
            on_series(name, axis)
            for value, following in zip(values, [*values[1:], 0], strict=True):
                base = WORKLOADS[name]
                workload = replace(base, tasks=value) if axis == "tasks" else replace(base, inner_steps=value)
                points.append(_measure(workload, axis, repeats))
                if points[-1].peak_mib * following / value > most_mib:
                    break
    return points


def as_json_values(points: Sequence[Point], repeats: int) -> dict[str, Any]:
    """The points with what they were measured on."""
    return {**surroundings(repeats), "most_mib": MOST_MIB, "points": [vars(point) for point in points]}


def _measure(workload: Workload, axis: Axis, repeats: int) -> Point:
    step = by_metaplug(*workload.build(), workload, batching="auto").step
    step()  # warms up
    taken = [timed(step) for _ in range(repeats)]
    median, peak = statistics.median(taken), torch_memory(step)[0]
    tasks = workload.tasks
    return Point(workload.name, axis, tasks, workload.inner_steps, median, spread(taken), peak, median / tasks, peak / tasks)
