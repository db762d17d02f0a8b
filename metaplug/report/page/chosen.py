"""Which rows of a study stand beside each other in tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metaplug.experiments.study.cells import setting_text
from metaplug.experiments.study.results import Row, StudyResult
from metaplug.report.page.material import Material
from metaplug.report.page.panels import Key


def compared(result: StudyResult) -> tuple[tuple[Row, ...], ...]:
    """The rows that are held against each other, a group for each form of tasks and training.

    Every variant stands at the setting that validated best; where no axis is to choose from, at
    all of its settings.
    """
    if result.tuned:
        return result.best_rows()
    groups: dict[str, list[Row]] = {}
    for row in result.rows:
        groups.setdefault(repr(dict(row.setting)), []).append(row)
    return tuple(map(tuple, groups.values()))


def flat(groups: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of all groups, each once."""
    return list({id(row): row for rows in groups for row in rows}.values())


def heading(result: StudyResult, rows: Sequence[Row]) -> str:
    """What a group of `compared` has apart: values of axes that validation cannot choose."""
    apart = max(map(result.apart, rows), key=len)
    several = {path: each for path, each in apart.items() if len(result.study.axes[path]) > 1}
    return setting_text(several)


def reference_of(result: StudyResult, row: Row) -> Row | None:
    """The row that another one is compared with at its own setting.

    The baseline's; of a single variant the first row. None for the reference itself.
    """
    if len(result.study.variants) == 1:
        first = result.rows[0]
        return None if row is first else first
    return None if result.is_baseline(row) else result.baseline_of(row)


@dataclass(frozen=True)
class Shown:
    """A row whose training is looked into, or an unfinished run.

    Attributes:
        label: the row's.
        look: of its variant.
        metrics: the lines of metrics.jsonl of each of its runs.
    """

    label: str
    look: int
    metrics: tuple[Sequence[Mapping[str, Any]], ...]


def shown(material: Material) -> list[tuple[str, list[Shown]]]:
    """The rows of each group of `compared`, with its heading; or else the unfinished runs."""
    result, look_of = material.result, material.look_of
    groups = [
        (
            heading(result, rows),
            [
                Shown(row.label, look_of(row.variant), tuple(run.metrics for run in row.runs))
                for row in rows
            ],
        )
        for rows in compared(result)
    ]
    unfinished = [
        Shown(each.label, look_of(each.variant), (each.run.metrics,))
        for each in material.unfinished
    ]
    return groups or [("", unfinished)]


def titled(title: str, apart: str) -> str:
    """The title of a group of pictures, with what the group has apart."""
    return ": ".join(filter(None, (title, apart)))


def which(result: StudyResult) -> str:
    """Say which rows are compared, where they were chosen; else empty."""
    was_chosen = len(flat(compared(result))) < len(result.rows)
    return "Each variant at the setting that validated best." if was_chosen else ""


def keys(material: Material) -> tuple[Key, ...]:
    """Which line is which variant; empty where there is only one."""
    labels = [variant.label for variant in material.result.study.variants]
    return tuple(Key(label, place) for place, label in enumerate(labels)) if labels[1:] else ()
