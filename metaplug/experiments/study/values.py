"""The results of a study as JSON values."""

from __future__ import annotations

from typing import Any

from metaplug.evaluation.curves import Curve, Point, best_point
from metaplug.evaluation.results import EvaluationResult, Metric
from metaplug.experiments.json_values import result_values
from metaplug.experiments.runs.result import RunResult
from metaplug.experiments.study.acceleration import Acceleration
from metaplug.experiments.study.results import Row, StudyResult, paired

_MACHINE = ("versions", "device", "threads", "precision", "deterministic", "batching")


def to_values(result: StudyResult) -> dict[str, Any]:
    """The whole study as JSON values, by row and seed; an accuracy is a fraction."""
    return {
        "metric": result.metric,
        "baseline": result.baseline,
        "seeds": list(result.study.seeds),
        "rows": [_row_values(result, row) for row in result.rows],
        "best": [
            [_best_values(result, row, result.baseline_among(rows)) for row in rows]
            for rows in result.best_rows()
        ],
        "missing": [cell.label for cell in result.missing],
    }


def _best_values(result: StudyResult, row: Row, over: Row | None) -> dict[str, Any]:
    difference = None if over is None else result.difference(row, over)
    return {"label": row.label, "minus_baseline": _difference(difference)}


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
