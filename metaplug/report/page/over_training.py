"""Training iteration by iteration: its batches, and what plugins learn and log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from metaplug.report.page.chosen import Shown, keys, shown, titled, which
from metaplug.report.page.material import Material
from metaplug.report.page.panels import Group, Line, Panel, Section, averaged, finite, thinned

_MOST_LINES, _MOST_PANELS = 7, 12
_MOST_STRETCHES = 40
"""Whose means make a line of training batches, of ten iterations or more: single ones are noise."""

_Line = Mapping[str, Any]
"""Of metrics.jsonl."""
_Column = list[tuple[float, float]]
"""A value by iteration."""


def over_training(material: Material) -> Section | None:
    """Training batches, and the figures that plugins log, over the iterations."""
    groups, panels = [], list[Panel]()
    for apart, rows in shown(material):
        batches = (
            _batch_panel(rows, "outer_loss", "Outer loss", "outer loss"),
            _batch_panel(rows, "meta_gradient_norm", "Size of the meta-gradient", "norm"),
        )
        if found := tuple(filter(None, batches)):
            title = titled("Training batches, smoothed", apart)
            groups.append(Group(title, found, keys(material)))
        panels += [panel for row in rows for panel in _figure_panels(row)]
    if panels:
        groups.append(Group("What plugins learn and log", tuple(panels[:_MOST_PANELS])))
    if not groups:
        return None
    texts = [which(material.result)]
    if panels:
        texts.append(
            "Figures of plugins have a line for each inner step, whose number stands at its end, "
            "or for each part of the model; the mean over seeds."
        )
    if len(panels) > _MOST_PANELS:
        texts.append(f"{len(panels) - _MOST_PANELS} more kinds are in metrics.jsonl.")
    return Section("training", "Over training", (" ".join(filter(None, texts)),), tuple(groups))


def _batch_panel(rows: Sequence[Shown], field: str, title: str, y_label: str) -> Panel | None:
    """What every iteration has, as means over stretches and seeds."""
    lines = []
    for row in rows:
        columns = [_column(metrics, lambda line: line[field]) for metrics in row.metrics]
        means = finite(_mean_over_runs(columns))
        most = min(_MOST_STRETCHES, max(len(means) // 10, 8))
        if points := averaged(means, most):
            lines.append(Line(row.label, points, row.look))
    return Panel(title, "", "meta-iterations", y_label, tuple(lines)) if lines else None


def _column(metrics: Sequence[_Line], value: Callable[[_Line], float | None]) -> _Column:
    """A value of every line that has it."""
    found = [(line["iteration"], value(line)) for line in metrics]
    return [(iteration, each) for iteration, each in found if each is not None]


def _figure_panels(row: Shown) -> list[Panel]:
    """A picture for every kind of figure: those whose names differ only after the slash."""
    kinds: dict[str, list[str]] = {}
    for name in dict.fromkeys(_names(row)):
        kinds.setdefault(name.partition("/")[0], []).append(name)
    panels = []
    for kind, names in kinds.items():
        chosen = [names[place] for place in _spread(len(names), _MOST_LINES)]
        lines = []
        for look, name in enumerate(chosen, 1):
            columns = [_column(metrics, _figure(name)) for metrics in row.metrics]
            points = thinned(finite(_mean_over_runs(columns)))
            end = name.partition("/")[2]
            if points:
                lines.append(Line(end or kind, points, look, end=end if len(end) <= 3 else ""))
        if lines:
            short = kind.rpartition(".")[2]
            left = len(names) - len(chosen)
            caption = f"{row.label}.{f' {len(chosen)} of {len(names)} lines.' if left else ''}"
            panels.append(Panel(kind, caption, "meta-iterations", short, tuple(lines)))
    return panels


def _names(row: Shown) -> Iterator[str]:
    """Of all figures; a line may have none, as they may be fetched now and then."""
    return (name for metrics in row.metrics for line in metrics for name in line["figures"])


def _figure(name: str) -> Callable[[_Line], float | None]:
    return lambda line: line["figures"].get(name)


def _spread(count: int, most: int) -> list[int]:
    """At most so many places among `count`, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def _mean_over_runs(columns: Sequence[_Column]) -> _Column:
    """The mean at every x that all runs have."""
    found = [dict(column) for column in columns if column]
    if not found:
        return []
    common = [x for x in found[0] if all(x in each for each in found[1:])]
    return [(x, fmean(each[x] for each in found)) for x in common]
