"""metaplug gpu-report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaplug.cli.options import examples
from metaplug.gpu_report.command import BUDGET, report


@examples(
    "metaplug gpu-report --out runs/h200",
    "metaplug gpu-report --part bench --part memory --budget 200",
    "metaplug gpu-report --device cpu --small",
)
def gpu_report(
    *,
    device: Annotated[
        str, typer.Option(help="cuda or cpu; CUDA_VISIBLE_DEVICES chooses one of several.")
    ] = "cuda",
    budget: Annotated[
        float, typer.Option(help="Seconds that all of it takes at most, at least 10.")
    ] = BUDGET,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where report.md and report.json go.",
            show_default="a new folder in runs/",
        ),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="tests, bench, memory, training or large. Repeatable.", show_default="all"
        ),
    ] = None,
    small: Annotated[
        bool, typer.Option("--small", help="The smallest works in a minute: to try the report.")
    ] = False,
) -> None:
    """Measure a GPU in one command: tests, times, memory and a short training, on one page.

    The page is whole at any moment: stop it, and it says what it has and what it lacks. From the
    repository, `make gpu-report PYTHON=python3` does the same without an installation.
    """
    status = report(device=device, budget=budget, out=out, only=part or (), small=small)
    raise typer.Exit(status)
