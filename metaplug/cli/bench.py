"""bench."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaplug.cli.options import Json
from metaplug.errors import RequestError, RunError
from metaplug.report.console import CONSOLE, RESULTS, emit, line, result

if TYPE_CHECKING:
    from rich.console import RenderableType

    from metaplug.bench.meters import Meter

_BENCH_EXAMPLES = """**Examples**

- metaplug bench --workload sinusoid-25x5 --memory

- metaplug bench --threads 1 --repeats 20 --json

- metaplug bench --device cuda --workload conv4-64-max-32x5 --memory

- metaplug bench --scaling --plot scaling.png

- metaplug bench --drawing --repeats 50

- metaplug bench --soak --workload sinusoid --plot soak.png"""

_STEPS = ("workload", "device", "tf32", "use", "repeats", "threads", "only", "memory", "compiled")
_USED = {
    "": _STEPS,
    "--scaling": ("device", "tf32", "repeats", "threads", "plot"),
    "--drawing": ("device", "repeats", "threads"),
    "--soak": ("workload", "device", "tf32", "threads", "plot", "soak_steps"),
}
"""By what is measured, the options that make a difference to it, beside --json."""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog=_BENCH_EXAMPLES)(bench)


def bench(
    context: typer.Context,
    *,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="Such as sinusoid-25x5, 25 tasks and 5 steps; of --soak sinusoid or conv4. "
            "Repeatable.",
            show_default="all",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; cuda adds metaplug's captured steps.")
    ] = "cpu",
    tf32: Annotated[
        bool, typer.Option("--tf32", help="On CUDA, let float32 products round to TF32.")
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
        int, typer.Option(min=1, max=1000, help="How often each is timed, in turn.")
    ] = 9,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads.")] = 1,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONTESTANT",
            help="Only this one, as the table names it. Repeatable.",
            show_default="all",
        ),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure the memory of a step too.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Add compiled steps: half a minute or minutes each.")
    ] = False,
    scaling: Annotated[
        bool,
        typer.Option(
            "--scaling", help="Instead, let tasks and inner steps of metaplug's step grow."
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw what --scaling measures, or --soak."),
    ] = None,
    drawing: Annotated[
        bool,
        typer.Option("--drawing", help="Instead, time the drawing of tasks, beside torchmeta's."),
    ] = False,
    soak: Annotated[
        bool,
        typer.Option(
            "--soak",
            help="Instead, watch a long run: are memory, files and the time of a step flat?",
        ),
    ] = False,
    soak_steps: Annotated[
        int | None,
        typer.Option(min=50, help="Of --soak.", show_default="sinusoid 20,000, conv4 2,000"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time a meta-step side by side: metaplug in every batching, plain torch, higher, and every
    peer that is installed (make bench-peers).

    On one device, in one process, in turn: medians with half the distance of the quartiles, each
    one's share of what the device allows, and the error of its meta-gradient. --soak ends with
    status 1 where a run did not stay as it began.
    """
    # torch's profiler would talk of itself on standard error; both are read when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    wanted = {"--scaling": scaling, "--drawing": drawing, "--soak": soak}
    modes = [mode for mode in wanted if wanted[mode]]
    if len(modes) > 1:
        raise RequestError(
            f"{' and '.join(modes)} are measurements of their own, of which a command makes one: "
            "give one of them"
        )
    _refuse_unused(context, "".join(modes))
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
            f"--drawing --device {device}: torchmeta's loader draws on the CPU, and is timed "
            "beside it there: leave --device out"
        )
    show = partial(_show, as_json=as_json)
    if drawing:
        _bench_drawing(meter, repeats, show)
    elif scaling:
        _bench_scaling(meter, repeats, plot, show)
    elif soak:
        _bench_soak(meter, workload, soak_steps, plot, show)
    else:
        settings = {"repeats": repeats, "memory": memory, "compiled": compiled, "meter": meter}
        _bench_steps(workload, use or ["gradient-sharing"], only or (), settings, show)


def _refuse_unused(context: typer.Context, mode: str) -> None:
    """Refuse an option that would change nothing about what is measured."""
    for parameter in context.command.params:
        name, flag = str(parameter.name), parameter.opts[0]
        users = [f"bench {each}".rstrip() for each, used in _USED.items() if name in used]
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if users and given and name not in _USED[mode]:
            raise RequestError(
                f"{' '.join(['bench', mode, flag]).replace('  ', ' ')}: {flag} is an option of "
                f"{' and '.join(users)}, and changes nothing here: leave it out, or bench that"
            )


