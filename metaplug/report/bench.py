"""Measurements as tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text

from metaplug.bench import Row
from metaplug.bench.drawing import DrawRow
from metaplug.bench.scaling import Growth, Point, growth
from metaplug.bench.soak import MOST_MEMORY, MOST_SLOWER, WARM_UP, Soaked
from metaplug.report.console import new_table


def bench_table(rows: Sequence[Row]) -> RenderableType:
    """Show the cost of a meta-step by workload, above the least that it costs.

    Ratios are to the first row that has a time, the plain loop unless that was left out.
    """
    memory = any(row.peak_mib is not None for row in rows)
    busy = any(row.busy is not None for row in rows)
    more = ["busy"] * busy + ["graph MiB", "peak MiB"] * memory
    table = new_table("", "", "ms", "±", "speed", "of limit", "error", *more)
    for workload, group in groupby(rows, lambda row: row.workload):
        of_workload = list(group)
        baseline = next((row.milliseconds for row in of_workload if row.milliseconds), None)
        table.add_section()
        table.add_row(Text(workload, style="bold"))
        for row in of_workload:
            if row.milliseconds is None or row.spread is None or baseline is None:
                table.add_row(row.contestant, "–", style="dim")
                continue
            speed = f"{baseline / row.milliseconds:.2f}×"
            cells = [*_times(row.milliseconds, row.spread), speed]
            cells += [_text(row.share, "{:.1%}"), _text(row.gradient_error, "{:.0e}")]
            cells += [_text(row.busy, "{:.0%}")] * busy
            cells += [_text(row.graph_mib, "{:.1f}"), _text(row.peak_mib, "{:.1f}")] * memory
            table.add_row(row.contestant, *cells)
        least = of_workload[0].limit
        rate = least.speed.flops_per_second
        rated = f"{rate / 1e12:.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.0f} GFLOP/s"
        arithmetic = f"limit: {least.flops / 1e9:.3g} GFLOP at {rated}"
        table.add_row(arithmetic, f"{least.milliseconds:.2f}", style="dim")
        if least.overhead_bound:
            each = f"{1e6 * least.speed.seconds_per_call:.1f} µs"
            calls = f"overhead bound: {least.calls:,} calls, {each}"
            table.add_row(calls, f"{least.calls_milliseconds:.2f}", style="dim")
    return _with_notes(table, notes=_bench_notes(rows))


def _bench_notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    for reason in dict.fromkeys(row.reason for row in rows if row.reason):
        without = dict.fromkeys(row.contestant for row in rows if row.reason == reason)
        notes.append(f"– {'; '.join(without)}: {reason}.")
    precision = rows[0].limit.speed.precision
    notes.append(
        "Limit: the arithmetic of the step at the rate of a large matrix product in "
        f"{precision}, measured in this run."
    )
    if any(row.busy is not None for row in rows):
        notes.append(
            "Busy: the share of the time in which the device computes or copies; in the rest it "
            "waits to be called."
        )
    if any(row.limit.overhead_bound for row in rows):
        notes.append(
            "Overhead bound: calling the operators takes longer than the arithmetic, even with all "
            "tasks stacked; the limit then says nothing of a contestant that calls them one by one."
        )
    return notes


def scaling_table(points: Sequence[Point]) -> RenderableType:
    """Show how the cost of a step grows, by series, and what each series comes to."""
    columns = ["workload", "tasks", "inner steps", "graphs kept", "ms", "±", "ms per task"]
    table = new_table("", *columns, "peak MiB", "MiB per task")
    for _, series in groupby(points, lambda point: point.series):
        table.add_section()
        for index, point in enumerate(series):
            table.add_row(
                "" if index else point.workload,
                str(point.tasks),
                str(point.inner_steps),
                "all" if point.checkpoint_steps is None else str(point.checkpoint_steps),
                *_times(point.milliseconds, point.spread),
                f"{point.milliseconds_per_task:.3f}",
                f"{point.peak_mib:.1f}",
                f"{point.mib_per_task:.3f}",
            )
    notes = [
        "Of tasks, the cost per task of the most over that of the fewest. Of K inner steps, how "
        "what they add to the fixed cost of a step grows: K^1 in proportion, K^0.5 like √K.",
        "Recomputed: the graphs of about √K inner steps are kept at a time; beside it, their time "
        "over that of keeping all.",
    ]
    return _with_notes(table, _growth_table(growth(points)), notes=notes)


def _growth_table(found: Sequence[Growth]) -> RenderableType:
    columns = ["growth", "of", "from", "to", "time per task", "MiB per task", "time", "MiB"]
    table = new_table("", *columns, "over keeping all")
    for each in found:
        table.add_row(
            each.workload,
            f"{each.axis.replace('_', ' ')}{', recomputed' * each.recomputed}",
            str(each.smallest),
            str(each.largest),
            _text(each.time_per_task, "{:.2f}×"),
            _text(each.memory_per_task, "{:.2f}×"),
            _text(each.time_exponent, "K^{:.2f}"),
            _text(each.memory_exponent, "K^{:.2f}"),
            _text(each.times_as_long, "{:.2f}×"),
        )
    return table


def drawing_table(rows: Sequence[DrawRow]) -> RenderableType:
    """Show the cost of drawing a batch of tasks; ratios are to metaplug, the first row."""
    table = new_table("", "contestant", "ms", "±", "times as long")
    first = rows[0].milliseconds
    for row in rows:
        if row.milliseconds is None or first is None:
            table.add_row(row.contestant, Text(row.reason or "", style="dim"), "", "")
        else:
            ratio = f"{row.milliseconds / first:.1f}×"
            table.add_row(row.contestant, f"{row.milliseconds:.2f}", f"{row.spread:.2f}", ratio)
    return table


def soak_table(runs: Sequence[Soaked]) -> RenderableType:
    """Show what long runs held after warm-up and at the end, and which bounds they kept."""
    table = new_table("", "", "after warm-up", "at the end", "largest change", "allowed", "")
    notes = []
    for each in runs:
        first, last = each.warm[0], each.warm[-1]
        table.add_section()
        table.add_row(Text(each.workload, style="bold"))
        rows = []
        for kind, change in each.memory_change.items():
            begin, end = each.memory_after_warm_up[kind], each.memory[kind][-1]
            cells = f"{begin:,.1f}", f"{end:,.1f}", f"{100 * change:+.2f} %"
            rows.append((kind, ", MiB", *cells, f"{100 * MOST_MEMORY:g} %"))
        for kind, name in (("open files", "open_files"), ("threads", "threads")):
            if (count := getattr(first, name)) is not None:
                rows.append((kind, "", str(count), str(getattr(last, name)), "", "none"))
        begun, ended = (f"{milliseconds:.2f}" for milliseconds in each.quarters)
        slower, allowed = f"{100 * each.slower:+.1f} %", f"{100 * MOST_SLOWER:g} %"
        rows.append(("a step", ", ms", begun, ended, slower, allowed))
        for kind, unit, *texts in rows:
            broken = any(bound.startswith(kind) for bound in each.broken)
            table.add_row(kind + unit, *texts, "broken" if broken else "kept")
        slope = f"{100 * each.drift:+.1f} ± {100 * each.drift_error:.1f} %"
        table.add_row("  its slope", "", "", slope, "noise", "")
        took = f"{each.steps:,} meta-steps in {each.seconds:,.0f} s"
        notes.append(f"{each.workload}: {took}, with {', '.join(each.plugins)}.")
        for name, reason in each.left_out.items():
            notes.append(f"{each.workload}: without {name}, as {reason}.")
        if first.resident_mib is None:
            notes.append(
                f"{each.workload}: resident memory, open files and threads are not known here, as "
                "there is no /proc: on Linux they are."
            )
    notes.append(
        f"Warm-up is the first {100 * WARM_UP:g} % of the steps. Of a step: medians over the first "
        "and the last quarter of the rest; CPU time on a CPU; the slope of a straight line through "
        "all of it, ± its standard error. It is broken where both say slower."
    )
    return _with_notes(table, notes=notes)


def _with_notes(*tables: RenderableType, notes: Sequence[str]) -> RenderableType:
    return Group(*tables, *(Text(note, style="dim") for note in notes))


def _text(value: float | None, form: str) -> str:
    """Return a value in a form, nothing where there is none; a space before the percent sign."""
    return "" if value is None else form.format(value).replace("%", " %")


def _times(milliseconds: float, spread: float | None) -> tuple[str, str]:
    """To a hundredth below 10 ms, else to a tenth."""
    digits = 2 if milliseconds < 10 else 1
    return f"{milliseconds:.{digits}f}", f"{spread:.{digits}f}"
