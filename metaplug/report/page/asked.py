"""What was asked: the title of a page, and what its runs are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from metaplug.errors import MetaplugError
from metaplug.experiments.build import task_form
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.report.page.material import Material
from metaplug.report.page.words import counted, duration, listed

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
        _few(_forms(material)),
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


def _named(material: Material, what: Callable[[ExperimentConfig], str]) -> str:
    return _few([what(run.config) for run in material.runs])


def _few(words: Sequence[str]) -> str:
    """The different ones; empty where they are too many."""
    found = list(dict.fromkeys(words))
    return listed(found) if len(found) <= _MOST_NAMED else ""


def _forms(material: Material) -> list[str]:
    """The tasks, as "5-way 1-shot glyphs"."""
    tasks = [(run.config.tasks, run.config) for run in material.runs]
    different = {(each.source, each.ways, each.shots): config for each, config in tasks}
    return [_form(config) for config in different.values()]


def _form(config: ExperimentConfig) -> str:
    try:
        form = task_form(config)
    except MetaplugError:  # a source that is not installed here
        form = [f"{config.tasks.shots}-shot"]
    return " ".join([*form, config.tasks.source])
