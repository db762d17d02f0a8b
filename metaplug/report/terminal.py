"""Lines and progress of a run, for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from rich.console import Console, RenderableType
from rich.progress import Progress, TaskID
from rich.text import Text

from metaplug.contract import plugin_files
from metaplug.evaluation.history import Record
from metaplug.evaluation.results import (
    EvaluationResult,
    training_classes_text,
    transductive_text,
)
from metaplug.evaluation.scores import better, named
from metaplug.execution.free_memory import size_text
from metaplug.execution.memory import peak_memory, reset_peak_memory
from metaplug.experiments.build import Experiment, task_form
from metaplug.models.factories import origin_of
from metaplug.report.console import line, new_bar
from metaplug.report.sparkline import drawn_by, sparkline


def value_text(metric: str, mean: float | None, interval: float | None = None) -> str:
    """Write a mean and half its interval: "76.70 ± 1.20 %", or "0.1234 ± 0.0100" for an error."""
    if mean is None or not math.isfinite(mean):
        return "not finite"
    scale, digits, unit = scale_of(metric)
    spread = "" if interval is None else f" ± {interval * scale:.{digits}f}"
    return f"{mean * scale:.{digits}f}{spread}{unit}"


def scale_of(metric: str) -> tuple[int, int, str]:
    """Give the factor, the digits and the unit that a metric is shown with."""
    score = named(metric)
    return (100, 2, " %") if score is not None and score.is_share else (1, 4, "")


def result_line(result: Mapping[str, Any]) -> str:
    """Write an evaluation, in the form of `result_values`, as one line."""
    metric, tasks, interval = result["metric"], result["num_tasks"], result["interval"]
    steps = f"{result['inner_steps']} inner step{'s' * (result['inner_steps'] != 1)}"
    if tasks == 1:
        value = value_text(metric, result["mean"])
        return f"{metric} {value} (1 task, which gives no interval, {steps})"
    what, spread = "95 % interval", interval
    if result.get("interval_method") == "bootstrap":
        low, high = (value_text(metric, result[bound]) for bound in ("low", "high"))
        what, spread = f"95 % bootstrap interval {low.removesuffix(' %')} to {high}", None
    equal = ", all of them equal" if interval == 0 else ""
    value = value_text(metric, result["mean"], spread)
    return f"{metric} {value} ({what} over {tasks} tasks{equal}, {steps})"


def class_lines(result: Mapping[str, Any]) -> list[str]:
    """Write the accuracy of each class of an evaluation, a line each; none without a table."""
    return [
        f"class {row['class']}: "
        f"{value_text('accuracy', row['mean'], None if row['num_tasks'] == 1 else row['interval'])}"
        f" ({row['num_tasks']} task{'s' * (row['num_tasks'] != 1)})"
        for row in result.get("by_class", ())
    ]


def statements(result: Mapping[str, Any]) -> list[str]:
    """Say, a line each, what a reader of an evaluation must know besides its value."""
    seen = result.get("training_classes")
    texts = [transductive_text([reason]) for reason in result["transductive"] or ("no",)]
    return [*texts, *([training_classes_text(seen)] if seen else [])]


def skipped_line(skipped: int, iterations: int) -> str:
    """Write how many batches were left out: "3 of 400 batches were skipped"."""
    count = f"{skipped} of {iterations} batches {'was' if skipped == 1 else 'were'} skipped"
    return f"{count}, for NaN or Inf: metrics.jsonl says where"


def heading(experiment: Experiment) -> str:
    """Write in one line what a run is."""
    config, learner = experiment.config, experiment.learner
    plugins = " → ".join(plugin.name for plugin in learner.chain.plugins) or "no plugins"
    return (
        f"{config.algorithm} ({plugins}) on {config.tasks.source}, {' '.join(task_form(config))}, "
        f"{config.model.name}, seed {config.seed}, {learner.engine.device}"
    )


def show_own_code(experiment: Experiment, label: str = "") -> None:
    """Say which code of the user's own made the model and the plugins, if any did."""
    model = experiment.config.model
    if text := origin_of(model.name, model.settings):
        line(label + text)
    for plugin in experiment.learner.chain.plugins:
        if (origin := plugin_files.origin_of(type(plugin))) is not None:
            digest = f"sha256 {origin['sha256'][:12]}…"
            line(f"{label}the plugin '{plugin.name}' is the file {origin['path']} ({digest})")


