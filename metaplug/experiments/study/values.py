"""The results of a study as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metaplug.evaluation.curves import Curve, Point, best_point
from metaplug.evaluation.results import EvaluationResult, Metric
from metaplug.experiments.json_values import result_values
from metaplug.experiments.runs.result import RunResult
from metaplug.experiments.study.acceleration import Acceleration
from metaplug.experiments.study.over_fitting import OverFitting, over_fitting
from metaplug.experiments.study.results import Row, StudyResult, paired
from metaplug.experiments.study.tuned import Comparison, comparisons

_MACHINE = ("versions", "device", "threads", "precision", "deterministic", "batching")


def to_values(result: StudyResult) -> dict[str, Any]:
    """The whole study as JSON values, by row and seed; an accuracy is a fraction."""
    return {
        "metric": result.metric,
        "baseline": result.baseline,
        "seeds": list(result.study.seeds),
        "rows": [_row_values(result, row) for row in result.rows],
        "best": [_best_values(result, rows) for rows in result.best_rows()],
        "over_fitting": [_over_fitting_values(each) for each in over_fitting(result)],
        "missing": [cell.label for cell in result.missing],
        "other_data": list(result.on_other_data),
    }


def _best_values(result: StudyResult, rows: Sequence[Row]) -> list[dict[str, Any]]:
    found = comparisons(result, rows)
    return [
        {
            "label": row.label,
            "validation": row.best_validation,
            **_comparison_values("baseline", found.with_baseline.get(row.label), found.count),
            **_comparison_values("base", found.with_base.get(row.label), found.count),
        }
        for row in rows
    ]


def _comparison_values(name: str, one: Comparison | None, count: int) -> dict[str, Any]:
    """How a row differs from another at its best setting; None where there is none."""
    difference = None if one is None else _difference(one.difference)
    if one is not None and difference is not None:
        difference["over"] = one.over.label
        difference["by_seed"] = list(one.by_seed)
        difference["p_value"] = one.p_value
        difference["p_value_holm"] = one.p_holm
        difference["comparisons"] = count
    return {
        f"minus_{name}": difference,
        f"acceleration_over_{name}_percent": None
        if one is None
        else list(one.acceleration.percent),
    }


def _over_fitting_values(found: OverFitting) -> dict[str, Any]:
    return {
        "label": found.row.label,
        "iterations": list(found.iterations),
        "support_losses": list(map(list, found.support_losses)),
        "query_losses": list(map(list, found.query_losses)),
        "gap": list(found.gaps),
        "mean_gap_by_seed": list(found.gap_by_seed),
    }


def _row_values(result: StudyResult, row: Row) -> dict[str, Any]:
    over, base = result.baseline_of(row), result.base_of(row)
    found = None if over is None else result.acceleration(row, over)
    means = None if over is None else result.acceleration_of_means(row, over)
    of_base = None if base is None else result.acceleration(row, base)
    compared = {} if over is None or found is None else _compared(row, over, found)
    return {
        "label": row.label,
        "variant": row.variant,
        "setting": dict(row.setting),
        "base": None if base is None else base.label,
        "config": row.runs[0].config.model_dump(mode="json", exclude={"seed"}),
        "plugins": row.runs[0].summary["plugins"],
        "acceleration_percent": None
        if found is None or means is None  # no row of the baseline, or none of the same seeds
        else {
            "mean_over_seeds_that_reached": found.mean_percent,
            "of_seconds": found.mean_percent_of_seconds,
            "seeds_that_reached": found.seeds_reached,
            "of_mean_curve": means.percent[0],
        },
        "acceleration_over_base_percent": None if of_base is None else list(of_base.percent),
        "best_validation": row.best_validation,
        "test": result_values(row.test),
        "test_minus_baseline": None if over is None else _difference(result.difference(row, over)),
        "mean_curve": _curve(row.mean_curve),
        "runs": [_run_values(result.metric, run, compared.get(run.seed, {})) for run in row.runs],
    }


def _compared(row: Row, over: Row, found: Acceleration) -> dict[int, dict[str, Any]]:
    """By seed that both rows have, how much sooner the target is reached."""
    return {
        other.seed: {
            "target": found.targets[place],
            "baseline_iterations_to_target": _iterations(found.baseline[place]),
            "iterations_to_target": _iterations(found.reached[place]),
            "acceleration_percent": found.percent[place],
            "acceleration_percent_of_seconds": found.percent_of_seconds[place],
        }
        for place, (_, other) in enumerate(paired(over, row))
    }


def _run_values(metric: Metric, run: RunResult, compared: dict[str, Any]) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "folder": run.folder.name,
        "curve": _curve(run.curve),
        **compared,
        "best_iteration": best_point(metric, run.curve).iteration,
        "test": result_values(run.test),
        "seconds": round(run.seconds, 3),
        **{name: run.summary[name] for name in _MACHINE if name in run.summary},
    }


def _iterations(point: Point | None) -> int | None:
    return None if point is None else point.iteration


def _curve(curve: Curve) -> list[list[float | None]]:
    return [[point.iteration, point.mean, point.interval, point.seconds] for point in curve]


def _difference(difference: EvaluationResult | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    values = {"mean": difference.mean, "interval": difference.interval}
    return {**values, "interval_method": "t"}
