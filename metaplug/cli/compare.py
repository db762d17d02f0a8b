"""metaplug compare."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaplug.cli.options import Set, examples, resolve_options, shared
from metaplug.cli.ranks import world_size
from metaplug.errors import RequestError
from metaplug.report.console import CONSOLE, RESULTS, emit, line, show

if TYPE_CHECKING:
    from metaplug.evaluation.history import Record
    from metaplug.experiments.build import Experiment
    from metaplug.experiments.comparison import Variant

_option = partial(typer.Option, rich_help_panel="Comparison")


@shared
@examples(
    "metaplug compare --variant maml --variant maml+gradient-sharing --seeds 3 --json out.json",
    'metaplug compare --variant maml --variant "fomaml + gradient-sharing:gate=0.3" '
    "--tasks sinusoid --model mlp --inner-lr 0.01",
)
def compare(
    *,
    variant: Annotated[
        list[str] | None,
        _option(
            metavar="PRESET[+PLUGIN[:FIELD=VALUE,...]]...",
            help="One algorithm; give two or more, the baseline first. PRESET may be a YAML file.",
        ),
    ] = None,
    seeds: Annotated[int, _option(min=1, max=1000, help="How many seeds, from --seed on.")] = 1,
    given: dict[str, Any],
    sets: Set = None,
    json_to: Annotated[
        str | None,
        _option(
            "--json", metavar="FILE|-", help="Write all values as JSON; -: to standard output."
        ),
    ] = None,
    out: Annotated[
        Path | None, _option(help="A new folder for comparison.json, curves.png and report.txt.")
    ] = None,
) -> None:
    """Meta-train several algorithms at an equal budget, and say how much faster each is.

    Acceleration: the target is the best validation value that the first variant reaches;
    (iterations that it needs / iterations that the other needs - 1) x 100 %, for each seed.
    """
    if (ranks := world_size()) != "1":
        raise RequestError(
            f"metaplug compare on {ranks} ranks: it runs in one process; start it without "
            "torchrun, or train each variant with torchrun -m metaplug train"
        )
    from rich.console import Console

    from metaplug.experiments.comparison import compare as compare_variants
    from metaplug.experiments.comparison import to_values
    from metaplug.experiments.json_values import to_json
    from metaplug.files import replacing
    from metaplug.report.comparison import comparison_report
    from metaplug.report.figures import comparison_figure
    from metaplug.report.terminal import TrainingProgress, show_own_code

    variants = _variants(variant or [], given, sets)
    # Refuse before the training what could not be written after it.
    file = Path(json_to or "-")
    if file.is_dir() or not file.parent.is_dir():
        fault = f"lies in a folder {file.parent} that does not exist"
        raise RequestError(
            f"--json {file}: it {'is a folder' if file.is_dir() else fault}; "
            "give a file in a folder that exists, or - for standard output"
        )
    if out is not None and out.exists():
        raise RequestError(f"the folder {out} already exists: give another --out")
    first = variants[0].config.seed if variants else 0
    iterations = sum(one.config.training.iterations for one in variants)

    def begin(one: Variant, experiment: Experiment) -> None:
        if experiment.config.seed == first:
            progress.measure_memory(experiment, f"{one.label}: ")
            show_own_code(experiment, f"{one.label}: ")

    def record(one: Variant, seed: int, made: Record) -> None:
        progress.record(made, f"{one.label}, seed {seed}")

    with TrainingProgress(CONSOLE, iterations * seeds) as progress:
        comparison = compare_variants(
            variants,
            range(first, first + seeds),
            on_start=begin,
            on_record=record,
        )
    show(report := comparison_report(comparison), CONSOLE if json_to == "-" else RESULTS)
    values = to_json(to_values(comparison), indent=2)
    files = [] if json_to in (None, "-") else [file]
    if out is not None:
        out.mkdir(parents=True)
        files.append(out / "comparison.json")
    for path in files:
        with replacing(path) as target:
            target.write(f"{values}\n".encode())
    if out is not None:
        comparison_figure(comparison, out / "curves.png")
        with (out / "report.txt").open("w", encoding="utf-8") as text:
            show(report, Console(file=text, width=120))
        line(f"comparison.json, curves.png and report.txt are in {out}")
    if json_to == "-":
        emit(values)


def _variants(texts: list[str], given: dict[str, Any], sets: list[str] | None) -> list[Variant]:
    """Resolve each variant with the shared options."""
    from metaplug.cli.variants import parse_variant
    from metaplug.experiments.comparison import Variant

    for text in sets or ():
        if text.partition("=")[0].split(".")[0] in ("preset", "plugins"):
            raise RequestError(
                f"--set {text}: in a comparison every variant has its own; write it into "
                "--variant, as PRESET+PLUGIN:FIELD=VALUE"
            )
    variants = []
    for text in texts:
        preset, uses = parse_variant(text)
        resolved = resolve_options(given, sets, preset=preset, uses=uses)
        variants.append(Variant(text.replace(" ", ""), resolved.config))
    return variants
