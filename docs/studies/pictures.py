"""The pictures of a study: what its variants gain, and every base beside what extends it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from metaplug.evaluation.curves import best_point
from metaplug.experiments.study import Row, StudyResult
from metaplug.experiments.study.cells import row_text, setting_text
from metaplug.experiments.study.tuned import comparisons
from metaplug.report.figures import COLOURS, DPI, FAINT, GREY, INK, WIDTH, save, style
from metaplug.report.terminal import scale_of

Family = tuple[str, tuple[str, ...]]
"""A variant that extends none, and all that extend it, itself the first; the baseline's has those
too that neither extend nor are extended."""

_ACROSS, _LETTERS, _NAME, _SPARED = 4, 125, 50, 8
"""At most beside each other: panels, and letters of a caption and of a row's name; and the letters
that a panel's title has less than its share of a caption."""


def stems(text: str) -> str:
    """The text with the files in it named by their stems.

    >>> stems("splits docs/studies/splits/one_alphabet.json, inner_lr 0.1")
    'splits one_alphabet, inner_lr 0.1'
    """
    return re.sub(r"[\w./-]*/(\w+)\.json", r"\1", text)


def apart(result: StudyResult, row: Row) -> Mapping[str, Any]:
    """The values of a row beside that of the first tuned axis."""
    return {path: value for path, value in row.setting.items() if path != result.tuned[0]}


def groups(result: StudyResult) -> list[list[Row]]:
    """The rows, by the values of all axes but the first tuned one."""
    found: dict[str, list[Row]] = {}
    for row in result.rows:
        found.setdefault(repr(apart(result, row)), []).append(row)
    return list(found.values())


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
    if result.baseline in firsts:
        for lonely in [each for each, of in firsts.items() if len(of) == 1]:
            if lonely != result.baseline:
                firsts[result.baseline] += firsts.pop(lonely)
    return [(first, tuple(members)) for first, members in firsts.items()]


