"""compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaplug.cli.options import Set, resolve_options, shared
from metaplug.cli.own_model import say_model
from metaplug.cli.ranks import refuse_several
from metaplug.errors import RequestError
from metaplug.report.console import CONSOLE, emit, line

if TYPE_CHECKING:
    from metaplug.experiments.build import Experiment
    from metaplug.experiments.comparison import Comparison

_COMPARE_EXAMPLES = """**Examples**

- metaplug compare --variant maml --variant maml+gradient-sharing --seeds 3 --json out.json

- metaplug compare --variant maml --variant "fomaml + gradient-sharing:gate=0.3" --tasks sinusoid --model mlp --inner-lr 0.01"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog=_COMPARE_EXAMPLES)(shared(compare))


def compare(
    *,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="PRESET[+PLUGIN[:FIELD=VALUE,...]]...",
            help="One algorithm; give two or more, the baseline first. PRESET may be a YAML file.",
            show_default=False,
            rich_help_panel="Comparison",
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds",
            min=1,
            max=1000,
            help="How many seeds, from --seed on.",
            rich_help_panel="Comparison",
        ),
    ] = 1,
    given: dict[str, Any],
    sets: Set = None,
    json_to: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE|-",
            help="Write everything that was measured as JSON, to a file or to standard output.",
            show_default=False,
            rich_help_panel="Comparison",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="A new folder for comparison.json, curves.png and report.txt.",
            show_default=False,
            rich_help_panel="Comparison",
        ),
    ] = None,
) -> None:
    """Meta-train several algorithms at an equal budget on the same tasks, and say how much faster each is than the first.

    Acceleration: the target is the best validation value that the first variant reaches; (iterations that it needs / iterations that the
    other needs - 1) x 100 %, for each seed.
    """
    refuse_several(
        "compare",
        "start it without torchrun, or train each variant with torchrun -m metaplug train",
    )
    from metaplug.contract.presets import parse_variant
    from metaplug.experiments.comparison import Variant, to_values
    from metaplug.experiments.comparison import compare as compare_variants
    from metaplug.experiments.json_values import to_json
    from metaplug.report.terminal import TrainingProgress, comparison_report, show_memory

    for text in sets or ():
        if text.partition("=")[0].split(".")[0] in ("preset", "plugins"):
            raise RequestError(
                f"--set {text}: in a comparison every variant has its own; write it into --variant, as PRESET+PLUGIN:FIELD=VALUE"
            )
    variants = []
    for text in variant or ():
        preset, uses = parse_variant(text)
        variants.append(
            Variant(
                text.replace(" ", ""), resolve_options(given, sets, preset=preset, uses=uses).config
            )
        )
    _check_outputs(json_to, out)
    first = variants[0].config.seed if variants else 0
    iterations = sum(one.config.training.iterations for one in variants)

    def begin(one: Variant, experiment: Experiment) -> None:
        if experiment.config.seed == first:
            show_memory(experiment, f"{one.label}: ")
            say_model(experiment, f"{one.label}: ")

    with TrainingProgress(CONSOLE, iterations * seeds) as progress:
        comparison = compare_variants(
            variants,
            range(first, first + seeds),
            on_start=begin,
            on_record=lambda one, seed, record: progress.record(
                record, f"{one.label}, seed {seed}"
            ),
        )
    report = comparison_report(comparison)
    CONSOLE.print(report)
    if out is not None:
        _write_folder(comparison, report, out)
    if json_to == "-":
        emit(to_json(to_values(comparison), indent=2))
    elif json_to is not None:
        _write_json(to_values(comparison), Path(json_to))


def _check_outputs(json_to: str | None, out: Path | None) -> None:
    """Refuse before an hour of training what could not be written after it."""
    if json_to not in (None, "-"):
        target = Path(json_to)
        if target.is_dir() or not target.parent.is_dir():
            what = (
                "is a folder"
                if target.is_dir()
                else f"lies in a folder {target.parent} that does not exist"
            )
            raise RequestError(
                f"--json {target}: it {what}; give a file in a folder that exists, or - for standard output"
            )
    if out is not None and out.exists():
        raise RequestError(f"the folder {out} already exists: give another --out")


def _write_folder(comparison: Comparison, report: Any, out: Path) -> None:
    from rich.console import Console

    from metaplug.experiments.comparison import to_values
    from metaplug.report.figures import comparison_figure

    out.mkdir(parents=True)
    _write_json(to_values(comparison), out / "comparison.json")
    comparison_figure(comparison, out / "curves.png")
    with (out / "report.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=120).print(report)
    line(f"comparison.json, curves.png and report.txt are in {out}")


def _write_json(values: Any, path: Path) -> None:
    from metaplug.experiments.json_values import to_json
    from metaplug.files import replacing

    with replacing(path) as file:
        file.write((to_json(values, indent=2) + "\n").encode())
