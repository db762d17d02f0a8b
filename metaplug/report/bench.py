"""What was measured, as tables."""

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
    """What a meta-step costs, each workload by itself, with what it costs at least; ratios are to its first row that has a time, the plain
    torch loop unless that was left out."""
    memory, busy = (
        any(row.peak_mib is not None for row in rows),
        any(row.busy is not None for row in rows),
    )
    more = [*(["busy"] if busy else []), *(["graph MiB", "peak MiB"] if memory else [])]
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
            table.add_row(
                row.contestant,
                *_times(row.milliseconds, row.spread),
                f"{baseline / row.milliseconds:.2f}×",
                "" if row.share is None else f"{100 * row.share:.1f} %",
                "" if row.gradient_error is None else f"{row.gradient_error:.0e}",
                *("" if share is None else f"{100 * share:.0f} %" for share in (row.busy,) if busy),
                *(
                    "" if mib is None else f"{mib:.1f}"
                    for mib in (row.graph_mib, row.peak_mib)
                    if memory
                ),
            )
        least = of_workload[0].limit
        arithmetic = (
            f"limit: {least.flops / 1e9:.3g} GFLOP at {_rate(least.speed.flops_per_second)}"
        )
        table.add_row(arithmetic, f"{least.milliseconds:.2f}", style="dim")
        if least.overhead_bound:
            calls = f"overhead bound: {least.calls:,} calls, {1e6 * least.speed.seconds_per_call:.1f} µs"
            table.add_row(calls, f"{least.calls_milliseconds:.2f}", style="dim")
    return Group(table, *(Text(note, style="dim") for note in _bench_notes(rows)))


def _bench_notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    for reason in dict.fromkeys(row.reason for row in rows if row.reason):
        contestants = "; ".join(
            dict.fromkeys(row.contestant for row in rows if row.reason == reason)
        )
        notes.append(f"– {contestants}: {reason}.")
    precision = rows[0].limit.speed.precision
    notes.append(
        f"Limit: the arithmetic of the step at the rate of a large matrix product in {precision}, measured in this run."
    )
    if any(row.busy is not None for row in rows):
        notes.append(
            "Busy: the share of the time in which the device computes or copies; in the rest it waits to be called."
        )
    if any(row.limit.overhead_bound for row in rows):
        notes.append(
            "Overhead bound: calling the operators takes longer than the arithmetic, even with all tasks stacked; the limit then says "
            "nothing of a contestant that calls them one by one."
        )
    return notes


def _times(milliseconds: float, spread: float) -> tuple[str, str]:
    """To a hundredth below 10 ms, else to a tenth."""
    digits = 2 if milliseconds < 10 else 1
    return f"{milliseconds:.{digits}f}", f"{spread:.{digits}f}"


def _rate(flops_per_second: float) -> str:
    return (
        f"{flops_per_second / 1e12:.1f} TFLOP/s"
        if flops_per_second >= 1e12
        else f"{flops_per_second / 1e9:.0f} GFLOP/s"
    )


def scaling_table(points: Sequence[Point]) -> RenderableType:
    """How the cost of a step grows, a section for each series, and below what each comes to."""
    table = new_table(
        "",
        "workload",
        "tasks",
        "inner steps",
        "graphs kept",
        "ms",
        "±",
        "ms per task",
        "peak MiB",
        "MiB per task",
    )
    for _, series in groupby(points, lambda point: point.series):
        table.add_section()
        for index, point in enumerate(series):
            table.add_row(
                point.workload if index == 0 else "",
                str(point.tasks),
                str(point.inner_steps),
                "all" if point.checkpoint_steps is None else str(point.checkpoint_steps),
                *_times(point.milliseconds, point.spread),
                f"{point.milliseconds_per_task:.3f}",
                f"{point.peak_mib:.1f}",
                f"{point.mib_per_task:.3f}",
            )
    notes = [
        "Of tasks, the cost per task of the most over that of the fewest. Of K inner steps, how what they add to the fixed cost of a step "
        "grows: K^1 in proportion, K^0.5 like √K.",
        "Recomputed: the graphs of about √K inner steps are kept at a time; beside it, their time over that of keeping all.",
    ]
    return Group(table, _growth_table(growth(points)), *(Text(note, style="dim") for note in notes))


