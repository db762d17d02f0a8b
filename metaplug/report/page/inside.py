"""Inside of training: what plugins log, and what happens from inner step to inner step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, Literal

from metaplug.experiments.study.results import Row
from metaplug.report.page.chosen import compared, flat
from metaplug.report.page.curves import keys
from metaplug.report.page.gather import Material
from metaplug.report.page.panels import (
    Group,
    Key,
    Line,
    Panel,
    Points,
    Section,
    averaged,
    finite,
    thinned,
)

_MOST_LINES, _MOST_PANELS = 7, 12
_LOSS_POINTS = 40
"""At most, of an outer loss: means over stretches of ten iterations or more, as one is noise."""

Lines = Sequence[Mapping[str, Any]]
_Run = tuple[str, int, Lines]
"""The label, the look and the metrics of one run."""


def over_training(material: Material) -> Section | None:
    """The outer loss, and the figures that plugins log, over the iterations."""
    shown = _shown(material)
    loss = _loss_panel(shown)
    groups = [Group("Outer loss", (loss,), keys(material))] if loss else []
    panels: list[Panel] = []
    for label, of_row in shown.items():
        panels += _figure_panels(label, [lines for _, _, lines in of_row])
    if panels:
        groups.append(Group("What plugins learn and log", tuple(panels[:_MOST_PANELS])))
    if not groups:
        return None
    texts = [_whose(material)]
    if panels:
        texts.append(
            "Figures of plugins have a line for each inner step, whose number stands at its end, "
            "or for each part of the model; the mean over seeds."
        )
    if len(panels) > _MOST_PANELS:
        texts.append(f"{len(panels) - _MOST_PANELS} more kinds are in metrics.jsonl.")
    return Section("training", "Over training", (" ".join(filter(None, texts)),), tuple(groups))


def by_inner_step(material: Material) -> Section:
    """Losses, gradients and rates from inner step to inner step, early and late in training."""
    known: dict[str, _Known] = {}
    for label, of_row in _shown(material).items():
        if inner := [each for _, _, lines in of_row if (each := _inner(lines))]:
            known[label] = of_row[0][1], inner
    title = "From inner step to inner step"
    if not known:
        missing = "These runs did not log their validations by inner step."
        return Section("steps", title, (missing,))
    text = (
        f"{_whose(material)} Means over validation tasks and seeds, at the first validation "
        "(early, dashed) and at the last (late, solid). Where the query loss rises while the "
        "support loss falls, the inner loop over-fits its support examples."
    )
    times = (Key("late", 0, "solid"), Key("early", 0, "dashed"))
    kinds = (Key("support", 1, "solid"), Key("query", 2, "solid"))
    groups = [Group("Support and query loss", _loss_panels(known), (*kinds, *times))]
    if panels := tuple(filter(None, (_cosine_panel(known), _rates_panel(known)))):
        variants = [replace(key, style="solid") for key in keys(material)]
        groups.append(Group("Gradients and rates", panels, (*variants, *times)))
    return Section("steps", title, (text.strip(),), tuple(groups))


def _shown(material: Material) -> dict[str, list[_Run]]:
    """By the label of a row, its runs: of rows that are compared, or else of unfinished runs."""
    rows = flat(compared(material.result))
    found = {row.label: _runs_of(material, row) for row in rows}
    if not rows:
        for each in material.unfinished:
            run = each.label, material.look_of(each.variant), each.run.metrics
            found[each.label] = [run]
    return found


def _runs_of(material: Material, row: Row) -> list[_Run]:
    look = material.look_of(row.variant)
    return [(row.label, look, run.metrics) for run in row.runs]


def _whose(material: Material) -> str:
    chosen = material.result.tuned and material.result.rows
    return "Each variant at the setting that validated best." if chosen else ""


def _loss_panel(shown: Mapping[str, Sequence[_Run]]) -> Panel | None:
    lines = []
    for label, of_row in shown.items():
        means = finite(_mean_over_runs([_losses(metrics) for _, _, metrics in of_row]))
        if points := averaged(means, min(_LOSS_POINTS, max(len(means) // 10, 8))):
            lines.append(Line(label, points, of_row[0][1]))
    if not lines:
        return None
    return Panel("Training batches", "Smoothed.", "meta-iterations", "outer loss", tuple(lines))


def _losses(lines: Lines) -> list[tuple[float, float]]:
    """The outer losses, but for skipped batches."""
    found = [(line["iteration"], line["outer_loss"]) for line in lines]
    return [(iteration, loss) for iteration, loss in found if loss is not None]


def _figure_panels(label: str, runs: Sequence[Lines]) -> list[Panel]:
    """A picture for every kind of figure: those whose names differ only after the slash."""
    kinds: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for lines in runs for name in lines[-1]["figures"]):
        kinds.setdefault(name.partition("/")[0], []).append(name)
    panels = []
    for kind, names in kinds.items():
        chosen = [names[place] for place in _spread(len(names), _MOST_LINES)]
        lines = []
        for look, name in enumerate(chosen, 1):
            columns = [
                [
                    (line["iteration"], value)
                    for line in metrics
                    if (value := line["figures"].get(name)) is not None
                ]
                for metrics in runs
            ]
            points = thinned(finite(_mean_over_runs(columns)))
            end = name.partition("/")[2]
            if points:
                lines.append(Line(end or kind, points, look, end=end if len(end) <= 3 else ""))
        if lines:
            short = kind.rpartition(".")[2]
            left = len(names) - len(chosen)
            caption = f"{label}.{f' {len(chosen)} of {len(names)} lines.' if left else ''}"
            panels.append(Panel(kind, caption, "meta-iterations", short, tuple(lines)))
    return panels


def _spread(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def _mean_over_runs(columns: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean at every x that all runs have."""
    found = [dict(column) for column in columns if column]
    if not found:
        return []
    common = [x for x in found[0] if all(x in each for each in found[1:])]
    return [(x, fmean(each[x] for each in found)) for x in common]


