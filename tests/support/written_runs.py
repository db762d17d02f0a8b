"""Run folders written by hand: figures that a test knows, and no training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metaplug.experiments.configuration import ExperimentConfig, to_yaml
from metaplug.experiments.study.cells import cells_of
from metaplug.experiments.study.folder import begin
from metaplug.experiments.study.schema import read_study

STUDY = """\
base:
  tasks: {source: sinusoid, shots: 3, queries: 3}
  model: {name: mlp, settings: {hidden: [4]}}
  learner: {inner_steps: 2}
  training: {iterations: 30, tasks_per_batch: 4, validate_every: 10, test_tasks: 4}
variants: [maml, maml+gradient-sharing]
axes: {learner.inner_lr: [0.01, 0.1]}
seeds: 2
"""

TEST = (0.4, 0.5, 0.6, 0.5)
"""Values of a test, task by task."""


def write_run(
    folder: Path,
    config: ExperimentConfig,
    *,
    curve: Sequence[float] = (0.3, 0.4, 0.5),
    test: Sequence[float] | None = TEST,
    metric: str = "accuracy",
    inner: Mapping[str, Sequence[float | None]] | None = None,
    figures: Mapping[str, float] | None = None,
) -> Path:
    """Write a run with a validation every 10 iterations, each after 2 more seconds.

    Args:
        test: None leaves the run unfinished, after its last validation.
        inner: of every validation, its losses, cosines and rates by inner step.
    """
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    lines = []
    for iteration in range(1, 10 * len(curve) + 1):
        line: dict[str, Any] = {
            "iteration": iteration,
            "outer_loss": 2 - iteration / 50,
            "meta_gradient_norm": 1.0,
            "meta_lr": 0.001,
            "figures": figures or {},
        }
        if iteration % 10 == 0:
            mean = curve[iteration // 10 - 1]
            line["validation"] = {"metric": metric, "mean": mean, "interval": 0.02}
            if inner is not None:
                line["validation"]["inner"] = inner
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    session = {"command": f"metaplug study {folder.parent.name}", "began": "2026-01-01"}
    (folder / "run.json").write_text(json.dumps({"sessions": [session]}))
    if test is not None:
        summary = {
            "test": {
                "metric": metric,
                "mean": sum(test) / len(test),
                "interval": 0.1,
                "num_tasks": len(test),
                "inner_steps": 2,
                "transductive": [],
            },
            "per_task": list(test),
            "best_validation": {"iteration": 10, "mean": max(curve)},
            "iterations": config.training.iterations,
            "plugins": {},
            "seconds": 2.0 * len(curve),
            "clock": [2.0 * (place + 1) for place in range(len(curve))],
            "versions": {"metaplug": "0.1.0", "torch": "2.14.1"},
            "device": "cpu",
            "threads": 1,
            "precision": "float32",
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_study(
    folder: Path, text: str = STUDY, leave_out: Sequence[str] = (), **options: Any
) -> Path:
    """Write a study and all its cells; sharing gains 0.2 in every test task and validation.

    At the larger inner rate everything is worse by 0.1.

    Args:
        leave_out: the labels of cells that have not begun.
        options: of `write_run`.
    """
    folder.mkdir(parents=True)
    file = folder / "study.yaml"
    file.write_text(text)
    study = read_study(file)
    cells = cells_of(study, str(file))
    begin(study, cells, folder)
    file.write_text(text)  # as somebody wrote it
    for cell in cells:
        if cell.label in leave_out:
            continue
        shares = bool(cell.config.plugins)
        gain = 0.2 * shares - 0.1 * (cell.config.learner.inner_lr == 0.1) + cell.seed / 100
        given = {"curve": (0.3, 0.4, 0.5), "test": TEST, **options}
        given["curve"] = [value + gain for value in given["curve"]]
        given["test"] = [value + gain for value in given["test"]]
        if shares:
            given["figures"] = {
                f"gradient-sharing.{name}/{k}": 0.5 + k / 10
                for name in ("gate", "momentum")
                for k in range(2)
            }
        write_run(folder / "cells" / cell.digest, cell.config, **given)
    return folder
