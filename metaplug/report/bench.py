"""What was measured, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text

from metaplug.bench import Row
from metaplug.bench.drawing import DrawRow
from metaplug.bench.scaling import Point
from metaplug.report.console import new_table


def bench_table(rows: Sequence[Row]) -> RenderableType:
    """What a meta-step costs, each workload by itself, with what it costs at least; ratios are to its first row that has a time, the plain
    torch loop unless that was left out."""
    memory = any(row.peak_mib is not None for row in rows)
    table = new_table("", "", "ms", "±", "speed", "of limit", "error", *(["graph MiB", "peak MiB"] if memory else []))
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
                f"{row.milliseconds:.1f}",
                f"{row.spread:.1f}",
                f"{baseline / row.milliseconds:.2f}×",
                "" if row.share is None else f"{100 * row.share:.1f} %",
                "" if row.gradient_error is None else f"{row.gradient_error:.0e}",
                *("" if mib is None else f"{mib:.1f}" for mib in (row.graph_mib, row.peak_mib) if memory),
            )
        least = of_workload[0].limit
        arithmetic = f"limit: {least.flops / 1e9:.3g} GFLOP at {least.speed.flops_per_second / 1e9:.0f} GFLOP/s"
        table.add_row(arithmetic, f"{least.milliseconds:.2f}", style="dim")
        if least.overhead_bound:
            calls = f"overhead bound: {least.calls:,} calls, {1e6 * least.speed.seconds_per_call:.1f} µs"
            table.add_row(calls, f"{least.calls_milliseconds:.2f}", style="dim")
    return Group(table, *(Text(note, style="dim") for note in _bench_notes(rows)))


def _bench_notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    for reason in dict.fromkeys(row.reason for row in rows if row.reason):
        contestants = "; ".join(dict.fromkeys(row.contestant for row in rows if row.reason == reason))
        notes.append(f"– {contestants}: {reason}.")
    notes.append("Limit: the arithmetic of the step at the rate of a large matrix product, measured in this run.")
    if any(row.limit.overhead_bound for row in rows):
        notes.append(
            "Overhead bound: calling the operators takes longer than the arithmetic, even with all tasks stacked; the limit then says "
            "nothing of a contestant that calls them one by one."
        )
    return notes


def scaling_table(points: Sequence[Point]) -> RenderableType:
    """How the cost of a step grows, a section for each series."""
    table = new_table("", "workload", "tasks", "inner steps", "ms", "±", "ms per task", "peak MiB", "MiB per task")
    for _, series in groupby(points, lambda point: (point.workload, point.axis)):
        table.add_section()
        for index, point in enumerate(series):
            table.add_row(
                point.workload if index == 0 else "",
                str(point.tasks),
                str(point.inner_steps),
                f"{point.milliseconds:.1f}",
                f"{point.spread:.1f}",
                f"{point.milliseconds_per_task:.3f}",
                f"{point.peak_mib:.1f}",
                f"{point.mib_per_task:.3f}",
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
            table.add_row(row.contestant, f"{row.milliseconds:.2f}", f"{row.spread:.2f}", f"{row.milliseconds / first:.1f}×")
    return table
