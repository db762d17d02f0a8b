"""What a study found: its finished runs in rows, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from metaplug.evaluation.curves import Curve, best_point, mean_curve
from metaplug.evaluation.results import EvaluationResult, Metric
from metaplug.evaluation.scores import better
from metaplug.experiments.runs.result import RunResult, read_result
from metaplug.experiments.study.acceleration import Acceleration, accelerate
from metaplug.experiments.study.cells import Cell, row_text
from metaplug.experiments.study.checks import is_own
from metaplug.experiments.study.folder import cell_folder, finished
from metaplug.experiments.study.same_data import of_other_data, same_data
from metaplug.experiments.study.schema import Study, is_tuned


@dataclass(frozen=True)
class Row:
    """One variant at one setting, with its finished runs in the order of seeds; at least one.

    Attributes:
        variant: its label.
        setting: the values of the axes that concern it, by path.
    """

    variant: str
    setting: Mapping[str, Any]
    runs: tuple[RunResult, ...]

    @property
    def label(self) -> str:
        """The variant and the setting, in words."""
        return row_text(self.variant, self.setting)

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Of the runs."""
        return tuple(run.seed for run in self.runs)

    @cached_property
    def mean_curve(self) -> Curve:
        """The mean over seeds at every validation; its interval is over all tasks of all seeds."""
        return mean_curve([run.curve for run in self.runs])

    @cached_property
    def test(self) -> EvaluationResult:
        """The test tasks of all seeds together; its 95 % interval is over tasks."""
        results = [run.test for run in self.runs]
        tables = [result.per_class for result in results if result.per_class is not None]
        return replace(
            results[0],
            per_task=torch.cat([result.per_task for result in results]),
            per_class=torch.cat(tables) if tables else None,
        )

    @property
    def seconds(self) -> float:
        """Of meta-training and its validations, the mean over seeds."""
        return fmean(run.seconds for run in self.runs)

    @property
    def best_validation(self) -> float:
        """The best validation of every seed, their mean."""
        return self.best_validation_of(self.seeds)

    def best_validation_of(self, seeds: Container[int]) -> float:
        """The same over some seeds, at least one of the row's."""
        metric, runs = self.runs[0].test.metric, [run for run in self.runs if run.seed in seeds]
        return fmean(best_point(metric, run.curve).mean for run in runs)


