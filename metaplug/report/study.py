"""The tables of a study, with their columns in words."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from metaplug.evaluation.curves import Point
from metaplug.evaluation.results import transductive_text
from metaplug.experiments.study.acceleration import Acceleration
from metaplug.experiments.study.results import Row, StudyResult, paired
from metaplug.report.best import Sheet, best_notes, best_sheets
from metaplug.report.comparing import apart_text, difference_text, mean_text
from metaplug.report.console import new_table
from metaplug.report.terminal import value_text


def study_tables(result: StudyResult) -> RenderableType:
    """Lay out each row with its seeds below it, the best settings, and what the columns say."""
    bases = {row.label: result.base_of(row) for row in result.rows}
    # A column of its own only where a base is not the baseline: else it would repeat the other.
    several = any(base is not None and not result.is_baseline(base) for base in bases.values())
    columns, metric = ["acceleration", *["over its base"][:several]], result.metric
    table = new_table("", "variant", *columns, f"test {metric}", _minus(result), "seconds")
    for row in result.rows:
        _add_row(table, result, row, bases[row.label], several)
    groups = result.best_rows()
    is_chosen = sum(map(len, groups)) < len(result.rows)
    shown = [rows for rows in groups if is_chosen or len(rows) > 1]
    best = [_drawn(each) for rows in shown for each in best_sheets(result, rows)]
    notes = [*_notes(result, several), *best_notes(result, shown)]
    return Group(table, *best, *(Text(note, style="dim") for note in notes))


def _add_row(table: Table, result: StudyResult, row: Row, base: Row | None, several: bool) -> None:
    over, metric = result.baseline_of(row), result.metric
    whole = None if over is None else result.acceleration(row, over)
    own = None if base is None else result.acceleration(row, base)
    found = [whole, own] if several else [whole]
    first, *others = [mean_text(each) for each in found]
    is_baseline, test = result.is_baseline(row), row.test
    table.add_row(
        Text(row.label, style="bold"),
        "baseline" if is_baseline else first,
        *others,
        value_text(metric, test.mean, test.interval),
        "" if is_baseline or over is None else _difference(result, row, over),
        f"{row.seconds:.0f}",
    )
    shared = [] if over is None else [run.seed for _, run in paired(over, row)]
    for run in row.runs:
        place = shared.index(run.seed) if run.seed in shared else None
        first, *others = [_seed_text(each, place) for each in found]
        best = None if whole is None or place is None else whole.baseline[place]
        table.add_row(
            f"  seed {run.seed}",
            _baseline_text(result, best) if is_baseline and place is not None else first,
            *others,
            value_text(metric, run.test.mean),
            "",
            f"{run.seconds:.0f}",
            style="dim",
        )
    table.add_section()


def _drawn(sheet: Sheet) -> Table:
    table = new_table(sheet.title, *sheet.head)
    for first, *others in sheet.lines:
        table.add_row(Text(first, style="bold"), *others)
    return table


def _minus(result: StudyResult) -> str:
    return f"minus {result.baseline}"


def _notes(result: StudyResult, several: bool) -> list[str]:
    """Explain the columns, and name what makes a test transductive."""
    notes = [
        f"{_target_text(result)}",
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
    if result.missing:
        count = f"{len(result.missing)} run{'s' * (len(result.missing) != 1)}"
        notes.append(f"Not finished: {count}, first {result.missing[0].label}.")
    notes += [*seeds_notes(result), *data_notes(result)]
    texts = {row.variant: transductive_text(row.test.transductive) for row in result.rows}
    if len(set(texts.values())) == 1:
        text = next(iter(texts.values()))
        return [*notes, f"{text[0].upper()}{text[1:]}."]
    return [*notes, *(f"{label}: {text}." for label, text in texts.items())]


def seeds_notes(result: StudyResult) -> list[str]:
    """Warn of rows that do not have the same seeds; none where all have."""
    if len({frozenset(row.seeds) for row in result.rows}) < 2:
        return []
    return [
        "The rows have different seeds, whose tasks differ in difficulty: compare them by their "
        "differences, which are over the seeds that both have."
    ]


def data_notes(result: StudyResult) -> list[str]:
    """Warn of runs that are not all of the same data; none where they are, as far as they say."""
    if not (found := result.on_other_data):
        return []
    runs = sum(len(row.runs) for row in result.rows)
    return [
        f"Different data: {len(found)} of {runs} runs are of other data than the first of the same "
        f"tasks, as {found[0]} is. Runs are compared on the same data alone: compute all of them "
        "on the same, under another --name."
    ]


def _target_text(result: StudyResult) -> str:
    """Say what the target of the acceleration is, with its values where there are few."""
    if result.study.target is not None:
        return (
            f"Target: validation {result.metric} {value_text(result.metric, result.study.target)}."
        )
    text = f"Target: the best validation {result.metric} that {result.baseline} reaches"
    rows = [row for row in result.rows if result.is_baseline(row)]
    if len(rows) != 1:
        return f"{text} at the same setting, seed by seed."
    best = result.acceleration(rows[0], rows[0]).targets
    targets = ", ".join(value_text(result.metric, target) for target in best)
    return f"{text}; {targets} for seed {', '.join(map(str, rows[0].seeds))}."


def _difference(result: StudyResult, row: Row, over: Row) -> str:
    if not paired(over, row):
        return apart_text(row, over)
    return difference_text(result.difference(row, over))


def _baseline_text(result: StudyResult, reached: Point | None) -> str:
    """When the baseline itself first reaches the target."""
    if reached is None:
        return "not reached"
    return f"{'best ' * (result.study.target is None)}after {reached.iteration}"


def _seed_text(acceleration: Acceleration | None, place: int | None) -> str:
    if acceleration is None or place is None or place >= len(acceleration.reached):
        return ""
    before, needed = acceleration.baseline[place], acceleration.reached[place]
    if needed is None:
        return "not reached"
    if before is None:
        return f"{needed.iteration}; the baseline never"
    return f"{acceleration.percent[place]:+.0f} % ({before.iteration} → {needed.iteration})"
