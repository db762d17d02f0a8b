"""bench."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from metaplug.cli.options import Json
from metaplug.report.console import CONSOLE, emit, line

_BENCH_EXAMPLES = """**Examples**

- metaplug bench --workload sinusoid-25x5 --memory

- metaplug bench --threads 1 --repeats 20 --json

- metaplug bench --drawing --repeats 50"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog=_BENCH_EXAMPLES)(bench)


def bench(
    *,
    workload: Annotated[
        list[str] | None,
        typer.Option("--workload", help="Which, such as sinusoid-25x5: 25 tasks, 5 steps. Repeatable.", show_default="all"),
    ] = None,
    use: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="PLUGIN", help="A plugin to measure the cost of. Repeatable.", show_default="gradient-sharing"),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, max=1000, help="How often each is timed, in turn.")] = 9,
    threads: Annotated[int, typer.Option("--threads", min=1, max=1024, help="CPU threads.")] = 1,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="CONTESTANT", help="Only this one, as the table names it. Repeatable.", show_default="all"),
    ] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Measure the memory of a step too.")] = False,
    drawing: Annotated[
        bool,
        typer.Option("--drawing", help="Time the drawing of 32 tasks, 5-way 1-shot with 15 queries, beside torchmeta's loader."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Time a meta-step side by side: metaplug in every batching, plain torch, plain higher; with each one's error of the meta-gradient.

    On a CPU, in one process, in turn; medians with half the distance of the quartiles.
    """
    # torch's profiler would talk of itself on standard error; both are read when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch

    from metaplug.bench import WORKLOADS, as_json_values, run
    from metaplug.experiment import to_json
    from metaplug.report.terminal import bench_table

    torch.set_num_threads(threads)
    if drawing:
        _bench_drawing(repeats, threads, as_json)
        return
    chosen = workload or list(WORKLOADS)
    plugins = use or ["gradient-sharing"]
    rows = run(chosen, plugins, repeats=repeats, memory=memory, only=only or (), on_workload=lambda name: line(f"measuring {name}"))
    if as_json:
        emit(to_json(as_json_values(rows, repeats), indent=2))
    else:
        CONSOLE.print(bench_table(rows))
        line(f"torch {torch.__version__}, {threads} CPU thread{'s' if threads > 1 else ''}, median of {repeats}")


def _bench_drawing(repeats: int, threads: int, as_json: bool) -> None:
    from dataclasses import asdict

    from metaplug.bench_tasks import run
    from metaplug.experiment import to_json
    from metaplug.report.terminal import drawing_table

    rows = run(repeats=repeats)
    if as_json:
        emit(to_json({"threads": threads, "repeats": repeats, "rows": [asdict(row) for row in rows]}, indent=2))
        return
    CONSOLE.print(drawing_table(rows))
    line(f"32 5-way 1-shot tasks with 15 queries from 1,600 classes of 20 images, {threads} CPU thread{'s' if threads > 1 else ''}")