@dataclass(frozen=True)
class StudyResult:
    """The finished runs of a study.

    Attributes:
        metric: of every curve and test.
        study: what was asked.
        rows: in the order of variants and settings; those without a finished run are left out.
        missing: the cells that are not finished.
    """

    metric: Metric
    study: Study
    rows: tuple[Row, ...]
    missing: tuple[Cell, ...] = ()

    @cached_property
    def on_other_data(self) -> tuple[str, ...]:
        """In words, the runs of other data than the first one with the same tasks."""
        runs = {id(run): f"{row.label}, seed {run.seed}" for row in self.rows for run in row.runs}
        found = of_other_data(run for row in self.rows for run in row.runs)
        return tuple(runs[id(run)] for run in found)

    @property
    def baseline(self) -> str:
        """The label of the baseline."""
        return self.study.reference

    def is_baseline(self, row: Row) -> bool:
        """Whether a row is of the baseline itself."""
        return row.variant == self.baseline

    def baseline_among(self, rows: Sequence[Row]) -> Row | None:
        """The baseline's row of a group, which has one of each variant; None for none."""
        return next((row for row in rows if self.is_baseline(row)), None)

    def baseline_of(self, row: Row) -> Row | None:
        """The baseline's row at the same setting, as far as the axes concern it.

        None for none, and where several would do, since an axis concerns the baseline alone.
        """
        every: tuple[Row | Cell, ...] = (*self.rows, *self.missing)
        own = [each for each in every if each.variant == self.baseline]
        if len({repr(each.setting) for each in own if _is_at(each, row)}) > 1:
            return None
        return self.baseline_among([one for one in self.rows if _is_at(one, row)])

    def base_of(self, row: Row) -> Row | None:
        """The row of the longest variant that this one extends by plugins, at the same setting."""
        return self.base_among(row, [one for one in self.rows if _is_at(one, row)])

    def base_among(self, row: Row, rows: Sequence[Row]) -> Row | None:
        """The row of the longest variant that this one extends by plugins; None for none."""
        variants = {variant.label: variant for variant in self.study.variants}
        own = variants[row.variant]
        bases = [
            one
            for one in rows
            if (other := variants[one.variant]).preset == own.preset
            and len(other.plugins) < len(own.plugins)
            and other.plugins == own.plugins[: len(other.plugins)]
            and other.set == own.set
        ]
        return max(bases, key=lambda one: len(variants[one.variant].plugins), default=None)

    def acceleration(self, row: Row, over: Row) -> Acceleration:
        """Of a row over another, in the seeds that both have on the same data.

        A target counts as reached at the first validation that is as good.
        """
        pairs = [(one.curve, other.curve) for one, other in paired(over, row)]
        return accelerate(self.metric, pairs, self.study.target)

    def acceleration_of_means(self, row: Row, over: Row) -> Acceleration | None:
        """Of a row's mean curve over another's, as if it were one seed; None without a common one.

        The means are over the seeds that both have on the same data: others have other tasks.
        """
        if not (pairs := paired(over, row)):
            return None
        before, after = (
            mean_curve([run.curve for run in runs]) for runs in zip(*pairs, strict=True)
        )
        return accelerate(self.metric, [(before, after)], self.study.target)

    def difference(self, row: Row, over: Row) -> EvaluationResult | None:
        """A row's test value minus another's, task by task on the same tasks, seed by seed.

        Runs of other data are left out. None where no tasks are the same, as at other values of an
        axis of tasks.
        """
        pairs = paired(over, row)
        if not pairs or any(not _same_tests(one, other) for one, other in pairs):
            return None
        values = [other.test.per_task - one.test.per_task for one, other in pairs]
        return replace(row.test, per_task=torch.cat(values), per_class=None)

    @property
    def tuned(self) -> tuple[str, ...]:
        """The axes over which a variant's best setting is chosen; none that changes a task."""
        given = self.study.tuned
        return tuple(filter(is_tuned, self.study.axes)) if given is None else given

    def best_rows(self) -> tuple[tuple[Row, ...], ...]:
        """Of every variant the row that validated best, for each value of the other axes.

        A variant that another axis does not concern stands at each of its values. Tests have no
        part in the choice. Empty where no axis is to choose from.
        """
        if not self.tuned:
            return ()
        every = list({repr(each): each for each in map(self.apart, self.rows)}.values())
        groups = []
        for each in every:
            if any(each.items() < other.items() for other in every):
                continue  # of a variant that stands in the groups of the others
            group: dict[str, list[Row]] = {}
            for row in self.rows:
                if self.apart(row).items() <= each.items():
                    group.setdefault(row.variant, []).append(row)
            groups.append(tuple(map(self.best_validated, group.values())))
        return tuple(groups)

    def apart(self, row: Row) -> dict[str, Any]:
        """The values of a row on the axes that validation does not choose."""
        return {path: each for path, each in row.setting.items() if path not in self.tuned}

    def best_validated(self, rows: Sequence[Row]) -> Row:
        """The row with the best validation, the earlier of equal ones.

        By the seeds that all rows have on the same data, since others have other tasks; where they
        have none in common, by each row's own. NaN and Inf are never the best.
        """
        pairs = [paired(rows[0], row) for row in rows]
        common = set(rows[0].seeds).intersection(
            *({run.seed for _, run in shared} for shared in pairs)
        )
        values = [row.best_validation_of(common or row.seeds) for row in rows]
        best = 0
        for place, value in enumerate(values):
            if math.isfinite(value) and not (
                math.isfinite(values[best]) and not better(self.metric, value, values[best])
            ):
                best = place
        return rows[best]


def paired(over: Row, row: Row) -> list[tuple[RunResult, RunResult]]:
    """The runs of two rows with the same seed and, as far as they say, the same data."""
    others = {run.seed: run for run in over.runs}
    return [
        (others[run.seed], run)
        for run in row.runs
        if run.seed in others and same_data(others[run.seed], run)
    ]


def read_results(study: Study, cells: Sequence[Cell], folder: Path) -> StudyResult | None:
    """The finished runs of a study's cells in its folder; None where no cell is finished.

    Raises:
        RunError: a file of a run is damaged.
    """
    found = {
        cell: read_result(cell_folder(cell, folder)) for cell in cells if finished(cell, folder)
    }
    return collected(study, cells, found)


def collected(
    study: Study, cells: Sequence[Cell], found: Mapping[Cell, RunResult]
) -> StudyResult | None:
    """The results of a study's cells in rows; None of none."""
    rows: dict[tuple[str, str], list[Cell]] = {}
    order = {variant.label: place for place, variant in enumerate(study.variants)}
    for cell in sorted(found, key=lambda cell: order[cell.variant]):
        rows.setdefault((cell.variant, repr(cell.setting)), []).append(cell)
    if not found:
        return None
    return StudyResult(
        next(iter(found.values())).test.metric,
        study,
        tuple(
            Row(of[0].variant, of[0].setting, tuple(found[cell] for cell in of))
            for of in rows.values()
        ),
        tuple(cell for cell in cells if cell not in found),
    )


def _is_at(one: Row | Cell, row: Row) -> bool:
    """Whether a row has the other's values on the axes that concern both."""
    common = one.setting.keys() & row.setting.keys()
    tasks = [path for path in one.setting.keys() ^ row.setting.keys() if not is_own(path)]
    return not tasks and all(one.setting[path] == row.setting[path] for path in common)


def _same_tests(one: RunResult, other: RunResult) -> bool:
    """Whether two runs were tested on the same tasks."""
    tests = [
        (run.config.tasks, run.config.training.test_tasks, run.test.metric) for run in (one, other)
    ]
    return tests[0] == tests[1]
