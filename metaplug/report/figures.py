"""Curves as PNG pictures, and the style that all pictures share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metaplug.evaluation.curves import Curve, Point
from metaplug.evaluation.results import Metric
from metaplug.evaluation.scores import better
from metaplug.experiments.study.results import StudyResult, paired
from metaplug.files import replacing
from metaplug.report.terminal import scale_of

COLOURS = ("#4D4D4D", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, which colour-blind readers can tell apart; grey for the baseline."""

INK, GREY, FAINT = "#222222", "#666666", "#D9D9D9"
WIDTH, DPI = 7.5, 160
"""Inches and dots per inch: 1,200 pixels, legible at 900."""

MOST_GROUPS = 6
"""Kinds of plugins' figures that one picture shows."""


def study_figure(result: StudyResult, path: Path) -> None:
    """Draw every row's validation curve, and the acceleration of the fastest.

    A curve is the mean over seeds with its 95 % band; thin lines are the single seeds.
    """
    metric, seeds = result.metric, len(result.study.seeds)
    figure = Figure(figsize=(WIDTH, 4.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    style(axes, "meta-iterations", f"validation {_with_unit(metric)}")
    for index, row in enumerate(result.rows):
        colour = COLOURS[index % len(COLOURS)]
        for run in row.runs if seeds > 1 else ():
            _draw(axes, run.curve, metric, color=colour, linewidth=0.7, alpha=0.45)
        curve, name = row.mean_curve, _wrapped(row.label)
        _draw(axes, curve, metric, band=True, color=colour, linewidth=2.2, label=name, zorder=3)
    _draw_acceleration(axes, result)
    title = f"mean over {seeds} seeds (thin: each seed), its 95 % interval over tasks, "
    title = f"{title}and its acceleration" if seeds > 1 else "band: 95 % interval over tasks"
    axes.set_title(title, loc="left", fontsize=9, color=GREY)
    axes.legend(frameon=False, loc="lower right" if _rises(metric) else "upper right")
    save(figure, path)


def run_figure(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the curves of one run: outer loss, validation, and the plugins' figures.

    Args:
        metrics: the lines of metrics.jsonl, at least one.
        path: the PNG to write.
    """
    # With runtime.metrics_every, not every line has figures.
    fetched = [line for line in metrics if line["figures"]]
    groups = _grouped(fetched[-1]["figures"] if fetched else ())
    # The last plugins of the list are those that a user put after a preset's.
    shown = dict(list(groups.items())[-MOST_GROUPS:])
    count = 2 + len(shown)
    figure = Figure(figsize=(WIDTH, 0.4 + 2.1 * count), dpi=DPI, layout="constrained")
    grid = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]

    style(grid[0], "", "", "outer loss")
    finite = [line for line in metrics if line["outer_loss"] is not None]  # others were skipped
    iterations, losses = _column(finite, "iteration"), _column(finite, "outer_loss")
    grid[0].plot(iterations, losses, color=COLOURS[1], linewidth=0.6, alpha=0.35)
    grid[0].plot(iterations, _smoothed(losses), color=COLOURS[1], linewidth=1.8)

    validated = [line for line in metrics if line.get("validation", {}).get("mean") is not None]
    metric: Metric = validated[0]["validation"]["metric"] if validated else "accuracy"
    style(grid[1], "", "", f"validation {_with_unit(metric)}")
    curve = tuple(
        Point(line["iteration"], line["validation"]["mean"], line["validation"]["interval"])
        for line in validated
    )
    _draw(
        grid[1], curve, metric, band=True, color=COLOURS[2], linewidth=1.8, marker="o", markersize=3
    )
    for axes, (group, members) in zip(grid[2:], shown.items(), strict=True):
        style(axes, "", "", group)
        for index, name in enumerate(members, 1):
            having = [line for line in fetched if name in line["figures"]]
            values = [line["figures"][name] for line in having]
            colour, label = COLOURS[index % len(COLOURS)], name.rpartition("/")[2]
            axes.plot(
                _column(having, "iteration"), values, color=colour, linewidth=1.5, label=label
            )
        if 1 < len(members) <= 8:
            axes.legend(frameon=False, fontsize=8, ncols=len(members), loc="best")
    left = len(groups) - len(shown)
    more = f" ({left} more kinds of figures are in metrics.jsonl)" if left else ""
    grid[-1].set_xlabel(f"meta-iterations{more}", color=INK)
    save(figure, path)


def _column(lines: Iterable[Mapping[str, Any]], field: str) -> list[Any]:
    return [line[field] for line in lines]


def _grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Group figures that share axes: those that differ only after the slash, as gate/0, gate/1."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition("/")[0], []).append(name)
    return groups


def _smoothed(values: Sequence[float]) -> list[float]:
    """Average around each value over a window of about a thirtieth of the run."""
    half, sums = max(len(values) // 60, 1), [0.0, *accumulate(values)]
    windows = [
        (max(index - half, 0), min(index + half + 1, len(values))) for index in range(len(values))
    ]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in windows]


def _wrapped(label: str, width: int = 40) -> str:
    """Break a long variant into lines, before its plugins."""
    first, *rest = label.replace("$", r"\$").split("+")  # no formula of matplotlib's
    lines = [first]
    for part in rest:
        if len(f"{lines[-1]}+{part}") > width:
            lines.append("  ")
        lines[-1] += f"+{part}"
    return "\n".join(lines)


def _draw_acceleration(axes: Axes, result: StudyResult) -> None:
    """Draw the baseline's best value, and an arrow to where the fastest row reaches it."""
    baselines = [row for row in result.rows if result.is_baseline(row)]
    if len(baselines) != 1:
        return  # each setting has a target of its own
    over, metric = baselines[0], result.metric
    own = result.acceleration_of_means(over, over)
    assert own is not None
    [target], [start] = own.targets, own.baseline
    level = scale_of(metric)[0] * target
    axes.axhline(level, color="#888888", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    near = partial(axes.annotate, textcoords="offset points")
    text = f"best of {over.label}" if result.study.target is None else "target"
    place, text = axes.get_yaxis_transform(), text.replace("$", r"\$")
    near(text, (0, level), (4, 4), xycoords=place, fontsize=8, color=GREY)
    means = {  # the mean curves that are drawn, so of the same seeds and at the same setting
        index: found
        for index, row in enumerate(result.rows)
        if row.seeds == over.seeds
        and len(paired(over, row)) == len(row.seeds)
        and result.baseline_of(row) is over
        and (found := result.acceleration_of_means(row, over)) is not None
    }
    faster = {
        index: point.iteration
        for index, found in means.items()
        if (point := found.reached[0]) is not None and (found.percent[0] or 0) > 0
    }
    if not faster or start is None:
        return
    index = min(faster, key=lambda each: faster[each])
    end, percent, colour = faster[index], means[index].percent[0], COLOURS[index % len(COLOURS)]
    arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6}
    axes.annotate("", xy=(end, level), xytext=(start.iteration, level), arrowprops=arrow, zorder=4)
    axes.plot([start.iteration, end], [level] * 2, "o", markersize=4.5, color=colour, zorder=5)
    text, shift = f"{percent:+.0f} % faster", (6, -12 if _rises(metric) else 12)
    bold = partial(near, va="center", fontsize=9, fontweight="bold", color=colour, zorder=6)
    bold(text, (end, level), shift)


def _draw(axes: Axes, curve: Curve, metric: Metric, *, band: bool = False, **drawn: Any) -> None:
    """Draw the means of a curve, and their intervals as a band."""
    scale, iterations = scale_of(metric)[0], [point.iteration for point in curve]
    axes.plot(iterations, [scale * point.mean for point in curve], **drawn)
    if band:
        low = [scale * (point.mean - point.interval) for point in curve]
        high = [scale * (point.mean + point.interval) for point in curve]
        axes.fill_between(iterations, low, high, color=drawn["color"], alpha=0.15, linewidth=0)


def style(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Set labels, and the quiet lines and ticks that all pictures have."""
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(colors="#444444", labelsize=9)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _with_unit(metric: Metric) -> str:
    return f"{metric}{' (%)' if scale_of(metric)[2] else ''}"


def _rises(metric: Metric) -> bool:
    return better(metric, 1, 0)


def save(figure: Figure, path: Path) -> None:
    """Write the picture as PNG, whole or not at all."""
    with replacing(path) as file:
        figure.savefig(file, format="png", facecolor="white")
