"""Tables and progress for people, on a rich console."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from textwrap import dedent
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from metaplug.contract.hookspecs import KINDS
from metaplug.evaluation.history import Record
from metaplug.evaluation.results import EvaluationResult, training_classes_text, transductive_text
from metaplug.experiments.build import Experiment, task_form
from metaplug.experiments.comparison import Acceleration, Comparison
from metaplug.experiments.configuration import Resolved, flatten
from metaplug.report.catalogue import Entry, plain
from metaplug.report.console import line, new_table


def value_text(metric: str, mean: float | None, interval: float | None = None) -> str:
    """A mean and half its interval: "76.70 ± 1.20 %" for an accuracy, "0.1234 ± 0.0100" for an error."""
    if mean is None or not math.isfinite(mean):
        return "not finite"
    scale, digits, unit = (100, 2, " %") if metric == "accuracy" else (1, 4, "")
    spread = "" if interval is None else f" ± {interval * scale:.{digits}f}"
    return f"{mean * scale:.{digits}f}{spread}{unit}"


def result_line(result: Mapping[str, Any]) -> str:
    """One line for an evaluation in the form of `result_values`."""
    metric, tasks, interval = result["metric"], result["num_tasks"], result["interval"]
    steps = "1 inner step" if result["inner_steps"] == 1 else f"{result['inner_steps']} inner steps"
    if tasks == 1:
        return f"{metric} {value_text(metric, result['mean'])} (1 task, which gives no interval, {steps})"
    what, spread = "95 % interval", interval
    if result.get("interval_method") == "bootstrap":
        low, high = (value_text(metric, result[bound]) for bound in ("low", "high"))
        what, spread = f"95 % bootstrap interval {low.removesuffix(' %')} to {high}", None
    equal = ", all of them equal" if interval == 0 else ""
    return f"{metric} {value_text(metric, result['mean'], spread)} ({what} over {tasks} tasks{equal}, {steps})"


def statements(result: Mapping[str, Any]) -> list[str]:
    """A line for each thing that a reader of an evaluation in the form of `result_values` must know beside its value."""
    seen = result.get("training_classes")
    return [transductive_text([reason]) for reason in result["transductive"] or ("no",)] + (
        [training_classes_text(seen)] if seen else []
    )


def skipped_line(skipped: int, iterations: int) -> str:
    """One line on batches that were left out: "3 of 400 batches were skipped"."""
    return f"{skipped} of {iterations} batches {'was' if skipped == 1 else 'were'} skipped, for NaN or Inf: metrics.jsonl says where"


def heading(experiment: Experiment) -> str:
    """One line on what a run is."""
    config, chain = experiment.config, experiment.learner.chain
    plugins = " → ".join(plugin.name for plugin in chain.plugins) or "no plugins"
    form = " ".join(task_form(config))
    return (
        f"{config.algorithm} ({plugins}) on {config.tasks.source}, {form}, {config.model.name}, seed {config.seed}, "
        f"{experiment.learner.engine.device}"
    )


def memory_lines(experiment: Experiment) -> tuple[str, str | None]:
    """One line on what a meta-step will take of memory, and a warning where that is more than is free, else None."""
    learner, training = experiment.learner, experiment.config.training
    try:
        batch = experiment.tasks.train.batch(
            learner.iteration, range(min(2, training.tasks_per_batch))
        )
        estimate = learner.estimate_memory(
            batch, tasks_per_batch=training.tasks_per_batch, iterations=training.iterations
        )
    except (
        Exception
    ) as error:  # a run that would go well must not end here; what would end it says so itself
        return f"memory: no estimate ({type(error).__name__}: {error})", None
    return estimate.text, estimate.warning


def show_memory(experiment: Experiment, label: str = "") -> None:
    """Say it on the console, of the run that `label` names."""
    text, warning = memory_lines(experiment)
    line(f"{label}{text}")
    if warning:
        line(f"metaplug: warning: {label}{warning}", style="yellow")


class TrainingProgress:
    """Shows iterations as they are done: a bar with time left on a terminal, a plain line for each validation elsewhere.

    Args:
        console: where to.
        total: iterations of all runs together.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total = console, total
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}{task.fields[validation]}"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._done = self._skipped = 0
        self._validation = ""

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self._bar.stop()

    def begin(self, done: int, skipped: int = 0) -> None:
        """Tell that so many iterations were done before this process, and how many of them were skipped."""
        self._done, self._skipped = done, skipped

    def record(self, record: Record, label: str = "training") -> None:
        """Show one iteration more, of the run that `label` names."""
        self._done, self._skipped = (
            self._done + 1,
            self._skipped + (record.step.skipped is not None),
        )
        if record.validation is not None:
            result = record.validation
            self._validation = (
                f"  validation {value_text(result.metric, result.mean, result.interval)}"
            )
        loss = f"loss {record.step.outer_loss:.4f}{f'  {self._skipped} skipped' if self._skipped else ''}"
        if self.console.is_terminal:
            self._show(label, loss)
        elif record.validation is not None:
            line(
                f"{label}: iteration {record.step.iteration}  {loss}{self._validation}",
                console=self.console,
            )

    def _show(self, label: str, loss: str) -> None:
        fields: dict[str, Any] = {"loss": loss, "validation": self._validation}
        if (
            self._task is None
        ):  # not earlier, as iterations of an earlier process must not count as speed
            self._task = self._bar.add_task(label, total=self.total, completed=self._done, **fields)
        self._bar.update(self._task, description=label, completed=self._done, **fields)


