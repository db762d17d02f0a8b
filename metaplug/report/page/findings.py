"""What was asked and what was found, in words that the figures bear out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from metaplug.errors import MetaplugError
from metaplug.evaluation.results import EvaluationResult
from metaplug.evaluation.scores import better
from metaplug.experiments.build import task_form
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.runs.result import RunResult
from metaplug.experiments.study.cells import setting_text
from metaplug.experiments.study.results import Row, StudyResult, paired
from metaplug.report.page.chosen import baseline_among, compared, heading
from metaplug.report.page.gather import Material
from metaplug.report.study import difference_text
from metaplug.report.terminal import value_text

_MOST_NAMED = 3
"""Variants, models and so on; more are counted."""


def title_of(material: Material) -> str:
    """What is compared, on which tasks."""
    labels = [variant.label for variant in material.result.study.variants]
    sources = _named(material, lambda config: config.tasks.source) or "several tasks"
    if len(labels) > _MOST_NAMED:
        return f"{len(labels)} variants on {sources}"
    return f"{listed(labels)} on {sources}"


def asked(material: Material) -> str:
    """What was run, in a sentence."""
    study, runs = material.result.study, material.runs
    parts = [
        counted(len(study.variants), "variant"),
        *(
            counted(len(values), f"value of {path.rpartition('.')[2]}", "values of")
            for path, values in study.axes.items()
            if len(values) > 1
        ),
        counted(len({run.seed for run in runs}), "seed"),
    ]
    texts = [
        _grid(material, parts),
        _named(material, _form),
        _named(material, lambda config: config.model.name),
        _named(material, lambda config: counted(config.learner.inner_steps, "inner step")),
        _named(
            material,
            lambda config: (
                f"{config.training.iterations:,} iterations of {config.training.tasks_per_batch} "
                "tasks"
            ),
        ),
    ]
    return f"{'; '.join(filter(None, texts))}."


def _grid(material: Material, parts: Sequence[str]) -> str:
    runs = material.runs
    if material.is_study:
        return " × ".join(parts)
    return f"{len(runs)} runs of {listed(parts)}" if runs[1:] else f"One run, seed {runs[0].seed}"


def facts(material: Material) -> list[tuple[str, str]]:
    """The counts that a result rests on."""
    rows, runs = material.result.rows, material.runs
    finished = sum(len(row.runs) for row in rows)
    whole = finished + (
        len(material.result.missing) if material.is_study else len(material.unfinished)
    )
    tests = dict.fromkeys(f"{run.test.num_tasks:,}" for row in rows for run in row.runs)
    validations = dict.fromkeys(f"{run.config.training.validation_tasks:,}" for run in runs)
    seconds = sum(run.seconds for row in rows for run in row.runs)
    return [
        ("finished runs", f"{finished} of {whole}" if whole > finished else f"{finished}"),
        ("seeds", listed([str(seed) for seed in sorted({run.seed for run in runs})], most=8)),
        *([("test tasks of a run", listed(list(tests)))] if tests else []),
        ("validation tasks", listed(list(validations))),
        *([("training in all", duration(seconds))] if rows else []),
    ]


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
    if low <= 0 <= high:
        return 0
    return 1 if better(difference.metric, difference.mean, 0.0) else -1


def _finding(result: StudyResult, rows: Sequence[Row]) -> str:
    base = baseline_among(result, rows)
    others = [row for row in rows if row is not base]
    if base is None or not others:
        said = [f"{_with_value(result, row)} on {_tasks(row)}" for row in rows]
        return f"{listed(said)}."
    pairs = [(row, result.difference(row, base)) for row in others]
    known = [(row, difference) for row, difference in pairs if difference is not None]
    if not known:
        return (
            f"Nothing is compared with {base.variant}: it has no run with the same tasks and seed."
        )
    if len(known) == 1:
        return _pair(result, base, *known[0])
    return _many(result, base, known)


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


def signed(difference: EvaluationResult) -> str:
    """Write a difference with its sign: "+7.40 ± 0.90 pp", in percentage points."""
    return difference_text(difference).replace("-", "−")


def _with_value(result: StudyResult, row: Row) -> str:
    """Name a row by its variant, its chosen setting and its test."""
    tuned = {
        path: value
        for path, value in row.setting.items()
        if path in result.tuned and len(result.study.axes[path]) > 1
    }
    at = f" at {setting_text(tuned)}" if tuned else ""
    return f"{row.variant}{at}: {value_text(result.metric, row.test.mean, row.test.interval)}"


def _tasks(row: Row) -> str:
    return f"{row.test.num_tasks:,} unseen tasks, {counted(len(row.seeds), 'seed')}"


def _named(material: Material, what: Callable[[ExperimentConfig], str]) -> str:
    """What the runs have, each once; empty where they have too many."""
    found = list(dict.fromkeys(what(run.config) for run in material.runs))
    return listed(found) if len(found) <= _MOST_NAMED else ""


def _form(config: ExperimentConfig) -> str:
    """The tasks as "5-way 1-shot glyphs"."""
    try:
        form = task_form(config)
    except MetaplugError:  # a source that is not installed here
        form = [f"{config.tasks.shots}-shot"]
    return " ".join([*form, config.tasks.source])


def duration(seconds: float) -> str:
    """Write a time in words: "12 s", "3.5 min", "2.0 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def counted(number: int, one: str, many: str = "") -> str:
    """Write a number with its noun."""
    if number != 1 and many:
        first, _, rest = one.partition(" of ")
        return f"{number} {first}s of {rest}"
    return f"{number:,} {one}{'s' * (number != 1)}"


def listed(words: Sequence[str], most: int = 1000) -> str:
    """One, two and three; or the first ones and how many more."""
    if len(words) > most:
        return f"{', '.join(words[:most])} and {len(words) - most} more"
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
