"""A search for people: its progress, and the table of its best trials."""

from __future__ import annotations

from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from metaplug.evaluation.history import Record
from metaplug.experiments.build import Experiment
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.tuning import Outcome, Trial
from metaplug.experiments.tuning.ranges import choice_text
from metaplug.report.console import line, new_table, warn
from metaplug.report.terminal import heading, show_own_code, value_text

_SHOWN = 10
"""Trials in the table."""


class TuningProgress:
    """Show trials: on a terminal a bar with the time left, elsewhere a line per trial.

    Args:
        console: where to.
        config: what all trials share.
    """

    def __init__(self, console: Console, config: ExperimentConfig) -> None:
        self.console, self._iterations = console, config.training.iterations
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}{task.fields[best]}", markup=False),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._validation, self._is_shown = "", False

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._bar.stop()

    def begin(self, outcome: Outcome) -> None:
        """Show what earlier processes found."""
        if done := len(outcome.trials):
            line(f"going on after {done} trial{'s' * (done != 1)}", console=self.console)
        # Not earlier: trials of an earlier process must not count as speed.
        fields: dict[str, Any] = {
            "total": outcome.asked,
            "completed": done,
            "now": "",
            "best": _best(outcome),
        }
        self._task = self._bar.add_task("trials", **fields)

    def show_experiment(self, experiment: Experiment) -> None:
        """Say once what is trained, and which code of the user's own."""
        if not self._is_shown:
            line(heading(experiment), console=self.console)
            show_own_code(experiment)
        self._is_shown = True

    def record(self, number: int, record: Record) -> None:
        """Show one more iteration of a trial."""
        if (result := record.validation) is not None:
            self._validation = f"  validation {value_text(result.metric, result.mean)}"
        now = f"iteration {record.step.iteration}/{self._iterations}{self._validation}"
        self._update(description=f"trial {number}", now=now)

    def end_trial(self, outcome: Outcome) -> None:
        """Show how the newest trial ended."""
        self._validation, trial = "", outcome.trials[-1]
        self._update(completed=len(outcome.trials), best=_best(outcome))
        if trial.error is not None:
            warn(f"trial {trial.number} failed: {trial.error}")
        elif not self.console.is_terminal:
            value = value_text(outcome.metric, trial.mean, trial.interval)
            ended = f"pruned after iteration {trial.iterations}, at " * (trial.state == "pruned")
            best = _best(outcome)
            line(
                f"trial {trial.number}: {ended}{outcome.metric} {value}{best}", console=self.console
            )

    def _update(self, **fields: Any) -> None:
        if self._task is not None:
            self._bar.update(self._task, **fields)


def _best(outcome: Outcome) -> str:
    best = outcome.best
    if best is None:
        return ""
    return f"  best {value_text(outcome.metric, best.mean)} (trial {best.number})"


def tuning_report(outcome: Outcome) -> RenderableType:
    """Show the best trials, how the others ended, and which fields matter."""
    paths = [*outcome.search]
    table = new_table(
        "Best trials, by validation", "trial", outcome.metric, "after iteration", *paths
    )
    for trial in outcome.ranked[:_SHOWN]:
        table.add_row(*_row(outcome, trial))
    best, tasks = outcome.best, outcome.config.training.validation_tasks
    counts = ", ".join(
        f"{outcome.count(state)} {state}" for state in ("complete", "pruned", "failed")
    )
    parts: list[RenderableType] = [table, Text(f"{len(outcome.trials)} trials: {counts}.")]
    if outcome.importance:
        shares = ", ".join(f"{path} {share:.0%}" for path, share in outcome.importance.items())
        parts.append(Text(f"Share of the spread between complete trials: {shares}."))
    if best is not None:
        parts.append(
            Text(
                f"The value of trial {best.number} is the best of {len(outcome.trials)} trials on "
                f"the same {tasks} validation tasks, so it is optimistic: report the test of "
                "metaplug train best.yaml instead."
            )
        )
    return Group(*parts)


def _row(outcome: Outcome, trial: Trial) -> list[str]:
    value = value_text(outcome.metric, trial.mean, trial.interval)
    fields = [_short(trial.values[path]) for path in outcome.search]
    return [str(trial.number), value, str(trial.iteration), *fields]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else choice_text(value)
