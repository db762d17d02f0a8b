"""Curves as PNG pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metaplug.evaluation.results import Metric
from metaplug.experiments.comparison import Comparison, Curve
from metaplug.files import replacing

COLOURS = ("#4D4D4D", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, which colour-blind readers can tell apart; grey for the baseline."""

INK, FAINT = "#222222", "#D9D9D9"
WIDTH, DPI = 7.5, 160
"""Inches and dots per inch: 1,200 pixels, legible at 900."""

MOST_GROUPS = 6
"""Kinds of plugins' figures that one picture shows."""


def comparison_figure(comparison: Comparison, path: Path) -> None:
    """Validation curves of every variant: the mean over seeds with its 95 % band, each seed thin behind it, and the acceleration."""
    figure = Figure(figsize=(WIDTH, 4.6), dpi=DPI, layout="constrained")
    axes = _axes(figure, "meta-iterations", f"validation {comparison.metric}", comparison.metric)
    for index, variant in enumerate(comparison.variants):
        colour, label = COLOURS[index % len(COLOURS)], variant.label
        if len(comparison.seeds) > 1:
            for run in comparison.runs[label]:
                _line(axes, run.curve, comparison.metric, color=colour, linewidth=0.7, alpha=0.45)
        curve = comparison.mean_curve(label)
        _line(
            axes,
            curve,
            comparison.metric,
            color=colour,
            linewidth=2.2,
            label=_wrapped(label),
            zorder=3,
        )
        _band(axes, curve, comparison.metric, colour)
    _target(axes, comparison)
    seeds = len(comparison.seeds)
    axes.set_title(
        f"mean over {seeds} seeds (thin: each seed), its 95 % interval over tasks, and its acceleration"
        if seeds > 1
        else "band: 95 % interval over tasks",
        loc="left",
        fontsize=9,
        color="#666666",
    )
    axes.legend(
        frameon=False, loc="lower right" if comparison.metric == "accuracy" else "upper right"
    )
    save(figure, path)


