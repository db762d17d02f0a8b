"""Learning curves: means over seeds with their bands, against iterations, tasks and seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from metaplug.evaluation.curves import Curve, Point, best_point
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.study.cells import setting_text
from metaplug.experiments.study.results import Row
from metaplug.report.page.chosen import compared, heading, keys, which
from metaplug.report.page.material import Material, Unfinished
from metaplug.report.page.panels import Group, Line, Panel, Points, Section, finite, thinned
from metaplug.report.terminal import scale_of

_MOST_SETTINGS = 12
"""Pictures of single settings."""


@dataclass(frozen=True)
class _Against:
    """What stands below a curve.

    Attributes:
        title: of the picture.
        label: of the axis.
        place: where a validation stands on it; None where that is not known.
    """

    title: str
    label: str
    place: Callable[[Point, ExperimentConfig], float | None]


_ITERATIONS = _Against("By iterations", "meta-iterations", lambda point, config: point.iteration)
_TASKS = _Against(
    "By tasks seen",
    "training tasks",
    lambda point, config: point.iteration * config.training.tasks_per_batch,
)
_SECONDS = _Against("By seconds", "seconds", lambda point, config: point.seconds)


def curves(material: Material) -> Section | None:
    """The section of learning curves; None without a validation."""
    names = keys(material)
    groups = [
        Group(heading(material.result, rows) if rows else "", _panels(material, rows), names)
        for rows in compared(material.result) or ((),)
    ]
    settings = _by_setting(material)
    if len(settings) > len(groups):
        panels = (
            _panel(material, replace(_ITERATIONS, title=title), rows)
            for title, rows in settings[:_MOST_SETTINGS]
        )
        groups.append(Group("Every setting", tuple(filter(None, panels)), names))
    groups = [group for group in groups if group.panels]
    if not groups:
        return None
    return Section("curves", "Learning curves", _texts(material, settings), tuple(groups))


def _panels(material: Material, rows: Sequence[Row]) -> tuple[Panel, ...]:
    panels = (_panel(material, each, rows) for each in (_ITERATIONS, _TASKS, _SECONDS))
    return tuple(filter(None, panels))


def _texts(material: Material, settings: Sequence[object]) -> tuple[str, ...]:
    several = any(len(row.runs) > 1 for row in material.result.rows)
    text = (
        "Validation on tasks that are never trained on, the mean over seeds. The band reaches from "
        "the lowest to the highest seed."
        if several
        else "Validation on tasks that are never trained on. The band is the 95 % interval over "
        "validation tasks; one seed says nothing about others."
    )
    texts = [text]
    texts.append(which(material.result))
    if len(settings) > _MOST_SETTINGS:
        left = len(settings) - _MOST_SETTINGS
        texts.append(f"{left} more settings are in the tables.")
    if material.unfinished:
        texts.append("Thin dotted lines are unfinished runs, as far as they came.")
    return (" ".join(filter(None, texts)),)


def _by_setting(material: Material) -> list[tuple[str, list[Row]]]:
    """The rows at every setting of the axes; a variant that an axis does not concern is in each."""
    rows = material.result.rows
    settings = {setting_text(row.setting): row.setting for row in rows}
    whole = {
        text: setting
        for text, setting in settings.items()
        if not any(other != setting and _is_within(setting, other) for other in settings.values())
    }
    return [
        (text, [row for row in rows if _is_within(row.setting, setting)])
        for text, setting in whole.items()
    ]


def _is_within(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(path in other and other[path] == value for path, value in one.items())


def _panel(material: Material, against: _Against, rows: Sequence[Row]) -> Panel | None:
    metric = material.result.metric
    scale, _, unit = scale_of(metric)
    lines = [line for row in rows for line in _row_lines(material, row, against, scale)]
    lines += [
        Line(
            f"{each.label}, unfinished",
            thinned(points),
            material.look_of(each.variant),
            style="dotted",
            is_thin=bool(rows),
        )
        for each in _unfinished(material, rows)
        if (points := _points(each.run.curve, each.run.config, against, scale))
    ]
    if not lines:
        return None
    return Panel(
        against.title,
        "",
        against.label,
        f"validation {metric}{' (%)' if unit else ''}",
        tuple(lines),
        level=_level(material, rows, scale),
    )


def _level(material: Material, rows: Sequence[Row], scale: float) -> tuple[float, str] | None:
    """The target of accelerations: the study's, or the best that the baseline's mean reaches."""
    result = material.result
    if result.study.target is not None:
        return scale * result.study.target, "target"
    base = result.baseline_among(rows)
    if base is None or len(rows) == 1:
        return None
    best = best_point(result.metric, base.mean_curve)
    return (scale * best.mean, f"best of {base.variant}") if math.isfinite(best.mean) else None


def _row_lines(material: Material, row: Row, against: _Against, scale: float) -> list[Line]:
    config, look = row.runs[0].config, material.look_of(row.variant)
    mean = row.mean_curve
    points = _points(mean, config, against, scale)
    if not points:
        return []
    if len(row.runs) > 1:
        columns = list(zip(*(run.curve for run in row.runs), strict=False))
        low = [min(point.mean for point in column) for column in columns]
        high = [max(point.mean for point in column) for column in columns]
    else:
        low = [point.mean - point.interval for point in mean]
        high = [point.mean + point.interval for point in mean]
    places = [against.place(point, config) for point in mean]

    def edge(values: Sequence[float]) -> Points:
        pairs = zip(places, values, strict=True)
        return thinned(
            finite((place, scale * value) for place, value in pairs if place is not None)
        )

    return [Line(row.label, thinned(points), look, edge(low), edge(high))]


def _points(
    curve: Curve, config: ExperimentConfig, against: _Against, scale: float
) -> list[tuple[float, float]]:
    places = [(against.place(point, config), scale * point.mean) for point in curve]
    return finite((place, value) for place, value in places if place is not None)


def _unfinished(material: Material, rows: Sequence[Row]) -> list[Unfinished]:
    """The unfinished runs that belong to a picture of some rows, by variant and setting."""
    if not rows:
        return list(material.unfinished)
    return [
        each
        for each in material.unfinished
        if any(each.variant == row.variant and each.setting == row.setting for row in rows)
    ]
