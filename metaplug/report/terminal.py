"""Tables and progress for people, on a rich console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from metaplug.comparison import Acceleration, Comparison
from metaplug.config import Resolved, flatten
from metaplug.experiment import Experiment
from metaplug.history import Record
from metaplug.hookspecs import KINDS
from metaplug.report.catalogue import Entry


def value_text(metric: str, mean: float | None, interval: float | None = None) -> str:
    """A mean and half its interval: "76.70 ± 1.20 %" for an accuracy, "0.1234 ± 0.0100" for an error."""
    if mean is None:
        return "not finite"
    scale, digits, unit = (100, 2, " %") if metric == "accuracy" else (1, 4, "")
    spread = "" if interval is None else f" ± {interval * scale:.{digits}f}"
    return f"{mean * scale:.{digits}f}{spread}{unit}"


def result_line(result: Mapping[str, Any]) -> str:
    """One line for an evaluation in the form of `result_values`."""
    return (
        f"{result['metric']} {value_text(result['metric'], result['mean'], result['interval'])} "
        f"(95 % interval over {result['num_tasks']} tasks, {result['inner_steps']} inner steps)"
    )


def heading(experiment: Experiment) -> str:
    """One line on what a run is."""
    config, chain = experiment.config, experiment.learner.chain
    plugins = " → ".join(plugin.name for plugin in chain.plugins) or "no plugins"
    form = (
        f"{config.tasks.ways}-way {config.tasks.shots}-shot" if experiment.tasks.kind == "classification" else f"{config.tasks.shots}-shot"
    )
    return (
        f"{config.preset} ({plugins}) on {config.tasks.source}, {form}, {config.model.name}, seed {config.seed}, "
        f"{experiment.learner.engine.device}"
    )


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
        self._done = 0
        self._validation = ""

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def begin(self, done: int) -> None:
        """Tell that so many iterations were done before this process."""
        self._done = done

    def record(self, record: Record, label: str = "training") -> None:
        """Show one iteration more, of the run that `label` names."""
        self._done += 1
        if record.validation is not None:
            result = record.validation
            self._validation = f"  validation {value_text(result.metric, result.mean, result.interval)}"
        loss = f"loss {record.step.outer_loss:.4f}"
        if self.console.is_terminal:
            self._show(label, loss)
        elif record.validation is not None:
            print_line(self.console, f"{label}: iteration {record.step.iteration}  {loss}{self._validation}")

    def _show(self, label: str, loss: str) -> None:
        fields: dict[str, Any] = {"loss": loss, "validation": self._validation}
        if self._task is None:  # not earlier, as iterations of an earlier process must not count as speed
            self._task = self._bar.add_task(label, total=self.total, completed=self._done, **fields)
        self._bar.update(self._task, description=label, completed=self._done, **fields)


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print text as exactly one line, whatever the width of the terminal."""
    console.print(" ".join(text.split()), style=style, soft_wrap=True, markup=False, highlight=False)


def comparison_report(comparison: Comparison) -> RenderableType:
    """The table of a comparison, and in words what its columns are."""
    several = len(comparison.seeds) > 1
    table = Table(title=f"{comparison.baseline} and what is compared with it", title_justify="left")
    for column in ("variant", "iterations to target", "acceleration", f"test {comparison.metric}", "over the baseline"):
        table.add_column(column, justify="left" if column == "variant" else "right", vertical="top")
    for variant in comparison.variants:
        label = variant.label
        acceleration, test, difference = comparison.acceleration(label), comparison.test(label), comparison.difference(label)
        baseline = label == comparison.baseline
        table.add_row(
            label,
            _by_seed([_count(needed) for needed in acceleration.iterations]),
            "baseline" if baseline else _acceleration_text(acceleration, several),
            _with_seeds(
                value_text(test.metric, test.mean, test.interval),
                [value_text(test.metric, run.test.mean) for run in comparison.runs[label]] if several else [],
            ),
            "" if baseline else value_text(difference.metric, difference.mean, difference.interval),
        )
    notes = [
        f"The target, for each of the seeds {', '.join(map(str, comparison.seeds))}: the best validation {comparison.metric} that "
        f"'{comparison.baseline}' reaches: "
        + ", ".join(value_text(comparison.metric, target) for target in comparison.acceleration(comparison.baseline).targets)
        + ".",
        "Acceleration: (iterations of the baseline / iterations of the variant − 1) · 100 %, mean over the seeds that reach the target; "
        "as fine as validations are frequent.",
        "Tests: unseen tasks, by the weights that validated best; 95 % intervals over the tasks of all seeds, "
        "for 'over the baseline' on differences task by task.",
    ]
    reasons = {reason for label in comparison.runs for reason in comparison.test(label).transductive}
    notes += [f"Transductive: {reason}." for reason in sorted(reasons)]
    return Group(table, *(Text(note, style="dim") for note in notes))