def comparison_report(comparison: Comparison) -> RenderableType:
    """The table of a comparison, each variant with its seeds below it, and in words what the columns are."""
    bases = {variant.label: comparison.base(variant.label) for variant in comparison.variants}
    several = any(
        base not in (None, comparison.baseline) for base in bases.values()
    )  # or both accelerations would be the same
    over = ["over its base"] if several else []
    table = new_table(
        "",
        "variant",
        "acceleration",
        *over,
        f"test {comparison.metric}",
        f"minus {comparison.baseline}",
        "seconds",
    )
    table.columns[0].no_wrap = True
    for variant in comparison.variants:
        label, baseline = variant.label, variant.label == comparison.baseline
        acceleration, test, difference = (
            comparison.acceleration(label),
            comparison.test(label),
            comparison.difference(label),
        )
        base = bases[label]
        own = None if base is None else comparison.acceleration(label, base)
        table.add_row(
            Text(label, style="bold"),
            "baseline" if baseline else _mean_text(acceleration),
            *([] if not several else [""] if own is None else [_mean_text(own)]),
            value_text(test.metric, test.mean, test.interval),
            "" if baseline else difference_text(difference),
            f"{fmean(run.seconds for run in comparison.runs[label]):.0f}",
        )
        for seed, run in enumerate(comparison.runs[label]):
            speed = (
                f"best after {acceleration.baseline_iterations[seed]}"
                if baseline
                else _seed_text(acceleration, seed)
            )
            beside = [] if not several else [""] if own is None else [_seed_text(own, seed)]
            table.add_row(
                f"  seed {run.seed}",
                speed,
                *beside,
                value_text(test.metric, run.test.mean),
                "",
                f"{run.seconds:.0f}",
                style="dim",
            )
        table.add_section()
    targets = ", ".join(
        value_text(comparison.metric, target)
        for target in comparison.acceleration(comparison.baseline).targets
    )
    seeds = ", ".join(map(str, comparison.seeds))
    notes = [
        f"Target: the best validation {comparison.metric} that {comparison.baseline} reaches; {targets} for seed {seeds}.",
        "Acceleration: (iterations that it needs / iterations that the other needs − 1) · 100 %, mean over the seeds that get there.",
        "Test: unseen tasks, by the weights that validated best; 95 % intervals over the tasks of all seeds, differences task by task.",
        "Seconds: of meta-training and its validations, for one seed.",
    ]
    if several:
        notes.insert(
            2,
            "Over its base: the same against the variant that this one extends by plugins, with that variant's best as the target.",
        )
    by_label = {
        label: transductive_text(comparison.test(label).transductive) for label in comparison.runs
    }
    if len(set(by_label.values())) == 1:
        notes.append(f"T{by_label[comparison.baseline][1:]}.")
    else:
        notes += [f"{label}: {text}." for label, text in by_label.items()]
    return Group(table, *(Text(note, style="dim") for note in notes))


def difference_text(difference: EvaluationResult) -> str:
    """A difference of two means with its sign: "+7.40 ± 0.90 pp", percentage points, for accuracies."""
    scale, digits, unit = (100, 2, " pp") if difference.metric == "accuracy" else (1, 4, "")
    return f"{difference.mean * scale:+.{digits}f} ± {difference.interval * scale:.{digits}f}{unit}"


