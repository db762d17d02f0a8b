"""A finished run, read back from its folder as a result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from metaplug.errors import RunError
from metaplug.evaluation.curves import Curve, Point
from metaplug.evaluation.results import EvaluationResult
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.runs.layout import CONFIG, METRICS, SUMMARY
from metaplug.experiments.runs.reading import read_metrics, read_summary
from metaplug.settings import validated
from metaplug.yaml_text import read_yaml


@dataclass(frozen=True)
class RunResult:
    """What a finished run found.

    Attributes:
        folder: the run's.
        config: its configuration.
        summary: the content of summary.json.
        curve: its validations.
        test: of the weights that validated best, task by task.
    """

    folder: Path
    config: ExperimentConfig
    summary: Mapping[str, Any]
    curve: Curve
    test: EvaluationResult

    @property
    def seed(self) -> int:
        """The configuration's."""
        return self.config.seed

    @property
    def seconds(self) -> float:
        """Of meta-training and its validations."""
        return float(self.summary["seconds"])

    @property
    def data(self) -> Mapping[str, str]:
        """By split, the digest of the classes that it draws on; of older versions none."""
        return self.summary.get("data") or {}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.folder)


def is_finished(folder: Path) -> bool:
    """Whether a run in this folder has ended with a summary."""
    return (folder / SUMMARY).is_file()


def read_result(folder: Path) -> RunResult:
    """The result of the finished run in a folder.

    Raises:
        RunError: a file cannot be read, or is not one that a finished run writes, or the run is of
            a version that did not keep its test task by task.
    """
    summary = read_summary(folder)
    if not summary.get("per_task"):
        what = f"{folder / SUMMARY} has no test task by task, as runs of older versions"
        raise RunError(f"{what}: train the run anew")
    config = validated(ExperimentConfig, read_yaml(folder / CONFIG), str(folder / CONFIG))
    lines = read_metrics(folder)
    if not any(line.get("validation") for line in lines):
        raise RunError(f"{folder / METRICS} has no validation: train the run anew")
    return result_from(folder, config, summary, lines)


def result_from(
    folder: Path,
    config: ExperimentConfig,
    summary: Mapping[str, Any],
    lines: list[dict[str, Any]],
) -> RunResult:
    """The result in what a run wrote; `lines` of metrics have a validation."""
    curve = curve_of(lines, summary.get("clock") or ())
    found = RunResult(folder, config, summary, curve, _test_of(summary))
    vars(found)["metrics"] = lines
    return found


def curve_of(lines: Sequence[Mapping[str, Any]], clock: Sequence[float]) -> Curve:
    """The validations in lines of metrics, with the seconds of each as far as they are known."""
    validations = [line for line in lines if line.get("validation")]
    times = [*clock, *[None] * len(validations)]
    return tuple(
        Point(
            line["iteration"],
            _number(line["validation"]["mean"]),
            _number(line["validation"]["interval"]),
            seconds,
        )
        for line, seconds in zip(validations, times, strict=False)
    )


def _number(value: float | None) -> float:
    """A number of a file, in which null stands for NaN and Inf."""
    return math.nan if value is None else value


def _test_of(summary: Mapping[str, Any]) -> EvaluationResult:
    test, table = summary["test"], summary.get("per_class")
    return EvaluationResult(
        test["metric"],
        torch.tensor(list(map(_number, summary["per_task"])), dtype=torch.float64),
        test["inner_steps"],
        transductive=tuple(test["transductive"]),
        training_classes=test.get("training_classes"),
        seed=summary.get("seed", 0),
        per_class=None
        if table is None
        else torch.tensor([list(map(_number, row)) for row in table], dtype=torch.float64),
    )