def _acceleration_text(acceleration: Acceleration, several: bool) -> str:
    mean = acceleration.mean_percent
    seeds = [_percent(value) for value in acceleration.percent]
    if mean is None:
        return "target not reached"
    missed = len(seeds) - acceleration.reached
    head = _percent(mean) + (f" ({acceleration.reached} of {len(seeds)} seeds)" if missed else "")
    return _with_seeds(head, seeds if several else [])


def _percent(value: float | None) -> str:
    return "not reached" if value is None else f"{value:+.0f} %"


def _count(value: int | None) -> str:
    return "not reached" if value is None else str(value)


def _by_seed(texts: Sequence[str]) -> str:
    return " · ".join(texts)


def _with_seeds(head: str, seeds: Sequence[str]) -> str:
    return f"{head}\n[dim]{_by_seed(seeds)}[/dim]" if seeds else head


def explanation(resolved: Resolved, order: Mapping[str, Sequence[str]], settings: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """What a configuration comes to.

    Args:
        resolved: with every value's origin.
        order: by hook, the names of its plugins in the order of application.
        settings: by plugin, all of its settings.
    """
    hooks = _table("Hooks, in the order in which a meta-step calls them", "hook", "kind", "plugins, in the order of application")
    for hook in (hook for hook in KINDS if hook in order):
        hooks.add_row(hook, KINDS[hook], " → ".join(order[hook]))
    plugins = _table("Plugins, in the order of the list", "plugin", "setting", "value")
    for name, values in settings.items():
        for row, (field, value) in enumerate(values.items() or [("", "no settings")]):
            plugins.add_row(name if row == 0 else "", field, _shown(value))
        plugins.add_section()
    config = _table("Configuration", "field", "value", "origin")
    for path, value in flatten(resolved.config.model_dump(mode="json", exclude={"plugins"})).items():
        origin = resolved.origins.get(path, "default")
        config.add_row(path, _shown(value), Text(origin, style="dim" if origin == "default" else "bold"))
    if not settings:
        return Group(Text("No plugins: plain MAML, meta-gradients through every inner step."), config)
    return Group(*([hooks] if order else []), plugins, config)


def catalogue_table(entries: Sequence[Entry], title: str) -> RenderableType:
    """The list of installed parts."""
    table = _table(title, "name", "kind", "from", "summary")
    for entry in entries:
        table.add_row(entry.name, entry.kind, entry.distribution, Text(entry.error, style="red") if entry.error else Text(entry.summary))
    return table


def catalogue_page(entry: Entry) -> RenderableType:
    """One installed part: what it says of itself, its hooks and its settings."""
    parts: list[RenderableType] = [Text(f"{entry.kind} {entry.name}, of {entry.distribution}", style="bold")]
    if entry.error:
        return Group(*parts, Text(entry.error, style="red"))
    parts += [Text(""), Text(entry.documentation), Text("")]
    for what, value in entry.facts.items():
        parts.append(Text(f"{what}: {value}"))
    if entry.fields:
        table = _table("Settings", "field", "type", "bounds", "default", "what it is")
        for field in entry.fields:
            table.add_row(field.name, Text(field.type), field.bounds, Text(field.default), Text(field.description))
        parts.append(table)
    return Group(*parts)


def values_table(title: str, values: Mapping[str, Any]) -> RenderableType:
    """Nested values, a line each."""
    table = _table(title, "field", "value")
    for path, value in flatten(values).items():
        table.add_row(path, _shown(value))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_lines=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _shown(value: Any) -> Text:
    return Text("null" if value is None else str(value).lower() if isinstance(value, bool) else str(value))
