"""Runs that were trained one by one, as a small study: variants, axes and seeds by what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metaplug.contract.presets import PluginUse
from metaplug.errors import RequestError, one_line
from metaplug.evaluation.results import Metric
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.json_values import to_json
from metaplug.experiments.plugin_files import comparable
from metaplug.experiments.runs.result import RunResult
from metaplug.experiments.study.cells import row_text
from metaplug.experiments.study.checks import is_own
from metaplug.experiments.study.results import Row, StudyResult
from metaplug.experiments.study.schema import Study, Variant
from metaplug.report.page.material import Begun, Material, Unfinished

_MOST_LETTERS = 180
"""Of a variant's name."""


def small_study(runs: Sequence[RunResult | Begun]) -> Material:
    """Runs as a study: preset and plugins make the variants, other fields that differ the axes.

    A field of which every variant has one value of its own stands beside the variant's name. Runs
    with the same seed are paired; the first run's variant is the baseline.

    Args:
        runs: at least one.

    Raises:
        RequestError: two runs differ in nothing, or are measured by different scores.
    """
    metric = _same_metric(runs)
    fields = [comparable(run.config) for run in runs]
    algorithms = [_algorithm(each) for each in fields]
    axes, own = _axes(fields, algorithms)
    names = _labels(algorithms, [run.config for run in runs])
    labels = [
        row_text(name, {path: each.get(path) for path in own})
        for name, each in zip(names, fields, strict=True)
    ]
    settings = [{path: each.get(path) for path in axes} for each in fields]
    _check_once(runs, labels, settings)
    first = {label: run.config for label, run in reversed(list(zip(labels, runs, strict=True)))}
    order = list(dict.fromkeys(labels))
    study = Study(
        variants=tuple(
            Variant(label=label, preset=first[label].preset, plugins=first[label].plugins)
            for label in order
        ),
        axes={path: _distinct([each[path] for each in settings]) for path in axes},
        seeds=tuple(dict.fromkeys(run.seed for run in runs)),
    )
    rows: dict[tuple[int, str], list[int]] = {}
    for place, run in enumerate(runs):
        if isinstance(run, RunResult):
            key = order.index(labels[place]), to_json(settings[place])
            rows.setdefault(key, []).append(place)
    result = StudyResult(
        metric,
        study,
        tuple(
            Row(labels[own[0]], settings[own[0]], _finished(runs, own))
            for _, own in sorted(rows.items(), key=lambda item: (item[0][0], item[1][0]))
        ),
    )
    return Material(
        runs[0].folder.resolve().name if len(runs) == 1 else f"{len(runs)} runs",
        result,
        tuple(
            Unfinished(label, setting, run)
            for label, setting, run in zip(labels, settings, runs, strict=True)
            if isinstance(run, Begun)
        ),
    )


def _finished(runs: Sequence[RunResult | Begun], places: Sequence[int]) -> tuple[RunResult, ...]:
    """The finished runs at some places, in the order of seeds."""
    found = [run for place in places if isinstance(run := runs[place], RunResult)]
    return tuple(sorted(found, key=lambda run: run.seed))


def _same_metric(runs: Sequence[RunResult | Begun]) -> Metric:
    metrics: dict[Metric, RunResult | Begun] = {}
    for run in runs:
        if isinstance(run, RunResult):
            metrics.setdefault(run.test.metric, run)
            continue
        validations = (line["validation"] for line in run.metrics if line.get("validation"))
        if (validation := next(validations, None)) is not None:
            metrics.setdefault(validation["metric"], run)
    if len(metrics) > 1:
        (one, first), (other, second) = list(metrics.items())[:2]
        raise RequestError(
            f"{first.folder} is measured by {one_line(one)} and {second.folder} by "
            f"{one_line(other)}, which cannot stand in one report: report them apart"
        )
    return next(iter(metrics), "accuracy")


def _algorithm(fields: Mapping[str, Any]) -> str:
    """The preset and the plugins, as a text that equal ones share."""
    own = {
        path: value
        for path, value in fields.items()
        if path.partition(".")[0] in ("preset", "plugins")
    }
    return to_json(dict(sorted(own.items())))


def _labels(algorithms: Sequence[str], configs: Sequence[ExperimentConfig]) -> list[str]:
    """A name for every run's algorithm: as short as tells those apart that differ."""
    pairs = list(zip(algorithms, configs, strict=True))
    short = {
        algorithm: _label(config, [use.label for use in config.plugins])
        for algorithm, config in pairs
    }
    long = {
        algorithm: _label(config, [*map(_with_settings, config.plugins)])
        for algorithm, config in pairs
    }
    names = {
        each: name if list(short.values()).count(name) == 1 else long[each]
        for each, name in short.items()
    }
    taken: dict[str, int] = {}
    for each, name in names.items():  # files of one name, or presets of one's own
        taken[name] = taken.get(name, 0) + 1
        names[each] = name if taken[name] == 1 else f"{name} ({taken[name]})"
    return [names[each] for each in algorithms]


def _label(config: ExperimentConfig, plugins: Sequence[str]) -> str:
    return one_line("+".join([config.algorithm, *plugins]), _MOST_LETTERS)


def _with_settings(use: PluginUse) -> str:
    settings = ",".join(f"{field}={value}" for field, value in use.settings.items())
    return f"{use.label}:{settings}" if settings else use.label


def _axes(
    fields: Sequence[Mapping[str, Any]], algorithms: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The paths that differ: axes, and those of which every algorithm has one value of its own."""
    paths: dict[str, dict[str, set[str]]] = {}
    for each, algorithm in zip(fields, algorithms, strict=True):
        for path in dict.fromkeys(path for one in fields for path in one):
            if _is_setting(path):
                values = paths.setdefault(path, {}).setdefault(algorithm, set())
                values.add(to_json(each.get(path)))
    differing = [path for path, of in paths.items() if len(set().union(*of.values())) > 1]
    own = [
        path
        for path in differing
        if is_own(path) and all(len(values) == 1 for values in paths[path].values())
    ]
    return [path for path in differing if path not in own], own


def _is_setting(path: str) -> bool:
    """Whether a field is neither of the algorithm itself nor without influence on results."""
    head = path.partition(".")[0]
    return head not in ("preset", "plugins", "seed", "runtime") or path == "runtime.precision"


def _distinct(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple({to_json(value): value for value in values}.values())


def _check_once(
    runs: Sequence[RunResult | Begun], labels: Sequence[str], settings: Sequence[Mapping[str, Any]]
) -> None:
    seen: dict[tuple[str, str, int], RunResult | Begun] = {}
    for run, label, setting in zip(runs, labels, settings, strict=True):
        key = label, to_json(setting), run.seed
        if (other := seen.setdefault(key, run)) is not run:
            raise RequestError(
                f"{other.folder} and {run.folder} have the same configuration and seed, and would "
                "count twice: leave one out"
            )
