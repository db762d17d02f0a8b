"""Whether runs are of the same data, as far as they say which classes they draw on."""

from __future__ import annotations

from collections.abc import Iterable

from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.runs.data import agree
from metaplug.experiments.runs.result import RunResult

_WHATEVER_THE_SEED = ("folder", "glyphs", "tabular", "text")
"""Sources that have the same classes for every seed."""


def same_data(one: RunResult, other: RunResult) -> bool:
    """Whether two runs of one seed draw on the same classes, so their tasks may be paired.

    Other tasks in the configuration are no change of the data. Of runs of older versions nothing is
    known, and they count as the same.
    """
    tasks = [(run.config.tasks.source, run.config.tasks.settings) for run in (one, other)]
    return tasks[0] != tasks[1] or agree(one.data, other.data)


def of_other_data(runs: Iterable[RunResult]) -> list[RunResult]:
    """The runs that are of other data than the first one with the same tasks."""
    first: dict[str, RunResult] = {}
    known = [run for run in runs if run.data]
    return [
        run
        for run in known
        if not agree(first.setdefault(source_key(run.config), run).data, run.data)
    ]


def source_key(config: ExperimentConfig) -> str:
    """What runs have in common that draw on the same classes while the data stay as they are."""
    source, settings = config.tasks.source, config.tasks.settings
    seed = None if source.partition(":")[0] in _WHATEVER_THE_SEED else config.seed
    return repr((source, sorted(settings.items()), seed))