_Inner = tuple[Mapping[str, Any], Mapping[str, Any]]
"""The inner steps of the first and of the last validation."""
_Known = tuple[int, Sequence[_Inner]]
"""The look of a row, and the inner steps of its runs."""


def _inner(lines: Lines) -> _Inner | None:
    found = [inner for line in lines if (inner := (line.get("validation") or {}).get("inner"))]
    return (found[0], found[-1]) if found else None


def _by_step(inner: Iterable[_Inner], late: bool, field: str) -> Points:
    """The mean over runs at every inner step; a null is not counted."""
    runs = [each[late].get(field) or () for each in inner]
    count = max(map(len, runs), default=0)
    means = []
    for k in range(count):
        values = [run[k] for run in runs if k < len(run) and run[k] is not None]
        means.append((k, fmean(values) if values else math.nan))
    return tuple(means)


def _ticks(lines: Iterable[Line]) -> tuple[tuple[float, str], ...]:
    places = sorted({x for line in lines for x, _ in line.points})
    return tuple((x, f"{x:g}") for x in places)


_TIMES: tuple[tuple[bool, str, Literal["solid", "dashed"]], ...] = (
    (False, "early", "dashed"),
    (True, "late", "solid"),
)


def _loss_panels(known: Mapping[str, _Known]) -> tuple[Panel, ...]:
    """A picture for every row, all with the same axis."""
    made = {}
    for label, (_, inner) in known.items():
        lines = [
            Line(f"{kind}, {time}", points, look, style=style)
            for look, kind in ((1, "support"), (2, "query"))
            for late, time, style in _TIMES
            if finite(points := _by_step(inner, late, f"{kind}_losses"))
        ]
        if lines:
            made[label] = lines
    heights = [y for lines in made.values() for line in lines for _, y in finite(line.points)]
    both = (min(heights), max(heights)) if heights else ()
    return tuple(
        Panel(label, "", "inner step", "loss", tuple(lines), _ticks(lines), y_range=both)
        for label, lines in made.items()
    )


def _cosine_panel(known: Mapping[str, _Known]) -> Panel | None:
    """How much the tasks' gradients agree."""
    lines = [line for label, each in known.items() for line in _both(label, each, "cosines")]
    return _step_panel("Do the tasks agree?", "cosine between task gradients", lines)


def _rates_panel(known: Mapping[str, _Known]) -> Panel | None:
    """The mean inner learning rates of every row that does not keep one rate."""
    lines = []
    for label, each in known.items():
        both = _both(label, each, "learning_rates")
        values = [y for line in both for _, y in finite(line.points)]
        if values and max(values) - min(values) > 1e-6 * max(map(abs, values)):
            lines += both
    return _step_panel("Inner learning rates", "mean learning rate", lines)


def _both(label: str, known: _Known, field: str) -> list[Line]:
    """The lines of a row, early and late."""
    look, inner = known
    return [
        Line(f"{label}, {time}", points, look, style=style)
        for late, time, style in _TIMES
        if finite(points := _by_step(inner, late, field))
    ]


def _step_panel(title: str, y_label: str, lines: Sequence[Line]) -> Panel | None:
    if not lines:
        return None
    return Panel(title, "", "inner step", y_label, tuple(lines), _ticks(lines))
