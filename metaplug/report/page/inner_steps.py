"""What happens from inner step to inner step: over-fitting, agreement of tasks, learned rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, Literal

from metaplug.report.page.chosen import keys, shown, titled, which
from metaplug.report.page.material import Material
from metaplug.report.page.panels import Group, Key, Line, Panel, Points, Section, finite

_MOST_PANELS = 12
"""Of support and query losses."""

_Inner = tuple[Mapping[str, Any], Mapping[str, Any]]
"""The inner steps of the first and of the last validation."""
_Known = tuple[int, Sequence[_Inner]]
"""The look of a row, and the inner steps of its runs."""


def by_inner_step(material: Material) -> Section:
    """Losses, gradients and rates from inner step to inner step, early and late in training."""
    title, groups = "From inner step to inner step", list[Group]()
    for apart, rows in shown(material):
        known = {
            row.label: (row.look, inner)
            for row in rows
            if (inner := [each for metrics in row.metrics if (each := _inner(metrics))])
        }
        groups += _groups(material, apart, known) if known else []
    if not groups:
        missing = "These runs have no figures by inner step."
        return Section("steps", title, (missing,))
    text = (
        f"{which(material.result)} Means over the first validation tasks and all seeds, at the "
        "first validation (early, dashed) and at the last (late, solid). Where the query loss "
        "rises while the support loss falls, the inner loop over-fits its support examples."
    )
    return Section("steps", title, (text.strip(),), tuple(groups))


def _groups(material: Material, apart: str, known: Mapping[str, _Known]) -> list[Group]:
    """A picture of losses for every row, and pictures that have all rows."""
    times = (Key("late", 0, "solid"), Key("early", 0, "dashed"))
    kinds = (Key("support", 1, "solid"), Key("query", 2, "solid"))
    groups = []
    if losses := _loss_panels(known)[:_MOST_PANELS]:
        title = titled("Support and query loss", apart)
        groups.append(Group(title, losses, (*kinds, *times)))
    panels = (_query_panel(known), _cosine_panel(known), _rates_panel(known))
    if found := tuple(filter(None, panels)):
        variants = [replace(key, style="solid") for key in keys(material)]
        heading = "Beside each other" if len(known) > 1 else "Gradients and rates"
        groups.append(Group(titled(heading, apart), found, (*variants, *times)))
    return groups


def _inner(lines: Sequence[Mapping[str, Any]]) -> _Inner | None:
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
        Panel(
            label, _lowest(lines), "inner step", "loss", tuple(lines), _ticks(lines), y_range=both
        )
        for label, lines in made.items()
    )


def _lowest(lines: Sequence[Line]) -> str:
    """Where the late query loss is lowest, in words."""
    late = next((line for line in lines if line.label == "query, late"), None)
    if late is None:
        return ""
    points = finite(late.points)
    losses = [loss for _, loss in points]
    last, low = points[-1][0], min(losses)
    if losses[-1] <= low + (max(losses) - low) / 100:
        return f"Late, the query loss is lowest at the last step, {last:g}."
    step = points[losses.index(low)][0]
    return f"Late, the query loss is lowest at step {step:g} of {last:g}, and rises after it."


def _query_panel(known: Mapping[str, _Known]) -> Panel | None:
    """The query losses of several rows in one picture."""
    lines = [line for label, each in known.items() for line in _both(label, each, "query_losses")]
    return _step_panel("Query loss", "loss", lines) if len(known) > 1 else None


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
