"""One trial: a run in a folder of its own, whose validations decide whether it goes on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaplug.errors import MetaplugError, one_line
from metaplug.evaluation.history import Record
from metaplug.evaluation.results import Metric
from metaplug.evaluation.scores import better
from metaplug.experiments.build import Experiment
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.runs import read_metrics, train
from metaplug.experiments.runs.folder import BusyError
from metaplug.experiments.runs.training import EndedError
from metaplug.experiments.tuning.outcome import State
from metaplug.tasks.sources import TaskSource


@dataclass
class Watch:
    """A trial that trains, and that a poor validation ends.

    Attributes:
        is_poor: asked with the iteration and the mean of every finite validation.
        metric: of the validations.
        best: its best validation so far, as a run's metrics have it.
        iteration: of `best`.
        iterations: done so far.
        is_pruned: whether a validation was poor.
    """

    is_poor: Callable[[int, float], bool]
    metric: Metric
    best: Mapping[str, Any] | None = None
    iteration: int | None = None
    iterations: int = 0
    is_pruned: bool = False

    def see(self, iteration: int, validation: Mapping[str, Any] | None) -> None:
        """Take note of an iteration.

        Raises:
            EndedError: the validation is poor.
        """
        self.iterations = iteration
        mean = None if validation is None else validation["mean"]
        if validation is None or mean is None or not math.isfinite(mean):
            return
        if self.best is None or better(self.metric, mean, self.best["mean"]):
            self.best, self.iteration = validation, iteration
        if self.is_poor(iteration, mean):
            self.is_pruned = True
            raise EndedError


def run_trial(
    watch: Watch,
    config: ExperimentConfig,
    tasks: TaskSource,
    folder: Path,
    *,
    on_build: Callable[[Experiment], None],
    on_record: Callable[[Record], None],
    stop: Callable[[], bool],
) -> tuple[State, str | None] | None:
    """Train a trial, or go on with it, without its test.

    Returns:
        How it ended, and why it failed; None where it was stopped on the way.

    Raises:
        RequestError: another process trains in the folder.
        RunError: a file cannot be written or read, which is no fault of the trial.
    """

    def catch_up() -> None:
        # What an earlier process saw, in the same order, so it is pruned where it was.
        for line in read_metrics(folder):
            watch.see(line["iteration"], line.get("validation"))

    def begin(experiment: Experiment) -> None:
        on_build(experiment)
        if experiment.learner.iteration:
            catch_up()

    def record(made: Record) -> None:
        on_record(made)
        found = made.validation
        seen = None if found is None else {"mean": found.mean, "interval": found.interval}
        watch.see(made.step.iteration, seen)

    try:
        with warnings.catch_warnings():
            # A search goes where the inner loop diverges, too, and validation judges that.
            warnings.filterwarnings("ignore", "adaptation raises the support loss", UserWarning)
            ended = train(
                config,
                folder,
                resume=True,
                on_start=begin,
                on_record=record,
                stop=stop,
                tasks=tasks,
                test=False,
            )
        if ended is not None and not watch.iterations:  # somebody finished it with its test
            with suppress(EndedError):
                catch_up()
    except MetaplugError as error:
        if isinstance(error, BusyError) or _is_of_the_system(error):
            raise
        return "failed", one_line(error, 1000)
    if watch.is_pruned:
        return "pruned", None
    if ended is None:
        return None
    if watch.best is None:
        return "failed", "no validation was finite: try smaller learning rates"
    return "complete", None


def _is_of_the_system(error: MetaplugError) -> bool:
    """Whether a disk or a file is to blame, so the next trial would fare no better."""
    cause = error.__cause__
    return isinstance(cause, OSError) or isinstance(cause and cause.__context__, OSError)
