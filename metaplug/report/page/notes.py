"""What stands below the tables of a page: how to read their columns."""

from __future__ import annotations

from collections.abc import Sequence

from metaplug.evaluation.results import transductive_text
from metaplug.evaluation.scores import better
from metaplug.report.best import best_notes
from metaplug.report.page.chosen import compared
from metaplug.report.page.material import Material
from metaplug.report.page.tables import DIFFERENCE, ITERATIONS, SEEDS, P, Table, reference_label
from metaplug.report.page.words import listed
from metaplug.report.study import data_notes, seeds_notes
from metaplug.report.terminal import value_text


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
            f"Minus {reference_label(result)}: the mean difference, task by task on the same "
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
    said += best_notes(result, compared(result) if P in used else ())
    said += [*seeds_notes(result), *data_notes(result)]
    said.append("Seconds: of meta-training and its validations, the mean over seeds.")
    texts = dict.fromkeys(transductive_text(row.test.transductive) for row in result.rows)
    return [*said, *(f"{text[:1].upper()}{text[1:]}." for text in texts)]