def _mean_text(acceleration: Acceleration) -> str:
    if acceleration.mean_percent is None:
        return "not reached"
    count = len(acceleration.iterations)
    missed = f" ({acceleration.reached} of {count} seeds)" if acceleration.reached < count else ""
    return _percent(acceleration.mean_percent) + missed


def _seed_text(acceleration: Acceleration, seed: int) -> str:
    before, needed = acceleration.baseline_iterations[seed], acceleration.iterations[seed]
    return (
        f"{_percent(acceleration.percent[seed])} ({before} → {needed})"
        if needed
        else _percent(None)
    )


def _percent(value: float | None) -> str:
    return "not reached" if value is None else f"{value:+.0f} %"


def explanation(
    resolved: Resolved,
    order: Mapping[str, Sequence[str]],
    settings: Mapping[str, Mapping[str, Any]],
    summary: str,
) -> RenderableType:
    """What a configuration comes to.

    Args:
        resolved: with every value's origin.
        order: by hook, the names of its plugins in the order of application.
        settings: by plugin, all of its settings.
        summary: what the preset is.
    """
    hooks = new_table(
        "Hooks, in the order in which a meta-step calls them",
        "hook",
        "kind",
        "plugins, in the order of application",
    )
    for hook in (hook for hook in KINDS if hook in order):
        hooks.add_row(hook, KINDS[hook], " → ".join(order[hook]))
    plugins = new_table("Plugins, in the order of the list", "plugin", "setting", "value", "origin")
    for name, values in settings.items():
        for row, (field, value) in enumerate(values.items()):
            plugins.add_row(
                name if row == 0 else "",
                field,
                _shown(value),
                _origin(resolved, f"plugins.{name}.{field}"),
            )
        if not values:
            plugins.add_row(name, "no settings")
        plugins.add_section()
    config = new_table("Configuration", "field", "value", "origin")
    config.add_row("preset", _shown(resolved.config.algorithm), _origin(resolved, "preset"))
    for path, value in flatten(
        resolved.config.model_dump(mode="json", exclude={"preset", "plugins"})
    ).items():
        config.add_row(path, _shown(value), _origin(resolved, path))
    algorithm = Text.assemble(
        (resolved.config.algorithm, "bold"), f": {summary}" if summary else "", "\n"
    )
    if not settings:
        return Group(
            algorithm,
            Text("No plugins: plain MAML, meta-gradients through every inner step."),
            config,
        )
    return Group(algorithm, *([hooks] if order else []), plugins, config)


def _origin(resolved: Resolved, path: str) -> Text:
    origin = resolved.origins.get(path, "default")
    return Text(origin, style="dim" if origin == "default" else "bold")


def catalogue_table(entries: Sequence[Entry], title: str) -> RenderableType:
    """The list of installed parts."""
    table = new_table(title, "name", "kind", "from", "summary")
    for entry in entries:
        table.add_row(
            entry.name,
            entry.kind,
            entry.origin,
            Text(entry.error, style="red") if entry.error else Text(entry.summary),
        )
    return table


def catalogue_page(entry: Entry) -> RenderableType:
    """One installed part: what it says of itself, its hooks and its settings."""
    parts: list[RenderableType] = [
        Text(f"{entry.name}: a {entry.kind} of {entry.origin}", style="bold"),
        Text(""),
    ]
    if entry.error:
        return Group(*parts, Text(entry.error, style="red"))
    parts += [_documentation(block) for block in entry.documentation.split("\n\n")]
    for what, value in entry.facts.items():
        parts.append(Text.assemble((f"{what}: ", "bold"), value))
    if entry.fields:
        parts += [Text(""), Text("Settings", style="bold")]
    for field in entry.fields:
        form = ", ".join(filter(None, (field.type, field.bounds, f"default {field.default}")))
        parts += [
            Text.assemble((field.name, "cyan"), f"  {form}"),
            Padding(Text(field.description), (0, 0, 0, 4)),
        ]
    return Group(*parts, Text(""))


def _documentation(block: str) -> RenderableType:
    """A paragraph of a docstring, wrapped anew; an indented one, such as equations, as it is."""
    if block.startswith(" "):
        return Padding(Text(dedent(block) + "\n"), (0, 0, 0, 2))
    return Text(" ".join(block.split()) + "\n")


def values_table(title: str, values: Mapping[str, Any]) -> RenderableType:
    """Nested values, a line each."""
    table = new_table(title, "field", "value")
    for path, value in flatten(values).items():
        table.add_row(path, _shown(value))
    return table


def _shown(value: Any) -> Text:
    return Text(plain(value))