def _growth_table(found: Sequence[Growth]) -> RenderableType:
    table = new_table(
        "",
        "growth",
        "of",
        "from",
        "to",
        "time per task",
        "MiB per task",
        "time",
        "MiB",
        "over keeping all",
    )
    for each in found:
        axis = (
            "tasks"
            if each.series.axis == "tasks"
            else f"inner steps{', recomputed' if each.series.recomputed else ''}"
        )
        ratios = (
            "" if ratio is None else f"{ratio:.2f}×"
            for ratio in (each.time_per_task, each.memory_per_task)
        )
        exponents = (
            "" if exponent is None else f"K^{exponent:.2f}"
            for exponent in (each.time_exponent, each.memory_exponent)
        )
        longer = "" if each.times_as_long is None else f"{each.times_as_long:.2f}×"
        table.add_row(
            each.series.workload,
            axis,
            str(each.smallest),
            str(each.largest),
            *ratios,
            *exponents,
            longer,
        )
    return table


def drawing_table(rows: Sequence[DrawRow]) -> RenderableType:
    """What it costs to draw a batch of tasks; ratios are of the other contestants to metaplug, the first row."""
    table = new_table("", "contestant", "ms", "±", "times as long")
    first = rows[0].milliseconds
    for row in rows:
        if row.milliseconds is None or row.spread is None or first is None:
            table.add_row(row.contestant, Text(row.reason or "", style="dim"), "", "")
        else:
            table.add_row(
                row.contestant,
                f"{row.milliseconds:.2f}",
                f"{row.spread:.2f}",
                f"{row.milliseconds / first:.1f}×",
            )
    return table


def soak_table(runs: Sequence[Soaked]) -> RenderableType:
    """What long runs held after warm-up and at the end, the bound that each has to keep, and which plugins took part."""
    table = new_table("", "", "after warm-up", "at the end", "largest change", "allowed", "")
    notes = []
    for each in runs:
        first, last = each.warm[0], each.warm[-1]
        table.add_section()
        table.add_row(Text(each.workload, style="bold"))
        for what, change in each.memory_change.items():
            begin, end = (
                f"{mib:,.1f}" for mib in (each.memory_after_warm_up[what], each.memory[what][-1])
            )
            table.add_row(
                f"{what}, MiB",
                begin,
                end,
                f"{100 * change:+.2f} %",
                f"{100 * MOST_MEMORY:g} %",
                _kept(each, what),
            )
        for what, begin_count, end_count in (
            ("open files", first.open_files, last.open_files),
            ("threads", first.threads, last.threads),
        ):
            if begin_count is not None:
                table.add_row(what, str(begin_count), str(end_count), "", "none", _kept(each, what))
        quarters = (f"{milliseconds:.2f}" for milliseconds in each.quarters)
        table.add_row(
            "a step, ms",
            *quarters,
            f"{100 * each.slower:+.1f} %",
            f"{100 * MOST_SLOWER:g} %",
            _kept(each, "a step"),
        )
        table.add_row(
            "  its slope",
            "",
            "",
            f"{100 * each.drift:+.1f} ± {100 * each.drift_error:.1f} %",
            "noise",
            "",
        )
        notes.append(
            f"{each.workload}: {each.steps:,} meta-steps in {each.seconds:,.0f} s, with {', '.join(each.plugins)}."
        )
        notes += [
            f"{each.workload}: without {name}, as {reason}."
            for name, reason in each.left_out.items()
        ]
        if first.resident_mib is None:
            notes.append(
                f"{each.workload}: resident memory, open files and threads are not known here, as there is no /proc: on Linux they are."
            )
    notes.append(
        f"Warm-up is the first {100 * WARM_UP:g} % of the steps. Of a step: medians over the first and the last quarter of the rest; CPU "
        "time on a CPU; the slope of a straight line through all of it, ± its standard error. It is broken where both say slower."
    )
    return Group(table, *(Text(note, style="dim") for note in notes))


def _kept(each: Soaked, what: str) -> str:
    return "broken" if any(bound.startswith(what) for bound in each.broken) else "kept"
