"""A run that is stopped and goes on has every row once."""

from __future__ import annotations

import csv
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from metaplug import RequestError
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.runs import read_metrics, train

from my_idea import MyIdea

CONFIG = ExperimentConfig.model_validate(
    {
        "model": {"name": "mlp", "settings": {"hidden": [4]}},
        "tasks": {"source": "sinusoid", "shots": 3, "queries": 3},
        "learner": {"inner_lr": 0.01, "inner_steps": 1},
        "training": {
            "iterations": 6,
            "tasks_per_batch": 2,
            "validate_every": 2,
            "validation_tasks": 2,
            "test_tasks": 2,
        },
        "runtime": {"device": "cpu"},
    }
)


def test_a_row_for_every_validation_also_after_a_stop(tmp_path: Path) -> None:
    make, asked = partial(MyIdea, name="rows", separator=";"), count(1)
    assert train(CONFIG, tmp_path, loggers=[make()], stop=lambda: next(asked) == 3) is None
    assert train(CONFIG, tmp_path, loggers=[make()], resume=True) is not None
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    wanted = [line for line in read_metrics(tmp_path) if "validation" in line]
    assert [int(row["iteration"]) for row in rows] == [2, 4, 6]
    for row, line in zip(rows, wanted, strict=True):
        assert float(row["outer_loss"]) == line["outer_loss"]
        assert float(row["validation/interval"]) == line["validation"]["interval"]


def test_settings_that_are_wrong_are_refused() -> None:
    with pytest.raises(RequestError, match="separator = '.': input should be ',', ';' or 'tab'"):
        MyIdea(separator=".")
