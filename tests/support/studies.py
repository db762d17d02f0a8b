"""Studies made by hand, and tiny ones to compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from metaplug import EvaluationResult
from metaplug.evaluation.curves import Curve, Point
from metaplug.evaluation.results import Metric
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.runs.result import RunResult
from metaplug.experiments.study.results import Row, StudyResult
from metaplug.experiments.study.schema import Study

TINY: dict[str, Any] = {
    "model": {"name": "mlp", "settings": {"hidden": [4]}},
    "tasks": {"source": "sinusoid", "shots": 3, "queries": 3},
    "learner": {"inner_lr": 0.01, "inner_steps": 1},
    "training": {"iterations": 4, "tasks_per_batch": 2, "validate_every": 2, "test_tasks": 5},
    "runtime": {"device": "cpu"},
}


def tiny_study(*variants: Any, **fields: Any) -> Study:
    """A study of runs of a twentieth of a second."""
    values = {"base": TINY, "variants": variants or ("maml", "maml+gradient-sharing"), **fields}
    return Study.model_validate(values)


def curve(*means: float, every: int = 50) -> Curve:
    """A curve of these means, each with the interval 0.01, a second an iteration."""
    return tuple(
        Point(every * (index + 1), mean, 0.01, float(every * (index + 1)))
        for index, mean in enumerate(means)
    )


def result(
    metric: Metric,
    curves: Mapping[str, Sequence[Curve]],
    tests: Mapping[str, Sequence[Sequence[float]]] | None = None,
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    seconds: float = 1.0,
    transductive: Mapping[str, tuple[str, ...]] | None = None,
    **fields: Any,
) -> StudyResult:
    """The result of a study, from curves by row and seed.

    Args:
        curves: by the row's label, VARIANT or VARIANT@NAME of a setting.
        settings: by NAME.
    """
    labels = list(dict.fromkeys(label.partition("@")[0] for label in curves))
    seeds = range(len(next(iter(curves.values()))))
    values = {"variants": labels, "seeds": list(seeds), **fields}
    study = Study.model_validate(values)
    rows = []
    for label, lines in curves.items():
        variant, _, setting = label.partition("@")
        found = [
            EvaluationResult(
                metric,
                torch.tensor((tests or {}).get(label, [[0.0, 1.0]] * 9)[seed]).double(),
                1,
                transductive=(transductive or {}).get(variant, ()),
            )
            for seed in seeds
        ]
        runs = tuple(
            RunResult(
                Path(f"{label}-{seed}"),
                ExperimentConfig(seed=seed),
                {"seconds": seconds, "plugins": {}},
                line,
                found[seed],
            )
            for seed, line in enumerate(lines)
        )
        for run in runs:
            vars(run)["metrics"] = []
        rows.append(Row(variant, (settings or {}).get(setting, {}), runs))
    return StudyResult(metric, study, tuple(rows))


def row(found: StudyResult, label: str) -> Row:
    """The row of this label."""
    return next(each for each in found.rows if each.label == label)
