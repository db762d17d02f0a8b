"""The tables of a page, with their columns in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from metaplug.evaluation.results import transductive_text
from metaplug.evaluation.scores import better
from metaplug.experiments.study.acceleration import Acceleration
from metaplug.experiments.study.cells import setting_text
from metaplug.experiments.study.results import Row, StudyResult, paired
from metaplug.report.page.chosen import compared, flat, reference_of
from metaplug.report.page.findings import told
from metaplug.report.page.material import Material
from metaplug.report.page.panels import Key
from metaplug.report.page.words import listed, signed
from metaplug.report.study import seeds_notes
from metaplug.report.terminal import scale_of, value_text

VARIANT, SETTING, TEST, SEEDS, SECONDS = "variant", "setting", "test", "seeds", "seconds"
DIFFERENCE, ITERATIONS, BY_SECONDS = "difference", "iterations", "by-seconds"
NO_BREAK = "\N{NO-BREAK SPACE}"
MOST_SEEDS = 5
"""Whose tests stand one by one."""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: of what stands in it.
        title: its heading.
    """

    name: str
    title: str

    @property
    def is_number(self) -> bool:
        """Whether figures stand in it, at the right."""
        return self.name not in (VARIANT, SETTING)


@dataclass(frozen=True)
class Cells:
    """One row, in words.

    Attributes:
        key: how the variant looks in pictures.
        texts: by the name of a column; empty where there is nothing to say.
        is_told: whether the difference can be told from 0.
        is_reference: whether others are compared with it.
    """

    key: Key
    texts: dict[str, str]
    is_told: bool
    is_reference: bool


@dataclass(frozen=True)
class Table:
    """Rows below their columns."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Cells, ...]


def tables(material: Material) -> list[Table]:
    """All rows; and each variant at its best setting, where there was one to choose."""
    result = material.result
    if not result.rows:
        return []
    caption = "All variants and settings" if result.rows[1:] else "Test on unseen tasks"
    whole = _table(material, caption, result.rows, reference_of)
    chosen = compared(result)
    if len(flat(chosen)) == len(result.rows):
        return [whole]
    bases = {row.label: result.baseline_among(rows) for rows in chosen for row in rows}

    def base_of(result: StudyResult, row: Row) -> Row | None:
        base = bases[row.label]
        return None if base is row else base

    caption = "Each variant at its best setting, chosen on validation tasks alone"
    return [_table(material, caption, flat(chosen), base_of), whole]


def _table(
    material: Material,
    caption: str,
    rows: Sequence[Row],
    reference: Callable[[StudyResult, Row], Row | None],
) -> Table:
    result = material.result
    overs = [reference(result, row) for row in rows]
    cells = [
        _cells(material, row, over, is_reference=over is None and any(one is row for one in overs))
        for row, over in zip(rows, overs, strict=True)
    ]
    label = _reference_label(result)
    titles = {
        VARIANT: "Variant",
        SETTING: "Setting",
        TEST: f"Test {result.metric}",
        SEEDS: "By seed",
        DIFFERENCE: f"Minus {label}",
        ITERATIONS: "Acceleration in iterations",
        BY_SECONDS: "Acceleration in seconds",
        SECONDS: "Seconds",
    }
    used = [name for name in titles if any(row.texts.get(name) for row in cells)]
    return Table(
        caption,
        tuple(Column(name, titles[name]) for name in used),
        tuple(cells),
    )


def _cells(material: Material, row: Row, over: Row | None, *, is_reference: bool) -> Cells:
    """A row in words, compared with another where there is one."""
    result = material.result
    texts = {
        VARIANT: row.variant,
        SETTING: setting_text(row.setting).replace(" ", NO_BREAK).replace(f",{NO_BREAK}", ", "),
        TEST: value_text(result.metric, row.test.mean, row.test.interval),
        SEEDS: _by_seed(result.metric, row),
        SECONDS: f"{row.seconds:,.{1 if row.seconds < 100 else 0}f}",
    }
    difference = None if over is None else result.difference(row, over)
    if difference is not None:
        texts[DIFFERENCE] = signed(difference)
    elif over is not None:
        texts[DIFFERENCE] = "not compared: other tasks" if paired(over, row) else "other seeds"
    elif is_reference:
        texts[DIFFERENCE] = "reference"
    if over is not None and paired(over, row):
        faster = result.acceleration(row, over)
        texts[ITERATIONS] = _percent(faster.mean_percent, faster)
        if any(point and point.seconds for point in (*faster.baseline, *faster.reached)):
            texts[BY_SECONDS] = _percent(faster.mean_percent_of_seconds, faster)
    is_told = difference is not None and told(difference) != 0
    return Cells(Key(row.variant, material.look_of(row.variant)), texts, is_told, is_reference)


def _by_seed(metric: str, row: Row) -> str:
    """The test of every seed; of many the lowest and the highest, of one nothing."""
    scale, digits, _ = scale_of(metric)
    texts = [f"{run.test.mean * scale:.{digits}f}" for run in row.runs]
    if len(texts) > MOST_SEEDS:
        lowest, highest = (each(run.test.mean for run in row.runs) * scale for each in (min, max))
        return f"{lowest:.{digits}f} to {highest:.{digits}f}"
    return " · ".join(texts) if len(texts) > 1 else ""


def _reference_label(result: StudyResult) -> str:
    return result.rows[0].label if len(result.study.variants) == 1 else result.baseline


def _percent(percent: float | None, faster: Acceleration) -> str:
    if percent is None:
        return "not reached"
    count, reached = len(faster.targets), faster.seeds_reached
    part = f" ({reached} of {count} seeds)" if reached < count else ""
    return f"{percent:+.0f} %{part}".replace("-", "−")


def notes(material: Material, shown: Sequence[Table]) -> list[str]:
    """How to read the columns of the tables."""
    if not shown:
        return []
    result = material.result
    used = {column.name for table in shown for column in table.columns}
    tasks = listed([f"{n:,}" for n in sorted({row.test.num_tasks for row in result.rows})])
    way = "Higher" if better(result.metric, 1, 0) else "Lower"
    said = [
        f"Test: unseen tasks, by the weights that validated best. {way} is better. The 95 % "
        f"intervals are over the {tasks} tasks of a row's seeds, and say nothing about other seeds."
    ]
    if SEEDS in used:
        said.append("By seed: the test of each seed, in their order; of many, the ends.")
    if DIFFERENCE in used:
        said.append(
            f"Minus {_reference_label(result)}: the mean difference, task by task on the same "
            "tasks. Where its interval holds 0, no difference can be told; others stand in bold. "
            "One interval in twenty misses the true difference by chance."
        )
    if ITERATIONS in used:
        target = result.study.target
        goal = (
            f"the best validation {result.metric} of the reference, seed by seed"
            if target is None
            else f"a validation {result.metric} of {value_text(result.metric, target)}"
        )
        said.append(
            "Acceleration: (what the reference needs / what the row needs − 1) · 100 % to reach "
            f"{goal}; +100 % is in half."
        )
        if any("seeds)" in row.texts.get(ITERATIONS, "") for table in shown for row in table.rows):
            said[-1] += " Where some seeds reach it, it is their mean, and so too good."
    said += seeds_notes(result)
    said.append("Seconds: of meta-training and its validations, the mean over seeds.")
    texts = dict.fromkeys(transductive_text(row.test.transductive) for row in result.rows)
    return [*said, *(f"{text[:1].upper()}{text[1:]}." for text in texts)]
