"""A short training, as `metaplug train` makes it: accuracy on unseen tasks, and seconds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaplug.evaluation.history import Record
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.runs import train


def run(work: dict[str, Any], device: str, emit: Callable[[str, Any], None]) -> str | None:
    """Train, and tell each validation, then the test, as a row."""
    config = ExperimentConfig.model_validate(work)
    begun = time.monotonic()

    def validated(record: Record) -> None:
        if record.validation is not None:
            row = {
                "iteration": record.step.iteration,
                "validation": record.validation.mean,
                "metric": record.validation.metric,
                "seconds": round(time.monotonic() - begun, 2),
            }
            emit("row", row)

    with tempfile.TemporaryDirectory() as folder:
        summary = train(config, Path(folder) / "run", on_record=validated)
    assert summary is not None
    kept = ("test", "best_validation", "iterations", "seconds", "precision", "batching", "versions")
    whole = round(time.monotonic() - begun, 2)
    emit("row", {**{key: summary[key] for key in kept}, "whole": whole})
    return None
