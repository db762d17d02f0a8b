"""The tables of a page, with their columns in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from metaplug.experiments.study.acceleration import Acceleration
from metaplug.experiments.study.cells import setting_text
from metaplug.experiments.study.results import Row, StudyResult, paired
from metaplug.experiments.study.tuned import Comparison, comparisons
from metaplug.report.comparing import (
    MOST_SEEDS,
    apart_text,
    by_seed_text,
    p_text,
    part_text,
    percent_text,
)
from metaplug.report.page.chosen import compared, flat, reference_of
from metaplug.report.page.findings import told
from metaplug.report.page.material import Material
from metaplug.report.page.panels import Key
from metaplug.report.page.words import signed
from metaplug.report.terminal import scale_of, value_text

VARIANT, SETTING, TEST, SEEDS, SECONDS = "variant", "setting", "test", "seeds", "seconds"
DIFFERENCE, ITERATIONS, BY_SECONDS = "difference", "iterations", "by-seconds"
BASE, DIFFERENCES, P = "base", "differences", "p"
NO_BREAK = "\N{NO-BREAK SPACE}"


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
        return self.name not in (VARIANT, SETTING, BASE)


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
    """All rows; and each variant at its best setting, where there was one to choose.

    There each stands beside the baseline, and beside its base where one has another base.
    """
    result = material.result
    if not result.rows:
        return []
    caption = "All variants and settings" if result.rows[1:] else "Test on unseen tasks"
    whole = _table(material, caption, result.rows, reference_of)
    chosen = compared(result)
    if len(flat(chosen)) == len(result.rows):
        return [whole]
    found = [comparisons(result, rows) for rows in chosen]
    with_baseline = {label: one for each in found for label, one in each.with_baseline.items()}
    with_base = {label: one for each in found for label, one in each.with_base.items()}
    caption = "Each variant at its best setting, chosen on validation tasks alone"
    best = [_best_table(material, caption, flat(chosen), with_baseline)]
    if not with_base.items() <= with_baseline.items():
        caption = "Each variant beside the one that it extends, both at their best settings"
        rows = [one.row for one in with_base.values()]
        best.append(_best_table(material, caption, rows, with_base))
    return [*best, whole]


def _best_table(
    material: Material, caption: str, rows: Sequence[Row], found: Mapping[str, Comparison]
) -> Table:
    """Rows at their best settings, compared with others at theirs."""

    def reference(result: StudyResult, row: Row) -> Row | None:
        return found[row.label].over if row.label in found else None

    table = _table(material, caption, rows, reference)
    for cells, row in zip(table.rows, rows, strict=True):
        if (one := found.get(row.label)) is not None:
            by_seed = by_seed_text(material.result.metric, one.by_seed)
            cells.texts[DIFFERENCES] = by_seed.replace("-", "−").replace(", ", " · ")
            cells.texts[P] = p_text(one.p_holm)
            cells.texts[BASE] = "" if material.result.is_baseline(one.over) else one.over.label
    columns = _columns(material.result, table.rows)
    return replace(table, columns=columns)


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
    return Table(caption, _columns(result, cells), tuple(cells))


def _columns(result: StudyResult, cells: Sequence[Cells]) -> tuple[Column, ...]:
    """Those in which something stands."""
    is_based = any(row.texts.get(BASE) for row in cells)
    titles = {
        VARIANT: "Variant",
        SETTING: "Setting",
        TEST: f"Test {result.metric}",
        SEEDS: "By seed",
        BASE: "Its base",
        DIFFERENCE: f"Minus {'its base' if is_based else reference_label(result)}",
        DIFFERENCES: "The same by seed",
        P: "p (Holm)",
        ITERATIONS: "Acceleration in iterations",
        BY_SECONDS: "Acceleration in seconds",
        SECONDS: "Seconds",
    }
    used = [name for name in titles if any(row.texts.get(name) for row in cells)]
    return tuple(Column(name, titles[name]) for name in used)


def _cells(material: Material, row: Row, over: Row | None, *, is_reference: bool) -> Cells:
    """A row in words, compared with another where there is one."""
    result = material.result
    texts = {
        VARIANT: f"{row.variant}{part_text(len(row.seeds), len(result.study.seeds))}",
        SETTING: setting_words(row),
        TEST: value_text(result.metric, row.test.mean, row.test.interval),
        SEEDS: _by_seed(result.metric, row),
        SECONDS: f"{row.seconds:,.{1 if row.seconds < 100 else 0}f}",
    }
    difference = None if over is None else result.difference(row, over)
    if difference is not None:
        texts[DIFFERENCE] = signed(difference)
    elif over is not None:
        texts[DIFFERENCE] = (
            "not compared: other tasks" if paired(over, row) else apart_text(row, over)
        )
    elif is_reference:
        texts[DIFFERENCE] = "reference"
    if over is not None and paired(over, row):
        faster = result.acceleration(row, over)
        texts[ITERATIONS] = _percent(faster.mean_percent, faster)
        if any(point and point.seconds for point in (*faster.baseline, *faster.reached)):
            texts[BY_SECONDS] = _percent(faster.mean_percent_of_seconds, faster)
    is_told = difference is not None and told(difference) != 0
    key = Key(texts[VARIANT], material.look_of(row.variant))
    return Cells(key, texts, is_told, is_reference)


def setting_words(row: Row) -> str:
    """The setting of a row, with no line's end inside one field."""
    return setting_text(row.setting).replace(" ", NO_BREAK).replace(f",{NO_BREAK}", ", ")


def _by_seed(metric: str, row: Row) -> str:
    """The test of every seed; of many the lowest and the highest, of one nothing."""
    scale, digits, _ = scale_of(metric)
    texts = [f"{run.test.mean * scale:.{digits}f}" for run in row.runs]
    if len(texts) > MOST_SEEDS:
        lowest, highest = (each(run.test.mean for run in row.runs) * scale for each in (min, max))
        return f"{lowest:.{digits}f} to {highest:.{digits}f}"
    return " · ".join(texts) if len(texts) > 1 else ""


def reference_label(result: StudyResult) -> str:
    """What rows are compared with, by name."""
    return result.rows[0].label if len(result.study.variants) == 1 else result.baseline


def _percent(percent: float | None, faster: Acceleration) -> str:
    return percent_text(percent, faster).replace("-", "−")