def draw_gains(result: StudyResult, path: Path) -> None:
    """Draw each best row's test minus that of its base, or of the baseline where it has none."""
    scale, _, unit = scale_of(result.metric)
    shown = []
    for rows in result.best_rows():
        found = comparisons(result, rows)
        for label, each in {**found.with_baseline, **found.with_base}.items():
            if each.difference is not None:
                over = "" if label in found.with_base else f" (minus {each.over.variant})"
                name = stems(row_text(each.row.variant, apart(result, each.row)))
                lines = fill(f"{name}{over}", _NAME, break_on_hyphens=False)
                shown.append((lines, each.by_seed, each.difference))
    most = max((name.count("\n") + 1 for name, *_ in shown), default=1)
    height = 0.8 + (0.22 + 0.2 * most) * max(len(shown), 1)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    style(axes, f"minus its base, test {result.metric}{' (points)' if unit else ''}", "")
    axes.axvline(0, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for place, (_, by_seed, difference) in enumerate(shown):
        mean, interval = scale * difference.mean, scale * difference.interval
        is_clear = abs(mean) > interval and all(seed * mean > 0 for seed in by_seed)
        colour = COLOURS[0 if not is_clear else 3 if mean > 0 else 2]
        strokes = [scale * seed for seed in by_seed]
        axes.plot(strokes, [place] * len(strokes), "|", color=colour, markersize=9, alpha=0.6)
        axes.errorbar(
            [mean], [place], xerr=[interval], color=colour, marker="o", markersize=5, capsize=3
        )
    axes.set_yticks(range(len(shown)), [name for name, *_ in shown])
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    _caption(
        figure,
        "each at its best setting; bars: 95 % intervals over test tasks; strokes: single seeds; "
        "grey: the interval holds 0, or seeds disagree",
    )
    save(figure, path)


def draw_rates(result: StudyResult, path: Path) -> None:
    """Draw the test over the values of the tuned axis, with 95 % intervals over tasks."""
    axis = result.tuned[0]

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
        values = [float(value) for value in result.study.axes[axis]]
        beside = (max(values) / min(values)) ** 0.05  # the same room in panels with fewer values
        axes.set_xlim(min(values) / beside, max(values) * beside)
        axes.set_xscale("log")
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()

    label = axis.rpartition(".")[2].replace("_", " ").replace("lr", "learning rate")
    _panels(result, path, groups(result), (label, f"test {_with_unit(result)}"), draw)


def draw_curves(result: StudyResult, path: Path) -> None:
    """Draw the validations of each variant at its best setting; thin lines are the seeds."""
    best = result.best_rows()
    scale = scale_of(result.metric)[0]
    shifts = {row.label: shift for rows in best for row, shift in _shifts(result, rows)}

    def draw(axes: Axes, rows: Sequence[Row], look: int) -> None:
        for row in rows:
            for run in row.runs if row.seeds[1:] else ():
                places = [point.iteration for point in run.curve]
                heights = [scale * point.mean for point in run.curve]
                axes.plot(places, heights, color=COLOURS[look], linewidth=0.7, alpha=0.45)
            curve = row.mean_curve
            places = [point.iteration for point in curve]
            axes.plot(places, [scale * point.mean for point in curve], **_look(look))
            axes.annotate(
                ", ".join(f"{row.setting[path]:g}" for path in result.tuned),
                (places[-1], scale * curve[-1].mean),
                (4, shifts[row.label]),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=COLOURS[look],
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )
            if look == 0:
                level = scale * best_point(result.metric, curve).mean
                axes.axhline(level, color="#888888", linewidth=1, linestyle=(0, (4, 3)), zorder=1)

    labels = ("meta-iterations", f"validation {_with_unit(result)}")
    names = " and ".join(path.rpartition(".")[2] for path in result.tuned)
    note = (
        f"at the end of a line: the {names} that validated best; dashed: the best that the first "
    )
    _panels(result, path, best, labels, draw, note=f"{note}of a panel reaches")


def _shifts(result: StudyResult, rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """The height in points at which a row's rate stands, so that none hides another."""
    placed = []
    for _, members in families(result):
        those = sorted(
            (row for row in rows if row.variant in members),
            key=lambda row: row.mean_curve[-1].mean,
        )
        placed += [(row, 10 * (place - (len(those) - 1) / 2)) for place, row in enumerate(those)]
    return placed


def _panels(
    result: StudyResult,
    path: Path,
    parts: Sequence[Sequence[Row]],
    labels: tuple[str, str],
    draw: Callable[[Axes, Sequence[Row], int], None],
    *,
    note: str = "bars: 95 % intervals over test tasks",
) -> None:
    """Draw every family of every group in a panel of its own, all with the same height."""
    known = [(rows, *family) for rows in parts for family in families(result)]
    across = min(len(known), _ACROSS)
    down = -(-len(known) // across)
    figure = Figure(figsize=(WIDTH, 1), dpi=DPI, layout="constrained")
    grid = figure.subplots(down, across, sharey=True, squeeze=False).flat
    names: dict[str, int] = {}
    for place, (axes, panel) in enumerate(zip_longest(grid, known)):
        if panel is None:
            axes.set_axis_off()
            continue
        rows, first, members = panel
        own = {
            path: value
            for path, value in apart(result, rows[0]).items()
            if any(other[0].setting.get(path) != value for other in parts)
        }
        names_it = not own or len(known) > len(parts)
        title = stems(row_text(first, own) if names_it else setting_text(own))
        is_lowest = place + across >= len(known)
        title = fill(title, _LETTERS // across - _SPARED)
        style(axes, labels[0] * is_lowest, labels[1] * (place % across == 0), title)
        for look, variant in enumerate(members):
            name = re.sub("^[+:]", "with ", variant.removeprefix(first)) or "alone"
            names.setdefault(name, look)
            draw(axes, [row for row in rows if row.variant == variant], look)
    handles = [Line2D([], [], **_look(look)) for look in names.values()]  # type: ignore[arg-type]
    columns = max(1, _LETTERS // (max(map(len, names)) + 12))
    titles = max(axes.get_title(loc="left").count("\n") for axes in figure.axes)
    figure.set_figheight(0.4 + (2.5 + 0.2 * titles) * down + 0.22 * -(-len(names) // columns))
    figure.legend(
        handles, list(names), frameon=False, loc="outside upper left", ncols=columns, fontsize=9
    )
    counts = {len(row.seeds) for row in result.rows}
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    means = "one seed" if seeds == "1" else f"means over {seeds} seeds"
    _caption(figure, f"{means}; {note}")
    for text in figure.legends[0].get_texts():
        text.set_color(INK)
    save(figure, path)


def _caption(figure: Figure, text: str) -> None:
    figure.supxlabel(fill(text, _LETTERS), fontsize=8, color=GREY, x=0.01, ha="left")


def _look(look: int) -> dict[str, str | float]:
    return {"color": COLOURS[look], "linewidth": 2.0, "zorder": 3.0 + look}


def _with_unit(result: StudyResult) -> str:
    return f"{result.metric}{' (%)' if scale_of(result.metric)[2] else ''}"
