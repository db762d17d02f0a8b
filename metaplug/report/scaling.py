"""How the cost of a step grows, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure

from metaplug.bench.scaling import Point
from metaplug.report.figures import COLOURS, DPI, WIDTH, save, style

_VALUES = {"milliseconds_per_task": "milliseconds per task", "mib_per_task": "MiB per task"}
_AXES = {"tasks": "tasks", "inner_steps": "inner steps"}


def scaling_figure(points: Sequence[Point], path: Path) -> None:
    """Time above, memory below; left against the tasks, right against the inner steps; a line for each workload, both scales logarithmic.

    Args:
        points: of one or more series, each in order.
        path: the PNG to write.
    """
    figure = Figure(figsize=(WIDTH, 5.6), dpi=DPI, layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    names = list(dict.fromkeys(point.workload for point in points))
    for row, (value, title) in enumerate(_VALUES.items()):
        for column, (axis, label) in enumerate(_AXES.items()):
            axes = grid[row, column]
            style(axes, label if row else "", "" if column else title)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
            for name, series in groupby((point for point in points if point.axis == axis), lambda point: point.workload):
                drawn = list(series)
                sizes, heights = [getattr(point, axis) for point in drawn], [getattr(point, value) for point in drawn]
                colour = COLOURS[1 + names.index(name)]
                axes.plot(sizes, heights, color=colour, linewidth=1.8, marker="o", markersize=4, label=_label(drawn[0]))
            axes.set_xticks(sorted({getattr(point, axis) for point in points if point.axis == axis}))
            axes.minorticks_off()
            if row == 0 and axes.lines:
                axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def _label(point: Point) -> str:
    """The model, and what stays the same along the line."""
    model = point.workload.rpartition("-")[0]
    return f"{model}, {point.inner_steps} inner steps" if point.axis == "tasks" else f"{model}, {point.tasks} tasks"