def run_figure(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The curves of one run: outer loss, validation, and the plugins' figures where they have any.

    Args:
        metrics: the lines of metrics.jsonl, at least one.
    """
    fetched = [
        line for line in metrics if line["figures"]
    ]  # with runtime.metrics_every, not every line
    groups = _grouped(fetched[-1]["figures"] if fetched else ())
    # The last plugins of the list are those that a user put behind a preset's.
    names = {group: groups[group] for group in groups if group in list(groups)[-MOST_GROUPS:]}
    count = 2 + len(names)
    figure = Figure(figsize=(WIDTH, 0.4 + 2.1 * count), dpi=DPI, layout="constrained")
    grid = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    style(grid[0], "", "", "outer loss")
    finite = [
        (line["iteration"], line["outer_loss"])
        for line in metrics
        if line["outer_loss"] is not None
    ]  # others were skipped
    iterations, losses = [iteration for iteration, _ in finite], [loss for _, loss in finite]
    grid[0].plot(iterations, losses, color=COLOURS[1], linewidth=0.6, alpha=0.35)
    grid[0].plot(iterations, _smoothed(losses), color=COLOURS[1], linewidth=1.8)
    validated = [line for line in metrics if line.get("validation", {}).get("mean") is not None]
    metric: Metric = validated[0]["validation"]["metric"] if validated else "accuracy"
    style(grid[1], "", "", f"validation {_unit(metric)}")
    points = [
        (line["iteration"], line["validation"]["mean"], line["validation"]["interval"])
        for line in validated
    ]
    scale = _scale(metric)
    grid[1].plot(
        [i for i, _, _ in points],
        [scale * mean for _, mean, _ in points],
        color=COLOURS[2],
        linewidth=1.8,
        marker="o",
        markersize=3,
    )
    grid[1].fill_between(
        [i for i, _, _ in points],
        [scale * (mean - half) for _, mean, half in points],
        [scale * (mean + half) for _, mean, half in points],
        color=COLOURS[2],
        alpha=0.15,
        linewidth=0,
    )
    for axes, (group, members) in zip(grid[2:], names.items(), strict=True):
        style(axes, "", "", group)
        for index, name in enumerate(members):
            having = [line for line in fetched if name in line["figures"]]
            values = [line["figures"][name] for line in having]
            iterations, colour = (
                [line["iteration"] for line in having],
                COLOURS[(index + 1) % len(COLOURS)],
            )
            axes.plot(
                iterations, values, color=colour, linewidth=1.5, label=name.rpartition("/")[2]
            )
        if 1 < len(members) <= 8:
            axes.legend(frameon=False, fontsize=8, ncols=len(members), loc="best")
    more = (
        f" ({len(groups) - len(names)} more kinds of figures are in metrics.jsonl)"
        if len(groups) > len(names)
        else ""
    )
    grid[-1].set_xlabel(f"meta-iterations{more}", color=INK)
    save(figure, path)


def _grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Figures that differ only behind the last slash share a picture: gate/0, gate/1."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition("/")[0], []).append(name)
    return groups


def _smoothed(values: Sequence[float]) -> list[float]:
    """The mean over a window of about a thirtieth of the run around each value."""
    half, last = max(len(values) // 60, 1), len(values) - 1
    sums = [0.0, *accumulate(values)]
    windows = [(max(index - half, 0), min(index + half, last) + 1) for index in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in windows]


def _wrapped(label: str, width: int = 40) -> str:
    """A long variant in lines, broken before its plugins."""
    lines = [""]
    for index, part in enumerate(label.split("+")):
        piece = part if index == 0 else f"+{part}"
        if lines[-1] and len(lines[-1] + piece) > width:
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(lines)


def _target(axes: Axes, comparison: Comparison) -> None:
    """The baseline's best value as a line, and an arrow from where the baseline reaches it to where the fastest variant does."""
    means = {
        variant.label: comparison.acceleration_of_means(variant.label)
        for variant in comparison.variants
    }
    base = means[comparison.baseline]
    target, begin = _scale(comparison.metric) * base.targets[0], base.baseline_iterations[0]
    axes.axhline(target, color="#888888", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"best of {comparison.baseline}",
        (0, target),
        xycoords=("axes fraction", "data"),
        xytext=(4, 4),
        textcoords="offset points",
        fontsize=8,
        color="#666666",
    )
    faster = {label: found for label, found in means.items() if (found.percent[0] or 0) > 0}
    if not faster:
        return
    label = min(faster, key=lambda name: faster[name].iterations[0] or 0)
    end, percent = faster[label].iterations[0] or 0, faster[label].percent[0]
    colour = COLOURS[[variant.label for variant in comparison.variants].index(label) % len(COLOURS)]
    axes.annotate(
        "",
        xy=(end, target),
        xytext=(begin, target),
        arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.6},
        zorder=4,
    )
    for x in (begin, end):
        axes.plot([x], [target], marker="o", markersize=4.5, color=colour, zorder=5)
    axes.annotate(
        f"{percent:+.0f} % faster",
        (end, target),
        xytext=(6, -12 if comparison.metric == "accuracy" else 12),
        textcoords="offset points",
        ha="left",
        va="center",
        fontsize=9,
        fontweight="bold",
        color=colour,
        zorder=6,
    )


def _axes(figure: Figure, x: str, y: str, metric: Metric) -> Axes:
    axes = figure.subplots()
    style(axes, x, y.replace(metric, _unit(metric)))
    return axes


def style(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Labels, and quiet lines and ticks, as all pictures have them."""
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(colors="#444444", labelsize=9)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _line(axes: Axes, curve: Curve, metric: Metric, **style: Any) -> None:
    axes.plot(
        [point.iteration for point in curve],
        [_scale(metric) * point.mean for point in curve],
        **style,
    )


def _band(axes: Axes, curve: Curve, metric: Metric, colour: str) -> None:
    scale = _scale(metric)
    low = [scale * (point.mean - point.interval) for point in curve]
    high = [scale * (point.mean + point.interval) for point in curve]
    axes.fill_between(
        [point.iteration for point in curve], low, high, color=colour, alpha=0.15, linewidth=0
    )


def _scale(metric: Metric) -> float:
    return 100 if metric == "accuracy" else 1


def _unit(metric: Metric) -> str:
    return "accuracy (%)" if metric == "accuracy" else metric


def save(figure: Figure, path: Path) -> None:
    """Write the picture as PNG, whole or not at all."""
    with replacing(path) as file:
        figure.savefig(file, format="png", facecolor="white")
