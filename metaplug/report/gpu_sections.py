"""One section of the page of `metaplug gpu-report` for each part: what its units have told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from metaplug.report.markdown import bullets, percent, plain, table

Values = Mapping[str, Any]

LOOP, STACKED = "plain torch loop", "metaplug, vectorized"
SHARING = "metaplug + gradient-sharing"


def _tests(units: Sequence[Values]) -> list[str]:
    rows, failed, skipped = [], [], Counter[str]()
    for file, group in groupby(units, lambda unit: unit["name"].partition(" ")[0]):
        shards = list(group)
        tests = _rows(shards)
        count = Counter(row["outcome"] for row in tests)
        counts = [str(count[outcome] or "") for outcome in ("passed", "failed", "skipped")]
        seconds = max(unit["seconds"] or 0 for unit in shards)
        rows += [(f"`{file}`", *counts, f"{seconds:.0f}")] * bool(tests)
        failed += [row for row in tests if row["outcome"] == "failed"]
        skipped.update(row["reason"] for row in tests if row["outcome"] == "skipped")
    if not rows:
        return []
    total = [str(sum(int(row[column] or 0) for row in rows) or "") for column in (1, 2, 3)]
    lines = [f"`{row['test']}` **failed**: {plain(row['reason'])}" for row in failed]
    lines += [f"{count} skipped: {plain(reason)}" for reason, count in skipped.items()]
    return [
        "Numbers on the device are held to the CPU's, several files at a time.",
        table(("file", "passed", "failed", "skipped", "seconds"), [*rows, ("**all**", *total, "")]),
        bullets(lines),
    ]


def _bench(units: Sequence[Values]) -> list[str]:
    rows = _rows(unit for unit in units if not unit["work"].get("traced"))
    blocks = []
    if rows:
        blocks += [
            "Milliseconds: the median of interleaved repeats, with half the distance of the "
            "quartiles; in brackets, how many times as fast as the plain loop in the same run. "
            "«25x5» is 25 tasks and 5 inner steps.",
            _by_workload(rows, _time_cell),
            "Of `metaplug, vectorized`, **busy** is the share of its time in which the device "
            "computes or copies, and **of limit** the share that the arithmetic alone would take "
            "at the rate of a large matrix product. **Error** is the largest of a meta-gradient in "
            "float64, against the plain loop's.",
            _beside_times(rows),
        ]
    traced = _traced([unit for unit in units if unit["work"].get("traced")])
    return [*blocks, *traced, _refusals(units)]


def _beside_times(rows: Sequence[Values]) -> str:
    made = []
    for workload, of in _of_workloads(rows).items():
        own, limit = of.get(STACKED, {}), next(iter(of.values()))["limit"]
        errors = [row["gradient_error"] for row in of.values() if row["gradient_error"] is not None]
        rate = f"{limit['speed']['flops_per_second'] / 1e12:.3g}, {limit['speed']['precision']}"
        shares = percent(own.get("busy")), percent(own.get("share"))
        error = f"{max(errors):.0e}" if errors else ""
        made.append((workload, *shares, f"{limit['flops'] / 1e9:.3g}", rate, error))
    return table(("", "busy", "of limit", "GFLOP a step", "TFLOP/s here", "error"), made)


def _traced(units: Sequence[Values]) -> list[str]:
    """Compare captured and compiled steps with the plain ones that were measured in turn."""
    made = []
    for unit in units:
        of = {row["contestant"]: row for row in unit["rows"]}
        for name, row in of.items():
            usual = of.get(SHARING if name.startswith(SHARING) else STACKED)
            if name in (STACKED, SHARING) or not usual:
                continue
            faster = f"{times:.2f}×" if (times := _faster(usual, row)) else ""
            cells = _time(row), _time(usual), faster, percent(row["busy"])
            made.append((row["workload"], name, *cells))
    head = ("workload", "step", "ms", "plain, in the same run", "times as fast", "busy")
    return ["### Captured and compiled, beside plain ones", table(head, made)] if made else []


def _memory(units: Sequence[Values]) -> list[str]:
    def cell(row: Values, loop: Values | None) -> str:
        own, first = row["peak_mib"], loop and loop["peak_mib"]
        times = f" ({own / first:.2f}×)" if own and first and row is not loop else ""
        return "" if own is None else f"{own:,.1f}{times}"

    if not (rows := _rows(units)):
        return []
    return [
        "The most MiB that torch's allocator holds in the course of a step, over what was there "
        "before; in brackets, against the plain loop, which holds the graphs of all tasks at once.",
        _by_workload(rows, cell),
        _refusals(units),
    ]


def _training(units: Sequence[Values]) -> list[str]:
    made, form, metric = [], "", ""
    for unit in units:
        for row in unit["rows"][-1:]:
            work, lengths = unit["work"], unit["work"]["training"]
            form = (
                f"{work['model']['name']} on {work['tasks']['source']}, as `metaplug train` has "
                f"it: {lengths['iterations']} iterations, a validation every "
                f"{lengths['validate_every']}; the test is on unseen tasks, by the weights that "
                "validated best."
            )
            if "test" not in row:
                last = _score(row["validation"], row["metric"])
                so_far = f"{last} at {row['iteration']}, the last one"
                made.append((unit["name"], "", so_far, f"{row['seconds']:.1f}", ""))
                continue
            test, best, metric = row["test"], row["best_validation"], row["test"]["metric"]
            mean, interval, at_best = (
                _score(value, metric) for value in (test["mean"], test["interval"], best["mean"])
            )
            seconds = f"{row['seconds']:.1f}", f"{row['whole']:.1f}"
            cells = f"{mean} ± {interval}", f"{at_best} at {best['iteration']}", *seconds
            made.append((unit["name"], *cells))
    head = (f"test {metric}".strip(), "best validation", "seconds of training", "with the test")
    return [form, table(("algorithm", *head), made)] if made else []


def _large(units: Sequence[Values]) -> list[str]:
    steps = [unit for unit in units if "grow" not in unit["work"]]
    points = _rows(unit for unit in units if "grow" in unit["work"])
    blocks = []
    if rows := _rows(steps):
        blocks += ["Milliseconds, as above.", _by_workload(rows, _time_cell), _refusals(steps)]
    if points:
        made = []
        for point in points:
            per_task = f"{point['milliseconds'] / point['tasks']:.3f}"
            peak = f"{point['peak_mib']:,.1f}"
            made.append((point["workload"], f"{point['tasks']:,}", _time(point), per_task, peak))
        head = ("as", "with tasks", "ms", "ms per task", "peak MiB")
        blocks += ["### More and more tasks in a step", table(head, made)]
    return blocks


SECTIONS: dict[str, tuple[str, Callable[[Sequence[Values]], list[str]]]] = {
    "tests": ("Tests", _tests),
    "bench": ("One second-order meta-step", _bench),
    "memory": ("Memory", _memory),
    "training": ("A short training", _training),
    "large": ("Larger steps", _large),
}
"""Title and text by the name of the part."""


def _rows(units: Iterable[Values]) -> list[Values]:
    return [row for unit in units for row in unit["rows"]]


def _of_workloads(rows: Iterable[Values]) -> dict[str, dict[str, Values]]:
    found: dict[str, dict[str, Values]] = {}
    for row in rows:
        found.setdefault(row["workload"], {})[row["contestant"]] = row
    return found


def _by_workload(rows: Sequence[Values], cell: Callable[[Values, Values | None], str]) -> str:
    """Make a table of contestants by workloads; each cell is told the plain loop's row, too."""
    found = _of_workloads(rows)
    made = [
        (name, *(cell(of[name], of.get(LOOP)) if name in of else "" for of in found.values()))
        for name in dict.fromkeys(row["contestant"] for row in rows)
    ]
    return table(("", *found), made)


