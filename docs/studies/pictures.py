"""The pictures of a study of one axis: every base beside what extends it, a panel for each base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metaplug.evaluation.curves import best_point
from metaplug.experiments.study import Row, StudyResult
from metaplug.report.figures import COLOURS, DPI, GREY, INK, WIDTH, save, style
from metaplug.report.terminal import scale_of

Family = tuple[str, tuple[str, ...]]
"""A variant that extends none, and all that extend it, itself the first."""


def families(result: StudyResult) -> list[Family]:
    """The variants that have rows, each with the one from which it comes."""
    base = {
        row.variant: None if (over := result.base_of(row)) is None else over.variant
        for row in result.rows
    }
    firsts: dict[str, list[str]] = {}
    for variant in base:
        first = variant
        while (over := base.get(first)) is not None:
            first = over
        firsts.setdefault(first, []).append(variant)
    return [(first, tuple(members)) for first, members in firsts.items()]


def draw_rates(result: StudyResult, path: Path) -> None:
    """Draw the test over the values of the axis, with 95 % intervals over tasks."""
    [axis] = result.study.axes

    def draw(axes: Axes, rows: Sequence[Row], look: int) -> None:
        scale = scale_of(result.metric)[0]
        axes.errorbar(
            [row.setting[axis] for row in rows],
            [scale * row.test.mean for row in rows],
            [scale * row.test.interval for row in rows],
            **_look(look),
            marker="o",
            markersize=4,
            capsize=3,
        )
        axes.set_xscale("log")
        values = [float(value) for value in result.study.axes[axis]]
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()

    label = axis.rpartition(".")[2].replace("_", " ").replace("lr", "learning rate")
    _panels(result, path, result.rows, (label, f"test {_with_unit(result)}"), draw)


def draw_curves(result: StudyResult, path: Path) -> None:
    """Draw the validations of each variant at its best setting; thin lines are the seeds."""
    [best] = result.best_rows()
    scale = scale_of(result.metric)[0]
    base = result.baseline_among(best)
    shifts = _shifts(result, best)

    def draw(axes: Axes, rows: Sequence[Row], look: int) -> None:
        for row in rows:
            for run in row.runs if row.seeds[1:] else ():
                places = [point.iteration for point in run.curve]
                heights = [scale * point.mean for point in run.curve]
                axes.plot(places, heights, color=COLOURS[look], linewidth=0.7, alpha=0.45)
            curve = row.mean_curve
            places = [point.iteration for point in curve]
            axes.plot(places, [scale * point.mean for point in curve], **_look(look))
            [value] = row.setting.values()
            axes.annotate(
                f"{value:g}",
                (places[-1], scale * curve[-1].mean),
                (4, shifts[row.variant]),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=COLOURS[look],
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )
        if base is not None:
            level = scale * best_point(result.metric, base.mean_curve).mean
            axes.axhline(level, color="#888888", linewidth=1, linestyle=(0, (4, 3)), zorder=1)

    labels = ("meta-iterations", f"validation {_with_unit(result)}")
    note = "at the end of a line: the rate that validated best"
    note += f"; dashed: the best that {base.variant} reaches" if base is not None else ""
    _panels(result, path, best, labels, draw, note=note)


def _shifts(result: StudyResult, rows: Sequence[Row]) -> dict[str, float]:
    """By variant, the height in points at which its rate stands, so that none hides another."""
    ends = {row.variant: row.mean_curve[-1].mean for row in rows}
    return {
        variant: 10 * (place - (len(members) - 1) / 2)
        for _, members in families(result)
        for place, variant in enumerate(sorted(members, key=ends.__getitem__))
    }


def _panels(
    result: StudyResult,
    path: Path,
    rows: Sequence[Row],
    labels: tuple[str, str],
    draw: Callable[[Axes, Sequence[Row], int], None],
    *,
    note: str = "bars: 95 % intervals over test tasks",
) -> None:
    """Draw every family in a panel of its own, all with the same height."""
    known = families(result)
    figure = Figure(figsize=(WIDTH, 3.1), dpi=DPI, layout="constrained")
    grid = figure.subplots(1, len(known), sharey=True, squeeze=False)[0]
    names: dict[str, int] = {}
    for axes, (first, members) in zip(grid, known, strict=True):
        style(axes, labels[0], labels[1] if axes is grid[0] else "", first)
        for look, variant in enumerate(members):
            name = variant.removeprefix(first).replace("+", "with ") or "alone"
            names.setdefault(name, look)
            draw(axes, [row for row in rows if row.variant == variant], look)
    handles = [grid[0].plot([], [], **_look(look))[0] for look in names.values()]
    figure.legend(
        handles, list(names), frameon=False, loc="outside upper left", ncols=len(names), fontsize=9
    )
    seeds = max(len(row.seeds) for row in rows)
    means = "one seed" if seeds == 1 else f"means over {seeds} seeds"
    figure.supxlabel(f"{means}; {note}", fontsize=8, color=GREY, x=0.01, ha="left")
    for text in figure.legends[0].get_texts():
        text.set_color(INK)
    save(figure, path)


def _look(look: int) -> dict[str, str | float]:
    return {"color": COLOURS[look], "linewidth": 2.0, "zorder": 3.0 + look}


def _with_unit(result: StudyResult) -> str:
    return f"{result.metric}{' (%)' if scale_of(result.metric)[2] else ''}"
