"""How much depends on each axis of a study."""

from __future__ import annotations

from typing import Any

from metaplug.experiments.json_values import to_json
from metaplug.experiments.study.cells import setting_text
from metaplug.experiments.study.results import Row, StudyResult, is_tuned
from metaplug.report.page.chosen import best_validated
from metaplug.report.page.curves import keys
from metaplug.report.page.gather import Material
from metaplug.report.page.panels import Group, Line, Panel, Section, finite
from metaplug.report.terminal import scale_of


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
        "test tasks of all seeds; the validation is the mean over seeds of each one's best, and so "
        "a little too good."
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
                if each != path and not is_tuned(each) and len(result.study.axes[each]) > 1
            }
            found.setdefault(setting_text(others), []).append(row)
    return found


def _panels(material: Material, path: str, rows: list[Row]) -> tuple[Panel, ...]:
    result = material.result
    places = {to_json(value): place for place, value in enumerate(result.study.axes[path])}
    values = [
        value
        for value in result.study.axes[path]
        if any(to_json(row.setting[path]) == to_json(value) for row in rows)
    ]
    if len(values) < 2:
        return ()
    numeric = all(isinstance(each, int | float) and not isinstance(each, bool) for each in values)
    at = {to_json(each): float(each) if numeric else places[to_json(each)] for each in values}
    ticks = tuple(sorted((at[to_json(each)], _text(each)) for each in values))
    scale, _, unit = scale_of(result.metric)
    tests, validations = [], []
    for variant in dict.fromkeys(row.variant for row in rows):
        chosen = [
            (at[to_json(value)], best_validated(result, own))
            for value in values
            if (own := [r for r in rows if r.variant == variant and r.setting[path] == value])
        ]
        look = material.look_of(variant)
        chosen.sort(key=lambda each: each[0])

        def edge(sign: int, chosen: list[tuple[float, Row]] = chosen) -> Any:
            return tuple((x, scale * (r.test.mean + sign * r.test.interval)) for x, r in chosen)

        points = tuple((x, scale * row.test.mean) for x, row in chosen)
        tests.append(Line(variant, points, look, edge(-1), edge(1)))
        validations.append(
            Line(variant, tuple((x, scale * row.best_validation) for x, row in chosen), look)
        )
    name, of = path.rpartition(".")[2], f"{result.metric}{' (%)' if unit else ''}"
    return tuple(
        Panel(f"{title} by {name}", "", name, f"{kind} {of}", tuple(lines), ticks)
        for title, kind, lines in (
            ("Test", "test", tests),
            ("Best validation", "best validation", validations),
        )
        if any(finite(line.points) for line in lines)
    )


def _text(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 16 else f"{text[:15]}…"
