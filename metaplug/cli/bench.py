"""bench."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metaplug.cli.options import Json
from metaplug.report.console import CONSOLE, emit, line

if TYPE_CHECKING:
    from metaplug.bench.meters import Meter

_BENCH_EXAMPLES = """**Examples**

- metaplug bench --workload sinusoid-25x5 --memory

- metaplug bench --threads 1 --repeats 20 --json

- metaplug bench --device cuda --workload conv4-64-max-32x5 --memory

- metaplug bench --scaling --plot scaling.png

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
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N; cuda adds metaplug's captured steps.")] = "cpu",
    tf32: Annotated[bool, typer.Option("--tf32", help="On CUDA, let float32 products and convolutions round to TF32.")] = False,
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
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Compile the stacked loop as one more contestant: half a minute or minutes each.")
    ] = False,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Instead, how time and memory of metaplug's step grow with tasks and inner steps.")
    ] = False,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw what --scaling measures.")] = None,
    drawing: Annotated[
        bool,
        typer.Option("--drawing", help="Instead, time the drawing of 32 tasks, 5-way 1-shot with 15 queries, beside torchmeta's loader."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Time a meta-step side by side: metaplug in every batching, plain torch, higher, and every peer that is installed (make bench-peers).

    On one device, in one process, in turn: medians with half the distance of the quartiles, each one's share of what the device allows, and
    the error of its meta-gradient.
    """
    from metaplug.errors import RequestError

    # torch's profiler would talk of itself on standard error; both are read when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if plot and not scaling:
        raise RequestError("--plot draws what --scaling measures: give both, or neither")
    import torch

    from metaplug.bench.meters import Meter
    from metaplug.runtime.device import resolve_device

    torch.set_num_threads(threads)
    meter = Meter(resolve_device(device), tf32=tf32)
    if tf32 and not meter.cuda:
        raise RequestError("--tf32 rounds on CUDA devices only: give --device cuda too, or leave it out")
    if drawing and meter.cuda:
        raise RequestError(
            f"--drawing --device {device}: torchmeta's loader draws on the CPU, and is timed beside it there: leave --device out"
        )
    if drawing:
        _bench_drawing(repeats, threads, as_json)
    elif scaling:
        _bench_scaling(meter, repeats, plot, as_json)
    else:
        plugins = use or ["gradient-sharing"]
        _bench_steps(meter, workload, plugins, only or (), repeats=repeats, memory=memory, compiled=compiled, as_json=as_json)


def _bench_steps(
    meter: Meter,
    workloads: list[str] | None,
    plugins: list[str],
    only: Sequence[str],
    *,
    repeats: int,
    memory: bool,
    compiled: bool,
    as_json: bool,
) -> None:
    from metaplug.bench import WORKLOADS, as_json_values, run
    from metaplug.bench.workloads import ONLY_BY_NAME_ON_A_CPU
    from metaplug.experiment import to_json
    from metaplug.report.bench import bench_table

    rows = run(
        workloads or [name for name in WORKLOADS if meter.cuda or name not in ONLY_BY_NAME_ON_A_CPU],
        plugins,
        repeats=repeats,
        memory=memory,
        only=only,
        compiled=compiled,
        meter=meter,
        on_workload=lambda name: line(f"measuring {name}"),
    )
    if as_json:
        emit(to_json(as_json_values(rows, repeats, meter), indent=2))
        return
    line(_measured(meter, repeats))
    CONSOLE.print(bench_table(rows))


def _bench_scaling(meter: Meter, repeats: int, plot: Path | None, as_json: bool) -> None:
    from metaplug.bench.scaling import MOST_MIB, as_json_values, run
    from metaplug.experiment import to_json
    from metaplug.report.bench import scaling_table
    from metaplug.report.scaling import scaling_figure

    points = run(repeats=repeats, meter=meter, on_series=lambda series: line(f"measuring {series}"))
    if plot:
        scaling_figure(points, plot)
    if as_json:
        emit(to_json(as_json_values(points, repeats, meter), indent=2))
        return
    line(f"{_measured(meter, repeats)}; a series ends before a step of more than {MOST_MIB:,.0f} MiB")
    CONSOLE.print(scaling_table(points))


def _measured(meter: Meter, repeats: int) -> str:
    """On what, for a header: cpu (its name), 1 CPU thread, ..."""
    import torch

    threads = torch.get_num_threads()
    where = f"{meter.device} ({meter.name}), {threads} CPU thread{'s' if threads > 1 else ''}"
    return f"{where}, torch {torch.__version__}, median of {repeats}"


def _bench_drawing(repeats: int, threads: int, as_json: bool) -> None:
    from dataclasses import asdict

    from metaplug.bench.drawing import run
    from metaplug.experiment import to_json
    from metaplug.report.bench import drawing_table

    rows = run(repeats=repeats)
    if as_json:
        emit(to_json({"threads": threads, "repeats": repeats, "rows": [asdict(row) for row in rows]}, indent=2))
        return
    CONSOLE.print(drawing_table(rows))
    line(f"32 5-way 1-shot tasks with 15 queries from 1,600 classes of 20 images, {threads} CPU thread{'s' if threads > 1 else ''}")