def curve_text(metric: str, values: Sequence[float]) -> str:
    """Write "▁▅█▇  first 20.00 %, best 61.20 %, last 60.10 %"; the best of an error is the least.

    Args:
        values: the validations so far, in their order; at least one.
    """
    best = math.nan
    for value in filter(math.isfinite, values):
        best = value if math.isnan(best) or better(metric, value, best) else best
    named = {"first": values[0], "best": best, "last": values[-1]}
    told = ", ".join(f"{name} {value_text(metric, value)}" for name, value in named.items())
    return f"{sparkline(values)}  {told}"


class _Bar(Progress):
    """A progress bar with one more line below it.

    Attributes:
        below: that line; empty for none.
    """

    below = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.below:
            yield Text(self.below, no_wrap=True, overflow="ellipsis")


class TrainingProgress:
    """Show iterations: on a terminal a bar with the time left, elsewhere a line per validation.

    Below the bar stands the curve of the validations of one run, from the second on.

    Args:
        console: where to.
        total: iterations of all runs together.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total = console, total
        self._bar = new_bar(
            console, "{task.description}", "{task.fields[loss]}{task.fields[validation]}", _Bar
        )
        self._task: TaskID | None = None
        self._done = self._skipped = 0
        self._validation = ""
        self._curve: list[float] = []
        self._label: str | None = None
        self._measured: torch.device | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._bar.stop()

    def begin(self, done: int, skipped: int = 0, validations: Sequence[float] = ()) -> None:
        """Set what there was before this process: iterations, skipped ones, and validations."""
        self._done, self._skipped, self._curve = done, skipped, [*validations]

    def measure_memory(self, experiment: Experiment) -> None:
        """Measure the next iteration's peak of memory, and say it once that is done."""
        self._measured = experiment.learner.engine.device
        reset_peak_memory(self._measured)

    def _show_memory(self, device: torch.device) -> None:
        if (peak := peak_memory(device)) is not None:
            what = "given out by torch" if device.type == "cuda" else "of the whole process"
            text = f"memory: {size_text(peak)} at the peak of the first step, {what}"
            line(text, console=self.console)

    def record(self, record: Record, label: str = "training") -> None:
        """Show one more iteration, of the run that `label` names."""
        if self._measured is not None:
            self._show_memory(self._measured)
            self._measured = None
        step, result = record.step, record.validation
        self._done += 1
        self._skipped += step.skipped is not None
        if result is not None:
            value = value_text(result.metric, result.mean, result.interval)
            self._validation = f"  validation {value}"
            self._add(result, label)
        skipped = f"  {self._skipped} skipped" if self._skipped else ""
        loss = f"loss {step.outer_loss:.4f}{skipped}"
        if self.console.is_terminal:
            self._show(label, loss)
        elif result is not None:
            text = f"{label}: iteration {step.iteration}  {loss}{self._validation}"
            line(text, console=self.console)

    def _add(self, result: EvaluationResult, label: str) -> None:
        """Lengthen the curve by a validation; another run begins another one."""
        self._curve = [*(self._curve if self._label in (None, label) else ()), result.mean]
        self._label = label
        if len(self._curve) > 1 and drawn_by(self.console.encoding):
            self._bar.below = f"validation  {curve_text(result.metric, self._curve)}"
        else:
            self._bar.below = ""

    def _show(self, label: str, loss: str) -> None:
        fields: dict[str, Any] = {"loss": loss, "validation": self._validation}
        if self._task is None:
            # Not earlier: iterations of an earlier process must not count as speed.
            self._task = self._bar.add_task(label, total=self.total, completed=self._done, **fields)
        self._bar.update(self._task, description=label, completed=self._done, **fields)
