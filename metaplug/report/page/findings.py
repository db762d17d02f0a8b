"""What was found, in sentences that the figures bear out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from metaplug.evaluation.results import EvaluationResult
from metaplug.evaluation.scores import better
from metaplug.experiments.runs.result import RunResult
from metaplug.experiments.study.cells import setting_text
from metaplug.experiments.study.results import Row, StudyResult, paired
from metaplug.report.page.chosen import compared, heading
from metaplug.report.page.material import Material
from metaplug.report.page.words import counted, listed, signed
from metaplug.report.terminal import value_text


def findings(material: Material) -> list[str]:
    """What can be said from the figures, a sentence or two for every group of rows."""
    result, said = material.result, list[str]()
    for rows in compared(result):
        apart = heading(result, rows)
        said.append(f"{f'{apart}: ' if apart else ''}{_finding(result, rows)}")
    return said


def told(difference: EvaluationResult) -> int:
    """1 where the whole interval is better than 0, -1 where worse, 0 where it holds 0."""
    low, high = difference.bounds()
    if not math.isfinite(high - low) or low <= 0 <= high:
        return 0
    return 1 if better(difference.metric, difference.mean, 0.0) else -1


def _finding(result: StudyResult, rows: Sequence[Row]) -> str:
    base = result.baseline_among(rows)
    others = [row for row in rows if row is not base]
    if base is None or not others:
        return " ".join(_alone(result, row) for row in rows)
    pairs = [(row, result.difference(row, base)) for row in others]
    known = [(row, difference) for row, difference in pairs if difference is not None]
    if not known:
        return (
            f"Nothing is compared with {base.variant}: it has no run with the same tasks, "
            "data and seed."
        )
    if len(known) == 1:
        return _pair(result, base, *known[0])
    return _many(result, base, known)


def _alone(result: StudyResult, row: Row) -> str:
    """Say what a row reaches that is compared with none."""
    value = value_text(result.metric, row.test.mean, row.test.interval)
    seeds = len(row.seeds)
    over = f"{row.test.num_tasks:,} unseen tasks of {counted(seeds, 'seed')}"
    alone = ", and one seed says nothing about others" if seeds == 1 else ""
    return f"{_name(result, row)} has a test {result.metric} of {value} over {over}{alone}."


def _pair(result: StudyResult, base: Row, row: Row, difference: EvaluationResult) -> str:
    """Say how one row differs from the baseline's."""
    way, pairs = told(difference), paired(base, row)
    both = f"{_with_value(result, row)}; {_with_value(result, base)}"
    over = f"over {difference.num_tasks:,} paired test tasks"
    if not way:
        return (
            f"No difference can be told between {row.variant} and {base.variant}: "
            f"{signed(difference)} {over} of {counted(len(pairs), 'seed')}. {both}."
        )
    word = "better" if way > 0 else "worse"
    size = signed(
        replace(difference, per_task=difference.per_task * math.copysign(1, difference.mean))
    )
    return (
        f"{row.variant} is {word} than {base.variant} by {size.removeprefix('+')} {over}"
        f"{_in_seeds(result, pairs, way)}. {both}."
    )


def _in_seeds(result: StudyResult, pairs: Sequence[tuple[RunResult, RunResult]], way: int) -> str:
    """Say in how many seeds the means differ the same way."""
    if len(pairs) == 1:
        return " of one seed, which says nothing about others"
    ordered = [(own, over) if way > 0 else (over, own) for over, own in pairs]
    same = sum(better(result.metric, one.test.mean, other.test.mean) for one, other in ordered)
    if same == len(pairs):
        return f", and in each of {len(pairs)} seeds"
    return f", but only in {same} of {len(pairs)} seeds"


def _many(result: StudyResult, base: Row, known: Sequence[tuple[Row, EvaluationResult]]) -> str:
    """Count the rows that are better than the baseline's, and name the best."""
    ways = [told(difference) for _, difference in known]
    words = {1: "{} is better", -1: "{} is worse", 0: "{} cannot be told from it"}
    said = [
        word.format(count).replace(" is ", " is " if count == 1 else " are ")
        for way, word in words.items()
        if (count := ways.count(way))
    ]
    best, difference = known[0]
    for row, each in known[1:]:
        if better(result.metric, row.test.mean, best.test.mean):
            best, difference = row, each
    return (
        f"Of {len(known)} variants compared with {base.variant}, {listed(said)}. The best test of "
        f"them is {_with_value(result, best)}; {_with_value(result, base)}; the difference is "
        f"{signed(difference)} over {difference.num_tasks:,} paired test tasks of "
        f"{counted(len(paired(base, best)), 'seed')}."
    )


def _with_value(result: StudyResult, row: Row) -> str:
    """Name a row, with its test."""
    value = value_text(result.metric, row.test.mean, row.test.interval)
    return f"{_name(result, row)}: {value}"


def _name(result: StudyResult, row: Row) -> str:
    """Name a row by its variant and the setting that was chosen for it."""
    tuned = {
        path: value
        for path, value in row.setting.items()
        if path in result.tuned and len(result.study.axes[path]) > 1
    }
    return f"{row.variant} at {setting_text(tuned)}" if tuned else row.variant
