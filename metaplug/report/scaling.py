"""How the cost of a step grows, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from metaplug.bench.scaling import Growth, Point, growth
from metaplug.report.figures import COLOURS, DPI, save, style

_VALUES = {"milliseconds_per_task": "milliseconds per task", "mib_per_task": "peak MiB per task"}
_AXES = {
    "tasks": "tasks of a meta-batch",
    "inner_steps": "inner steps $K$; $K^e$: what they add to the fixed cost of a step",
}
_APART = 0.16
"""The least distance of two names, in parts of the height of the axes."""


def scaling_figure(points: Sequence[Point], path: Path) -> None:
    """Draw time above and memory below, against tasks and against inner steps, on log scales.

    A line for each series has its name and what it comes to at its end; recomputed ones are dashed.

    Args:
        points: of one or more series, each in order.
        path: the PNG to write.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(10.0, 6.4), dpi=DPI, layout=layout)
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    names = list(dict.fromkeys(point.workload for point in points))
    found = {(each.workload, each.axis, each.recomputed): each for each in growth(points)}
    ends: dict[Axes, list[tuple[float, str, str]]] = {axes: [] for axes in grid.flat}
    panels = [(row, value, *each) for row, value in enumerate(_VALUES) for each in enumerate(_AXES)]
    for row, value, column, axis in panels:
        axes = grid[row, column]
        style(axes, _AXES[axis] if row else "", "", "" if column else _VALUES[value])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        shown = [point for point in points if point.axis == axis and point.size]
        for series, group in groupby(shown, lambda point: point.series):
            drawn, of_series = list(group), found[series]
            colour = COLOURS[1 + names.index(of_series.workload)]
            look: dict[str, Any] = {"color": colour, "linewidth": 1.8, "marker": "o"}
            if of_series.recomputed:
                look |= {"linestyle": (0, (4, 2)), "markerfacecolor": "white"}
            heights = [getattr(point, value) for point in drawn]
            axes.plot([point.size for point in drawn], heights, markersize=4.5, **look)
            ends[axes].append((heights[-1], _label(drawn[-1], of_series, memory=bool(row)), colour))
        axes.set_xticks(sorted({point.size for point in shown}))
        axes.minorticks_off()
    for axes, named in ends.items():  # once all lines are there: they share their scales
        _name(axes, named)
    save(figure, path)


def _label(last: Point, found: Growth, *, memory: bool) -> str:
    """Return the model and its steps, and below what stays the same and what the line comes to."""
    model = last.workload.rpartition("-")[0]
    if last.axis == "tasks":
        ratio = found.memory_per_task if memory else found.time_per_task
        steps = f"{last.inner_steps} inner steps"
        return f"{model}, {steps}\n{last.tasks} tasks: {ratio:.2f}× of {found.smallest}"
    exponent = found.memory_exponent if memory else found.time_exponent
    grows = "" if exponent is None else f": $K^{{{exponent:.2f}}}$"
    longer = found.times_as_long
    if longer is not None and not memory:
        grows += f", {longer:.2f}× the time"
    return f"{model}{', recomputed' * found.recomputed}\n{last.tasks} tasks{grows}"


def _name(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write each line's name at the right of its end, moved up or down where two would meet."""
    bottom, top = (math.log(limit) for limit in axes.get_ylim())
    ordered = sorted(ends)
    places = [(math.log(height) - bottom) / (top - bottom) for height, _, _ in ordered]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + _APART)
    room = 1.0
    for index in reversed(range(len(places))):
        places[index] = min(places[index], room)
        room = places[index] - _APART
    look: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    for place, (_, label, colour) in zip(places, ordered, strict=True):
        at: dict[str, Any] = {"xy": (1, place), "xytext": (6, 0)}
        axes.annotate(label, **at, fontsize=8.5, color=colour, va="center", **look)