def _refusals(units: Sequence[Values]) -> str:
    """List what could not do the work, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in _rows(units):
        if row["reason"]:
            reasons.setdefault((row["contestant"], row["reason"]), []).append(row["workload"])
    return bullets(
        f"{contestant}, on {', '.join(dict.fromkeys(workloads))}: {plain(reason)}"
        for (contestant, reason), workloads in reasons.items()
    )


def _time_cell(row: Values, loop: Values | None) -> str:
    faster = _faster(loop, row) if loop and row is not loop else None
    if faster is None:
        return _time(row)
    digits = sum(faster < bound for bound in (1, 10))
    return f"{_time(row)} ({faster:.{digits}f}×)"


def _time(row: Values) -> str:
    """Milliseconds to three digits, with their spread."""
    if row["milliseconds"] is None:
        return "–"
    digits = sum(row["milliseconds"] < bound for bound in (10, 100))
    return f"{row['milliseconds']:,.{digits}f} ± {row['spread']:,.{digits}f}"


def _faster(usual: Values, row: Values) -> float | None:
    if not (usual["milliseconds"] and row["milliseconds"]):
        return None
    return float(usual["milliseconds"] / row["milliseconds"])


def _score(value: float | None, metric: str) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f} %" if metric == "accuracy" else f"{value:.4g}"
