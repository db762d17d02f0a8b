"""metaplug compare: a study of one axis, the variants."""

from __future__ import annotations

import hashlib
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaplug.cli.options import Set, examples, shared
from metaplug.cli.resolving import parse_setting
from metaplug.cli.study import Address, BackendOption, Jobs, refuse_ranks, run, workers_of
from metaplug.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metaplug.experiments.study.cells import Cell
    from metaplug.experiments.study.schema import Study

_option = partial(typer.Option, rich_help_panel="Comparison")


@shared
@examples(
    "metaplug compare --variant maml --variant maml+gradient-sharing --seeds 3 --jobs 2",
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
        Path | None,
        _option(help="The study's folder.", show_default="runs/ and the variants' names"),
    ] = None,
    jobs: Jobs = None,
    backend: BackendOption = "processes",
    address: Address = None,
) -> None:
    """Meta-train several algorithms at an equal budget, and say how much faster each is.

    Acceleration: the target is the best validation value that the first variant reaches;
    (iterations that it needs / iterations that the other needs - 1) x 100 %, for each seed.
    A study of one axis: the same command goes on after any end, and computes no run twice.
    """
    from metaplug.experiments.study.cells import cells_of

    refuse_ranks("compare", "or train each variant with torchrun -m metaplug train")
    # Refuse before the training what could not be written after it.
    file = Path(json_to or "-")
    if file.is_dir() or not file.parent.is_dir():
        fault = f"lies in a folder {file.parent} that does not exist"
        raise RequestError(
            f"--json {file}: it {'is a folder' if file.is_dir() else fault}; "
            "give a file in a folder that exists, or - for standard output"
        )
    asked = _study(variant or [], seeds, given, sets)
    cells = cells_of(asked, "")
    folder = Path("runs") / _name(cells) if out is None else out
    run(asked, cells, folder, workers_of(jobs, backend, address), json_to=json_to)


def _study(texts: list[str], seeds: int, given: dict[str, Any], sets: list[str] | None) -> Study:
    """The study of variants with the shared options."""
    from metaplug.experiments.resolving import assign
    from metaplug.experiments.study.schema import Study
    from metaplug.settings import validated

    if len(texts) < 2:
        fault = f"a comparison needs at least two variants, not {len(texts)}"
        raise RequestError(f"{fault}: give the baseline first, then another, by --variant")
    base: dict[str, Any] = {}
    first = given.pop("seed", 0)
    for text in sets or ():
        if text.partition("=")[0].split(".")[0] in ("preset", "plugins"):
            raise RequestError(
                f"--set {text}: in a comparison every variant has its own; write it into "
                "--variant, as PRESET+PLUGIN:FIELD=VALUE"
            )
    for path, value in [*given.items(), *map(parse_setting, sets or ())]:
        base = assign(base, path, value)
    values = {"base": base, "variants": texts, "seeds": list(range(first, first + seeds))}
    return validated(Study, values, "compare")


def _name(cells: Sequence[Cell]) -> str:
    """Name a comparison after its variants; another with other options has another name."""
    labels = list(dict.fromkeys(cell.variant for cell in cells))
    text = re.sub(r"[^\w.+-]+", "-", "-vs-".join(labels))[:80]
    digests = "".join(sorted({cell.digest for cell in cells if cell.seed == cells[0].seed}))
    return f"{text}-{hashlib.sha256(digests.encode()).hexdigest()[:8]}"