_Show = Callable[[dict[str, Any], "Callable[[], RenderableType]", str], None]


def _show(
    values: dict[str, Any], table: Callable[[], RenderableType], header: str, *, as_json: bool
) -> None:
    """Give programs the values, or people the table below what it was measured on."""
    from metaplug.experiments.json_values import to_json

    if as_json:
        emit(to_json(values, indent=2))
    else:
        result(header)
        RESULTS.print(table())


def _bench_steps(
    workloads: list[str] | None,
    plugins: list[str],
    only: Sequence[str],
    settings: dict[str, Any],
    show: _Show,
) -> None:
    from metaplug.bench import WORKLOADS, as_json_values, run
    from metaplug.bench.workloads import ONLY_BY_NAME_ON_A_CPU
    from metaplug.report.bench import bench_table

    meter, repeats = settings["meter"], settings["repeats"]
    usual = [name for name in WORKLOADS if meter.cuda or name not in ONLY_BY_NAME_ON_A_CPU]
    rows = run(
        workloads or usual,
        plugins,
        only=only,
        on_workload=lambda name: line(f"measuring {name}"),
        **settings,
    )
    show(as_json_values(rows, repeats, meter), lambda: bench_table(rows), _where(meter, repeats))


def _bench_scaling(meter: Meter, repeats: int, plot: Path | None, show: _Show) -> None:
    from metaplug.bench.scaling import MOST_MIB, as_json_values, run
    from metaplug.report.bench import scaling_table
    from metaplug.report.scaling import scaling_figure

    points = run(repeats=repeats, meter=meter, on_series=lambda series: line(f"measuring {series}"))
    if plot:
        scaling_figure(points, plot)
    ends = f"a series ends before a step of more than {MOST_MIB:,.0f} MiB"
    header = f"{_where(meter, repeats)}; {ends}"
    show(as_json_values(points, repeats, meter), lambda: scaling_table(points), header)


def _bench_drawing(meter: Meter, repeats: int, show: _Show) -> None:
    from dataclasses import asdict

    import torch

    from metaplug.bench.drawing import run
    from metaplug.report.bench import drawing_table

    rows = run(repeats=repeats)
    values = {"threads": torch.get_num_threads(), "repeats": repeats}
    tasks = "32 5-way 1-shot tasks with 15 queries from 1,600 classes of 20 images"
    header = f"{tasks}; {_where(meter, repeats)}"
    show({**values, "rows": [asdict(row) for row in rows]}, lambda: drawing_table(rows), header)


def _bench_soak(
    meter: Meter, workloads: list[str] | None, steps: int | None, plot: Path | None, show: _Show
) -> None:
    from metaplug.bench.measuring import check_names
    from metaplug.bench.soak import as_json_values, run
    from metaplug.bench.soak_workloads import SOAKS
    from metaplug.report.bench import soak_table
    from metaplug.report.soak import soak_figure
    from metaplug.report.terminal import TrainingProgress

    check_names("soak workload", names := workloads or list(SOAKS), SOAKS)
    runs = []
    for name in names:
        length = steps or SOAKS[name].steps
        line(f"{name}: {length:,} meta-steps with {', '.join(SOAKS[name].plugins)}")
        with TrainingProgress(CONSOLE, length) as progress:
            record = partial(progress.record, label=name)
            runs.append(run(name, steps=length, meter=meter, on_record=record))
    if plot:
        soak_figure(runs, plot)
    show(as_json_values(runs, meter), lambda: soak_table(runs), _where(meter))
    if broken := [f"{each.workload}: {bound}" for each in runs for bound in each.broken]:
        raise RunError(
            f"the soak did not stay as it began: {'; '.join(broken)}; see where with --plot, or "
            "--json"
        )


def _where(meter: Meter, repeats: int | None = None) -> str:
    """Return on what was measured, for a header: cpu (its name), 1 CPU thread, torch 2.6.0, ..."""
    import torch

    threads = torch.get_num_threads()
    cpu = f"{threads} CPU thread{'s' * (threads > 1)}"
    often = "" if repeats is None else f", median of {repeats}"
    return f"{meter.device} ({meter.name}), {cpu}, torch {torch.__version__}{often}"
