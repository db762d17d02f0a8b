"""bench."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metaplug.cli.options import Json
from metaplug.errors import RequestError
from metaplug.report.console import CONSOLE, emit, line

if TYPE_CHECKING:
    from metaplug.bench.meters import Meter

_BENCH_EXAMPLES = """**Examples**

- metaplug bench --workload sinusoid-25x5 --memory

- metaplug bench --threads 1 --repeats 20 --json

- metaplug bench --device cuda --workload conv4-64-max-32x5 --memory

- metaplug bench --scaling --plot scaling.png

- metaplug bench --drawing --repeats 50

- metaplug bench --soak --workload sinusoid --plot soak.png"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog=_BENCH_EXAMPLES)(bench)


def bench(
    context: typer.Context,
    *,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            "--workload",
            help="Which, such as sinusoid-25x5: 25 tasks, 5 steps; of --soak sinusoid or conv4. Repeatable.",
            show_default="all",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option("--device", help="cpu, cuda or cuda:N; cuda adds metaplug's captured steps."),
    ] = "cpu",
    tf32: Annotated[
        bool,
        typer.Option(
            "--tf32", help="On CUDA, let float32 products and convolutions round to TF32."
        ),
    ] = False,
    use: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="PLUGIN",
            help="A plugin to measure the cost of. Repeatable.",
            show_default="gradient-sharing",
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, max=1000, help="How often each is timed, in turn.")
    ] = 9,
    threads: Annotated[int, typer.Option("--threads", min=1, max=1024, help="CPU threads.")] = 1,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="CONTESTANT",
            help="Only this one, as the table names it. Repeatable.",
            show_default="all",
        ),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure the memory of a step too.")
    ] = False,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compiled",
            help="Compile the stacked loop as one more contestant: half a minute or minutes each.",
        ),
    ] = False,
    scaling: Annotated[
        bool,
        typer.Option(
            "--scaling",
            help="Instead, how time and memory of metaplug's step grow with tasks and inner steps.",
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Draw what --scaling measures, or --soak."),
    ] = None,
    drawing: Annotated[
        bool,
        typer.Option(
            "--drawing",
            help="Instead, time the drawing of 32 tasks, 5-way 1-shot with 15 queries, beside torchmeta's loader.",
        ),
    ] = False,
    soak: Annotated[
        bool,
        typer.Option(
            "--soak",
            help="Instead, train a long run with all plugins that compose: are memory, open files and the time of a step flat?",
        ),
    ] = False,
    soak_steps: Annotated[
        int | None,
        typer.Option(
            "--soak-steps",
            min=50,
            help="Meta-steps of --soak.",
            show_default="20,000 of sinusoid, 2,000 of conv4",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time a meta-step side by side: metaplug in every batching, plain torch, higher, and every peer that is installed (make bench-peers).

    On one device, in one process, in turn: medians with half the distance of the quartiles, each one's share of what the device allows, and
    the error of its meta-gradient. --soak ends with status 1 where a run did not stay as it began.
    """
    # torch's profiler would talk of itself on standard error; both are read when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    modes = [
        name
        for name, given in (("--scaling", scaling), ("--drawing", drawing), ("--soak", soak))
        if given
    ]
    if len(modes) > 1:
        raise RequestError(
            f"{' and '.join(modes)} are measurements of their own, of which a command makes one: give one of them"
        )
    _refuse_unused(context, modes[0] if modes else "")
    import torch

    from metaplug.bench.meters import Meter
    from metaplug.execution.devices import resolve_device

    torch.set_num_threads(threads)
    meter = Meter(resolve_device(device), tf32=tf32)
    if tf32 and not meter.cuda:
        raise RequestError(
            "--tf32 rounds on CUDA devices only: give --device cuda too, or leave it out"
        )
    if drawing and meter.cuda:
        raise RequestError(
            f"--drawing --device {device}: torchmeta's loader draws on the CPU, and is timed beside it there: leave --device out"
        )
    if drawing:
        _bench_drawing(repeats, threads, as_json)
    elif scaling:
        _bench_scaling(meter, repeats, plot, as_json)
    elif soak:
        _bench_soak(meter, workload, soak_steps, plot, as_json)
    else:
        plugins = use or ["gradient-sharing"]
        _bench_steps(
            meter,
            workload,
            plugins,
            only or (),
            repeats=repeats,
            memory=memory,
            compiled=compiled,
            as_json=as_json,
        )


_USED = {
    "": ("workload", "device", "tf32", "use", "repeats", "threads", "only", "memory", "compiled"),
    "--scaling": ("device", "tf32", "repeats", "threads", "plot"),
    "--drawing": ("device", "repeats", "threads"),
    "--soak": ("workload", "device", "tf32", "threads", "plot", "soak_steps"),
}
"""By what is measured, the options that make a difference to it, beside --json."""


def _refuse_unused(context: typer.Context, mode: str) -> None:
    """Refuse an option that would change nothing about what is measured."""
    flags = {str(parameter.name): parameter.opts[0] for parameter in context.command.params}
    for name, flag in flags.items():
        users = [f"bench {each}".rstrip() for each, used in _USED.items() if name in used]
        source = context.get_parameter_source(name)
        if (
            users
            and name not in _USED[mode]
            and source is not None
            and source.name == "COMMANDLINE"
        ):
            asked = " ".join(("bench", *([mode] if mode else []), flag))
            raise RequestError(
                f"{asked}: {flag} is an option of {' and '.join(users)}, and changes nothing here: leave it out, or bench that"
            )


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
    from metaplug.experiments.json_values import to_json
    from metaplug.report.bench import bench_table

    rows = run(
        workloads
        or [name for name in WORKLOADS if meter.cuda or name not in ONLY_BY_NAME_ON_A_CPU],
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
    from metaplug.experiments.json_values import to_json
    from metaplug.report.bench import scaling_table
    from metaplug.report.scaling import scaling_figure

    points = run(repeats=repeats, meter=meter, on_series=lambda series: line(f"measuring {series}"))
    if plot:
        scaling_figure(points, plot)
    if as_json:
        emit(to_json(as_json_values(points, repeats, meter), indent=2))
        return
    line(
        f"{_measured(meter, repeats)}; a series ends before a step of more than {MOST_MIB:,.0f} MiB"
    )
    CONSOLE.print(scaling_table(points))


def _measured(meter: Meter, repeats: int) -> str:
    """On what, for a header: cpu (its name), 1 CPU thread, ..."""
    import torch

    return f"{_where(meter)}, torch {torch.__version__}, median of {repeats}"


def _where(meter: Meter) -> str:
    import torch

    threads = torch.get_num_threads()
    return f"{meter.device} ({meter.name}), {threads} CPU thread{'s' if threads > 1 else ''}"


def _bench_drawing(repeats: int, threads: int, as_json: bool) -> None:
    from dataclasses import asdict

    from metaplug.bench.drawing import run
    from metaplug.experiments.json_values import to_json
    from metaplug.report.bench import drawing_table

    rows = run(repeats=repeats)
    if as_json:
        emit(
            to_json(
                {"threads": threads, "repeats": repeats, "rows": [asdict(row) for row in rows]},
                indent=2,
            )
        )
        return
    CONSOLE.print(drawing_table(rows))
    line(
        f"32 5-way 1-shot tasks with 15 queries from 1,600 classes of 20 images, {threads} CPU thread{'s' if threads > 1 else ''}"
    )


def _bench_soak(
    meter: Meter, workloads: list[str] | None, steps: int | None, plot: Path | None, as_json: bool
) -> None:
    import torch

    from metaplug.bench.soak import as_json_values, check_workloads, run
    from metaplug.bench.soak_workloads import SOAKS
    from metaplug.errors import RunError
    from metaplug.experiments.json_values import to_json
    from metaplug.report.bench import soak_table
    from metaplug.report.soak import soak_figure
    from metaplug.report.terminal import TrainingProgress

    check_workloads(names := workloads or list(SOAKS))
    runs = []
    for name in names:
        length = steps or SOAKS[name].steps
        line(f"{name}: {length:,} meta-steps with {', '.join(SOAKS[name].plugins)}")
        with TrainingProgress(CONSOLE, length) as progress:
            runs.append(
                run(name, steps=length, meter=meter, on_record=partial(progress.record, label=name))
            )
    if plot:
        soak_figure(runs, plot)
    if as_json:
        emit(to_json(as_json_values(runs, meter), indent=2))
    else:
        line(f"{_where(meter)}, torch {torch.__version__}")
        CONSOLE.print(soak_table(runs))
    if broken := [f"{each.workload}: {bound}" for each in runs for bound in each.broken]:
        raise RunError(
            f"the soak did not stay as it began: {'; '.join(broken)}; see where with --plot, or --json"
        )
