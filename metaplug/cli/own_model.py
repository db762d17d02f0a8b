"""Which code of the user's own a command runs as its model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metaplug.report.console import line

if TYPE_CHECKING:
    from metaplug.experiments.build import Experiment


def say_model(experiment: Experiment, before: str = "") -> None:
    """Say which code of the user's own made the model, where some did."""
    from metaplug.models.factories import origin_of

    model = experiment.config.model
    if text := origin_of(model.name, model.settings):
        line(before + text)
