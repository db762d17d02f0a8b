"""The table of a comparison, with its columns in words."""

from __future__ import annotations

from statistics import fmean

from rich.console import Group, RenderableType
from rich.text import Text

from metaplug.evaluation.results import EvaluationResult, transductive_text
from metaplug.experiments.comparison import Acceleration, Comparison
from metaplug.report.console import new_table
from metaplug.report.terminal import scale_of, value_text


def comparison_report(comparison: Comparison) -> RenderableType:
    """Lay out each variant with its seeds below it, and explain the columns."""
    labels, baseline = list(comparison.runs), comparison.baseline
    bases = {label: comparison.base(label) for label in labels}
    # A column of its own only where a base is not the baseline: else it would repeat the other.
    several = any(base not in (None, baseline) for base in bases.values())
    columns, metric = ["acceleration", *["over its base"][:several]], comparison.metric
    table = new_table("", "variant", *columns, f"test {metric}", f"minus {baseline}", "seconds")
    table.columns[0].no_wrap = True
    for label in labels:
        runs, test, base = comparison.runs[label], comparison.test(label), bases[label]
        whole = comparison.acceleration(label)
        own = None if base is None else comparison.acceleration(label, base)
        found = [whole, own] if several else [whole]
        first, *over = [_mean_text(each) for each in found]
        table.add_row(
            Text(label, style="bold"),
            "baseline" if label == baseline else first,
            *over,
            value_text(metric, test.mean, test.interval),
            "" if label == baseline else difference_text(comparison.difference(label)),
            f"{fmean(run.seconds for run in runs):.0f}",
        )
        for seed, run in enumerate(runs):
            first, *over = [_seed_text(each, seed) for each in found]
            best = f"best after {whole.baseline_iterations[seed]}"
            table.add_row(
                f"  seed {run.seed}",
                best if label == baseline else first,
                *over,
                value_text(metric, run.test.mean),
                "",
                f"{run.seconds:.0f}",
                style="dim",
            )
        table.add_section()
    return Group(table, *(Text(note, style="dim") for note in _notes(comparison, several)))


def _notes(comparison: Comparison, several: bool) -> list[str]:
    """Explain the columns, and name what makes a test transductive."""
    baseline, metric = comparison.baseline, comparison.metric
    best = comparison.acceleration(baseline).targets
    targets = ", ".join(value_text(metric, target) for target in best)
    seeds = ", ".join(map(str, comparison.seeds))
    notes = [
        f"Target: the best validation {metric} that {baseline} reaches; "
        f"{targets} for seed {seeds}.",
        "Acceleration: (iterations that it needs / iterations that the other needs − 1) · 100 %, "
        "mean over the seeds that get there.",
        "Test: unseen tasks, by the weights that validated best; 95 % intervals over the tasks of "
        "all seeds, differences task by task.",
        "Seconds: of meta-training and its validations, for one seed.",
    ]
    if several:
        notes.insert(
            2,
            "Over its base: the same against the variant that this one extends by plugins, with "
            "that variant's best as the target.",
        )
    texts = {
        label: transductive_text(comparison.test(label).transductive) for label in comparison.runs
    }
    if len(set(texts.values())) == 1:
        return [*notes, f"{texts[baseline][0].upper()}{texts[baseline][1:]}."]
    return [*notes, *(f"{label}: {text}." for label, text in texts.items())]


def difference_text(difference: EvaluationResult) -> str:
    """Write a difference of means with its sign: "+7.40 ± 0.90 pp", in percentage points."""
    scale, digits, unit = scale_of(difference.metric)
    unit = " pp" if unit else ""
    return f"{difference.mean * scale:+.{digits}f} ± {difference.interval * scale:.{digits}f}{unit}"


def _mean_text(acceleration: Acceleration | None) -> str:
    if acceleration is None:
        return ""
    if acceleration.mean_percent is None:
        return "not reached"
    count = len(acceleration.iterations)
    missed = f" ({acceleration.reached} of {count} seeds)" if acceleration.reached < count else ""
    return f"{acceleration.mean_percent:+.0f} %{missed}"


def _seed_text(acceleration: Acceleration | None, seed: int) -> str:
    if acceleration is None:
        return ""
    before, needed = acceleration.baseline_iterations[seed], acceleration.iterations[seed]
    if needed is None:
        return "not reached"
    return f"{acceleration.percent[seed]:+.0f} % ({before} → {needed})"
