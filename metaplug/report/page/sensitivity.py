"""How much depends on each axis of a study."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from metaplug.experiments.json_values import to_json
from metaplug.experiments.study.cells import setting_text
from metaplug.experiments.study.results import Row, StudyResult
from metaplug.report.page.chosen import keys
from metaplug.report.page.material import Material
from metaplug.report.page.panels import Group, Line, Panel, Section
from metaplug.report.terminal import scale_of

_Value = Callable[[Row], tuple[float, float] | None]
"""From a row to a mean and half its interval."""


def sensitivity(material: Material) -> Section | None:
    """Test and best validation against the values of each axis; None where no axis has two."""
    result = material.result
    groups = []
    for path in result.study.axes:
        for heading, rows in _at_other_tasks(result, path).items():
            if panels := _panels(material, path, rows):
                name = path.rpartition(".")[2]
                title = ", ".join(filter(None, (name, heading)))
                groups.append(Group(title, panels, keys(material)))
    if not groups:
        return None
    text = (
        "Every value with the other axes at what validated best. Bands are 95 % intervals over the "
        "test tasks of all seeds. The best validation of a run is the best of many, and so a "
        "little too good."
    )
    return Section("sensitivity", "Sensitivity", (text,), tuple(groups))


def _at_other_tasks(result: StudyResult, path: str) -> dict[str, list[Row]]:
    """The rows that an axis concerns, apart by other axes that validation cannot choose."""
    found: dict[str, list[Row]] = {}
    for row in result.rows:
        if path in row.setting:
            others = {
                each: value
                for each, value in row.setting.items()
                if each != path and each not in result.tuned and len(result.study.axes[each]) > 1
            }
            found.setdefault(setting_text(others), []).append(row)
    return found


def _panels(material: Material, path: str, rows: list[Row]) -> tuple[Panel, ...]:
    """Test, difference from the baseline, and best validation, against the values of one axis."""
    result, name = material.result, path.rpartition(".")[2]
    places = _places(result, path, rows)
    if len(places) < 2:
        return ()

    def difference(row: Row) -> tuple[float, float] | None:
        base = _baseline_at(result, path, row)
        found = None if base is None else result.difference(row, base)
        return None if found is None else (found.mean, found.interval)

    is_share = bool(scale_of(result.metric)[2])
    of = f"{result.metric}{' (%)' if is_share else ''}"
    ticks = tuple(sorted(places.values()))
    drawn: tuple[tuple[str, str, _Value, tuple[float, str] | None], ...] = (
        ("Test", f"test {of}", lambda row: (row.test.mean, row.test.interval), None),
        (
            "Difference",
            f"test minus {result.baseline}{' (pp)' if is_share else ''}",
            difference,
            (0.0, ""),
        ),
        ("Best validation", f"validation {of}", lambda row: (row.best_validation, 0.0), None),
    )
    return tuple(
        Panel(f"{title} by {name}", "", name, y_label, tuple(lines), ticks, level)
        for title, y_label, value, level in drawn
        if (lines := _lines(material, path, rows, value))
    )


def _lines(material: Material, path: str, rows: list[Row], value: _Value) -> list[Line]:
    """A line for every variant that has a value, with a band where there are intervals."""
    places, scale = _places(material.result, path, rows), scale_of(material.result.metric)[0]
    lines = []
    for variant in dict.fromkeys(row.variant for row in rows):
        chosen = _chosen(material.result, path, [row for row in rows if row.variant == variant])
        found = sorted(
            (places[text][0], *each)
            for text, row in chosen.items()
            if (each := value(row)) is not None and math.isfinite(sum(each))
        )
        low, middle, high = (
            tuple((x, scale * (mean + sign * spread)) for x, mean, spread in found)
            for sign in (-1, 0, 1)
        )
        if any(spread for _, _, spread in found):
            lines.append(Line(variant, middle, material.look_of(variant), low, high))
        elif found:
            lines.append(Line(variant, middle, material.look_of(variant)))
    return lines


def _places(result: StudyResult, path: str, rows: list[Row]) -> dict[str, tuple[float, str]]:
    """Where each value that occurs stands, with its text: a number at itself, others in order."""
    found = {to_json(row.setting[path]) for row in rows}
    values = [value for value in result.study.axes[path] if to_json(value) in found]
    numeric = all(isinstance(each, int | float) and not isinstance(each, bool) for each in values)
    return {
        to_json(value): (float(value) if numeric else float(place), _text(value))
        for place, value in enumerate(values)
    }


def _chosen(result: StudyResult, path: str, rows: list[Row]) -> dict[str, Row]:
    """For each value of an axis, the row whose other axes validated best."""
    at: dict[str, list[Row]] = {}
    for row in rows:
        at.setdefault(to_json(row.setting[path]), []).append(row)
    return {text: result.best_validated(own) for text, own in at.items()}


def _baseline_at(result: StudyResult, path: str, row: Row) -> Row | None:
    """The baseline's row at a row's value of an axis, its other axes at what validated best."""
    if result.is_baseline(row):
        return None
    fixed = {
        each: value
        for each, value in row.setting.items()
        if each == path or each not in result.tuned
    }
    rows = [
        one
        for one in result.rows
        if result.is_baseline(one)
        and all(one.setting.get(each, value) == value for each, value in fixed.items())
    ]
    return result.best_validated(rows) if rows else None


def _text(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 16 else f"{text[:15]}…"
