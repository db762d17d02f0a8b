"""How the cost of a step grows, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

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
_SIZE, _TEXT = (10.0, 6.4), 8.5
"""Inches: 1,600 × 1,024 pixels; and points of the labels."""

_APART = 0.16
"""The least distance of two names, in parts of the height of the axes."""

_End = tuple[float, str, str]
"""Where a line ends, its name, its colour."""


def scaling_figure(points: Sequence[Point], path: Path) -> None:
    """Time above, memory below; left against the tasks, right against the inner steps, all scales logarithmic, without the step of no inner
    step. A line for each series, dashed where steps are computed again, with its name and what it comes to at its end.

    Args:
        points: of one or more series, each in order.
        path: the PNG to write.
    """
    figure = Figure(figsize=_SIZE, dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    names = list(dict.fromkeys(point.workload for point in points))
    found = {each.series: each for each in growth(points)}
    ends: dict[Axes, list[_End]] = {axes: [] for axes in grid.flat}
    for row, (value, title) in enumerate(_VALUES.items()):
        for column, (axis, label) in enumerate(_AXES.items()):
            axes = grid[row, column]
            style(axes, label if row else "", "", "" if column else title)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
            shown = [point for point in points if point.axis == axis and point.size]
            for series, group in groupby(shown, lambda point: point.series):
                drawn = list(group)
                sizes, heights = (
                    [point.size for point in drawn],
                    [getattr(point, value) for point in drawn],
                )
                colour = COLOURS[1 + names.index(series.workload)]
                dashes = (
                    {"linestyle": (0, (4, 2)), "markerfacecolor": "white"}
                    if series.recomputed
                    else {}
                )
                axes.plot(
                    sizes,
                    heights,
                    color=colour,
                    linewidth=1.8,
                    marker="o",
                    markersize=4.5,
                    **dashes,
                )
                ends[axes].append(
                    (heights[-1], _label(drawn[-1], found[series], memory=bool(row)), colour)
                )
            axes.set_xticks(sorted({point.size for point in shown}))
            axes.minorticks_off()
            grid[row, column].ends = ends
    for axes, named in ends.items():  # when all lines are there, which share their scales
        _name(axes, named)
    save(figure, path)


def _label(last: Point, found: Growth, *, memory: bool) -> str:
    """The model and what its steps do, and below what stays the same along the line and what the line comes to."""
    model = last.workload.rpartition("-")[0]
    if last.axis == "tasks":
        ratio = found.memory_per_task if memory else found.time_per_task
        return f"{model}, {last.inner_steps} inner steps\n{last.tasks} tasks: {ratio:.2f}× of {found.smallest}"
    exponent = found.memory_exponent if memory else found.time_exponent
    grows = "" if exponent is None else f": $K^{{{exponent:.2f}}}$"
    longer = (
        "" if memory or found.times_as_long is None else f", {found.times_as_long:.2f}× the time"
    )
    return f"{model}{', recomputed' if last.series.recomputed else ''}\n{last.tasks} tasks{grows}{longer}"


def _name(axes: Axes, ends: Sequence[_End]) -> None:
    """Write each line's name to the right of its end, moved up or down where two would meet."""
    bottom, top = (math.log(limit) for limit in axes.get_ylim())
    ordered = sorted(ends)
    places = [(math.log(height) - bottom) / (top - bottom) for height, _, _ in ordered]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + _APART)
    room = 1.0
    for index in reversed(range(len(places))):
        places[index] = min(places[index], room)
        room = places[index] - _APART
    for place, (_, label, colour) in zip(places, ordered, strict=True):
        axes.annotate(
            label,
            (1, place),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            fontsize=_TEXT,
            color=colour,
            va="center",
        )
