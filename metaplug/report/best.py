"""The tables of each variant at its best setting, and how to read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from metaplug.experiments.study.results import Row, StudyResult
from metaplug.experiments.study.tuned import Comparison, comparisons
from metaplug.report.comparing import (
    apart_text,
    by_seed_text,
    difference_text,
    mean_text,
    p_text,
    part_text,
)
from metaplug.report.terminal import value_text

_COMPARED = ("by seed", "p (Holm)", "acceleration")


class Sheet(NamedTuple):
    """The texts of a table, before it is drawn."""

    title: str
    head: tuple[str, ...]
    lines: list[tuple[str, ...]]


def best_sheets(result: StudyResult, rows: Sequence[Row]) -> list[Sheet]:
    """Lay out the variants at the settings that validated best; and each beside its base.

    The second only where a base is not the baseline: else it would repeat the first.
    """
    metric, found = result.metric, comparisons(result, rows)
    values, seeds = (f"validation {metric}", f"test {metric}"), len(result.study.seeds)
    sheets = [
        Sheet(
            "Each variant at its best setting, chosen on validation tasks",
            ("variant", *values, f"minus {result.baseline}", *_COMPARED),
            [
                (
                    f"{row.label}{part_text(len(row.seeds), seeds)}",
                    value_text(metric, row.best_validation),
                    value_text(metric, row.test.mean, row.test.interval),
                    *_cells(metric, found.with_baseline.get(row.label)),
                )
                for row in rows
            ],
        ),
        Sheet(
            "Each variant beside the one that it extends, both at their best settings",
            ("variant", "its base", "minus its base", *_COMPARED),
            [
                (
                    f"{each.row.label}{part_text(len(each.row.seeds), seeds)}",
                    each.over.label,
                    *_cells(metric, each),
                )
                for each in found.with_base.values()
            ],
        ),
    ]
    return sheets[:1] if found.with_base.items() <= found.with_baseline.items() else sheets


def _cells(metric: str, one: Comparison | None) -> tuple[str, ...]:
    if one is None:
        return ("", "", "", "")
    if not one.acceleration.targets:
        return (apart_text(one.row, one.over), "", "", "")
    return (
        difference_text(one.difference),
        by_seed_text(metric, one.by_seed),
        p_text(one.p_holm),
        mean_text(one.acceleration),
    )


def best_notes(result: StudyResult, groups: Sequence[Sequence[Row]]) -> list[str]:
    """Explain the columns of these tables and their limits; nothing where nothing is tested."""
    counts = sorted({comparisons(result, rows).count for rows in groups} - {0})
    if not counts:
        return []
    counted = {len(row.seeds) for rows in groups for row in rows}
    few, seeds = min(counted), max(counted)
    trained = f"the {seeds if few == seeds else f'{few} to {seeds}'} training runs"
    trained = "the one training run" if seeds == 1 else trained
    return [
        "At best settings: acceleration has the best validation of the other row at its own best "
        "setting as the target.",
        "p: of the paired t-test over the test tasks of all seeds, corrected by Holm's method for "
        f"{' or '.join(map(str, counts))} comparison{'s' * (counts != [1])}.",
        f"Intervals and p are over tasks, for {trained} of a row: of another training run they say "
        "nothing, and the differences by seed only as much as so few can.",
    ]
