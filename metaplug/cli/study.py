"""metaplug study: a grid of runs; and what it shares with metaplug compare, a study of one axis."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from metaplug.cli.options import Json, Set, check_name, examples
from metaplug.cli.ranks import world_size
from metaplug.cli.stopping import StoppedError, stop_on_signals
from metaplug.errors import RequestError, RunError
from metaplug.report.console import CONSOLE, emit, line, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from metaplug.experiments.build import Experiment
    from metaplug.experiments.parallel import Backend
    from metaplug.experiments.study.cells import Cell
    from metaplug.experiments.study.results import StudyResult
    from metaplug.experiments.study.running import Workers
    from metaplug.experiments.study.schema import Study

_place = partial(typer.Option, rich_help_panel="Where it runs")

Jobs = Annotated[
    int | None,
    _place(
        "--jobs",
        "-j",
        min=1,
        max=1024,
        help="Runs at once, each in a process of its own.",
        show_default="1, or all workers of a cluster",
    ),
]
BackendOption = Annotated[
    Literal["processes", "dask", "ray"],
    _place("--backend", help="Processes of this machine, or a cluster that is there."),
]
Address = Annotated[
    str | None, _place(metavar="HOST:PORT", help="Of the cluster's scheduler, as tcp://host:8786.")
]


@examples(
    "metaplug study rates.yaml --jobs 2",
    "metaplug study rates.yaml --dry-run",
    "metaplug study rates.yaml --keep rates.jsonl",
    "metaplug study rates.yaml --backend dask --address tcp://host:8786",
)
def study(
    file: Annotated[
        Path, typer.Argument(metavar="STUDY.yaml", help="Variants, axes, seeds: see the guide.")
    ],
    *,
    name: Annotated[
        str | None, typer.Option(help="The study's name.", show_default="the file's")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder that holds runs and studies.")] = Path(
        "runs"
    ),
    sets: Set = None,
    jobs: Jobs = None,
    backend: BackendOption = "processes",
    address: Address = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="A file of small results: runs in it are not computed again, new ones are added.",
        ),
    ] = None,
    no_train: Annotated[
        bool, typer.Option("--no-train", help="Show the results that are there; train no run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the runs and which are there; train none.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a grid of runs: variants, values of fields, seeds; and compare them.

    Each run is kept in OUT/NAME/cells, in a folder named by the digest of its configuration and
    code: the same command goes on after any end, and a study that has grown computes what is new.
    """
    from metaplug.cli.resolving import parse_setting
    from metaplug.experiments.study.cells import cells_of
    from metaplug.experiments.study.schema import read_study

    refuse_ranks("study", "and give --jobs, or a cluster by --backend")
    given = [parse_setting(text) for text in sets or ()]
    asked = _with_sets(read_study(file, [path for path, _ in given]), given)
    check_name(name, "studies")
    folder = out / (name or file.stem)
    cells = cells_of(asked, str(file))
    if dry_run:
        show(_listing(cells, folder, keep))
        return
    workers = None if no_train else workers_of(jobs, backend, address)
    run(asked, cells, folder, workers, json_to="-" if as_json else None, kept_in=keep)


def refuse_ranks(command: str, mend: str) -> None:
    """Refuse torchrun, which would start the same study several times."""
    if (ranks := world_size()) != "1":
        raise RequestError(
            f"metaplug {command} on {ranks} ranks: it runs in one process; start it without "
            f"torchrun, {mend}"
        )


def workers_of(jobs: int | None, backend: Backend, address: str | None) -> Workers:
    """Where runs are computed, by the options."""
    from metaplug.experiments.study.running import Workers

    return Workers(jobs, backend, address)


def _with_sets(asked: Study, sets: Sequence[tuple[str, Any]]) -> Study:
    """The study with other fields in its base."""
    from metaplug.experiments.configuration import flatten
    from metaplug.experiments.resolving import assign, is_inside

    base = asked.base
    for path, value in sets:
        for axis in asked.axes:
            if any(is_inside(field, axis) for field in flatten({path: value})):
                raise RequestError(f"--set {path}: {axis} is an axis of the study; change it there")
        for variant in asked.variants:
            if any(is_inside(path, field) or is_inside(field, path) for field in variant.set):
                raise RequestError(
                    f"--set {path}: the variant '{variant.label}' has a value of its own; change "
                    "it there"
                )
        base = assign(base, path, value)
    return asked.model_copy(update={"base": base})


