"""Each variant at its best setting, compared: with the baseline at its own, and with its base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metaplug.evaluation.results import EvaluationResult
from metaplug.evaluation.significance import holm, p_value
from metaplug.experiments.study.acceleration import Acceleration
from metaplug.experiments.study.results import Row, StudyResult, paired


@dataclass(frozen=True)
class Comparison:
    """One row against another.

    Attributes:
        row, over: the rows.
        acceleration: the target is the best validation of `over`, seed by seed, or the study's.
        difference: of tests, task by task; None where they have no common seed, or other tasks.
        by_seed: the mean difference of each common seed; empty without a difference.
        p_value: of the paired t-test of no difference, over the tasks of all seeds.
        p_holm: the same, corrected by Holm's method for all comparisons of the group.
    """

    row: Row
    over: Row
    acceleration: Acceleration
    difference: EvaluationResult | None
    by_seed: tuple[float, ...] = ()
    p_value: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class Comparisons:
    """The comparisons of a group of rows, one of each variant.

    Attributes:
        with_baseline: by the label of a row, with the baseline's.
        with_base: by the label of a row, with that of the variant which it extends by plugins. Of
            one that extends the baseline it is the same.
        count: how many are tested, which the p-values are corrected for; two rows that stand beside
            each other both ways count once.
    """

    with_baseline: dict[str, Comparison]
    with_base: dict[str, Comparison]
    count: int


def comparisons(result: StudyResult, rows: Sequence[Row]) -> Comparisons:
    """Compare the rows of a group of `StudyResult.best_rows`."""
    baseline = result.baseline_among(rows)
    bases = {row.label: result.base_among(row, rows) for row in rows}
    pairs = [(row, baseline) for row in rows if row is not baseline]
    pairs += [(row, bases[row.label]) for row in rows if bases[row.label] is not baseline]
    known = [(row, over, result.difference(row, over)) for row, over in pairs if over is not None]
    raw = {
        frozenset((row.label, over.label)): p_value(difference)
        for row, over, difference in known
        if difference is not None
    }
    corrected = dict(zip(raw, holm(list(raw.values())), strict=True))
    made = [
        Comparison(
            row,
            over,
            result.acceleration(row, over),
            difference,
            () if difference is None else _by_seed(row, over),
            raw.get(both := frozenset((row.label, over.label))),
            corrected.get(both),
        )
        for row, over, difference in known
    ]
    return Comparisons(
        {each.row.label: each for each in made if each.over is baseline},
        {each.row.label: each for each in made if each.over is bases[each.row.label]},
        len(raw),
    )


def _by_seed(row: Row, over: Row) -> tuple[float, ...]:
    return tuple(other.test.mean - one.test.mean for one, other in paired(over, row))