def run(
    asked: Study,
    cells: Sequence[Cell],
    folder: Path,
    workers: Workers | None,
    *,
    json_to: str | None,
    kept_in: Path | None = None,
) -> None:
    """Compute what is not there of a study's cells in its folder; show and write the results.

    Args:
        workers: None computes nothing.
        json_to: the file of all values, besides the folder's; "-": standard output, alone.
        kept_in: a file of small results, which counts as the folder does and has what it has.

    Raises:
        RequestError: the folder holds something else than a study, or a cell cannot be built.
        RunError: a cell failed; the others were computed, and shown.
        StoppedError: a signal came; what was computed is kept.
    """
    from metaplug.experiments.study.folder import begin, check_folder, finished
    from metaplug.experiments.study.results import read_results
    from metaplug.experiments.study.running import check, on_other_data

    check_folder(folder)
    if kept_in is not None:
        cells = _kept(kept_in, cells, folder)
    runs = list({cell.digest: cell for cell in cells}.values())  # variants may be the same
    left = [cell for cell in runs if not finished(cell, folder)]
    if left and workers is not None:
        read = check(left, _show_code)
        if older := on_other_data(runs, folder, read):
            are = "run, first {}, is" if len(older) == 1 else "runs, first {}, are"
            line(
                f"{len(older)} finished {are.format(older[0].label)} of other data than "
                f"{older[0].config.tasks.source} has now, and will not be compared with new ones: "
                "bring the data back as they were, or give another --name"
            )
    begin(asked, cells, folder)
    line(f"{len(runs)} runs in {folder}, {len(runs) - len(left)} of them finished already")
    failed = _compute(runs, folder, workers, kept_in) if left and workers is not None else []
    if (found := read_results(asked, cells, folder)) is not None:
        begin(
            asked, cells, folder
        )  # of another study that began here meanwhile, nothing else stays
        _publish(found, folder, json_to)
    elif workers is None:
        raise RequestError("no run is finished, so there is nothing to show: leave out --no-train")
    if failed:
        cell, text = failed[0]
        raise RunError(f"{len(failed)} of {len(runs)} runs failed, first {cell.label}: {text}")


def _kept(path: Path, cells: Sequence[Cell], folder: Path) -> Sequence[Cell]:
    """The cells, what is kept of them unpacked in the folder; keep what the folder has of them."""
    from metaplug.experiments.study.keeping import keep, read_kept
    from metaplug.experiments.study.matching import to_keep
    from metaplug.experiments.study.unpacking import unpack

    keep(path, to_keep(cells, folder, read_kept(path)), folder)
    return unpack(read_kept(path), cells, folder)


def _show_code(cell: Cell, experiment: Experiment) -> None:
    from metaplug.report.terminal import show_own_code

    show_own_code(experiment, f"{cell.variant}: ")


def _compute(
    cells: Sequence[Cell], folder: Path, workers: Workers, kept_in: Path | None
) -> list[tuple[Cell, str]]:
    """Compute what is not there, with progress; return what failed, and by what."""
    from metaplug.experiments.study.folder import finished
    from metaplug.experiments.study.keeping import keep
    from metaplug.experiments.study.running import compute
    from metaplug.experiments.study.watching import Watch
    from metaplug.report.study_progress import StudyProgress

    done = sum(finished(cell, folder) for cell in cells)
    failed: list[tuple[Cell, str]] = []
    progress = StudyProgress(CONSOLE, Watch(cells, folder), len(cells), done)
    with stop_on_signals() as stop, progress:
        for cell, failure in compute(cells, folder, workers, stop):
            if failure is None:
                progress.end(cell)
                if kept_in is not None:
                    keep(kept_in, [cell], folder)
            else:
                failed.append((cell, failure.text))
                line(f"metaplug: {cell.label}: {failure.text}", style="red")
    if stop():
        ended = sum(finished(cell, folder) for cell in cells)
        raise StoppedError(
            f"stopped: {ended} of {len(cells)} runs in {folder} are finished, and those that were "
            "under way have a checkpoint",
            stop.signal,
            again="",
        )
    return failed


def _publish(found: StudyResult, folder: Path, json_to: str | None) -> None:
    """Show the tables, and write what the folder keeps of the results."""
    from rich.console import Console

    from metaplug.experiments.json_values import to_json
    from metaplug.experiments.study.folder import CURVES, RESULTS, TABLE
    from metaplug.experiments.study.values import to_values
    from metaplug.files import replacing
    from metaplug.report.figures import study_figure
    from metaplug.report.study import study_tables

    values, tables = to_json(to_values(found), indent=2), study_tables(found)
    if json_to != "-":
        show(tables)
    text = io.StringIO()
    show(tables, Console(file=text, width=120, markup=False, emoji=False))
    files = {folder / RESULTS: f"{values}\n", folder / TABLE: text.getvalue()}
    if json_to not in (None, "-"):
        files[Path(json_to)] = f"{values}\n"
    for path, content in files.items():
        with replacing(path) as target:
            target.write(content.encode())
    study_figure(found, folder / CURVES)
    line(f"{RESULTS}, {TABLE} and {CURVES} are in {folder}; metaplug report {folder} draws a page")
    if json_to == "-":
        emit(values)


def _listing(cells: Sequence[Cell], folder: Path, kept_in: Path | None) -> Table:
    """Lay out the cells, each with its folder and whether it is there."""
    from metaplug.experiments.study.folder import cell_folder, finished
    from metaplug.experiments.study.keeping import read_kept
    from metaplug.experiments.study.matching import kept_of
    from metaplug.report.console import new_table

    kept = kept_of(cells, () if kept_in is None else read_kept(kept_in))
    table = new_table(f"{len(cells)} runs in {folder}", "run", "cell", "state")
    for cell in cells:
        state = "begun" if cell_folder(cell, folder).exists() else "to compute"
        state = "kept" if kept[cell] else state
        table.add_row(cell.label, cell.digest, "finished" if finished(cell, folder) else state)
    return table
