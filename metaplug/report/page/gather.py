"""What a page is about: a study read from its folder, or runs as a small study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from metaplug.errors import RequestError
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.runs.layout import CONFIG, METRICS
from metaplug.experiments.runs.reading import read_metrics
from metaplug.experiments.runs.result import RunResult, is_finished, read_result
from metaplug.experiments.study.cells import Cell
from metaplug.experiments.study.folder import CELLS, begun, cell_folder
from metaplug.experiments.study.folder import CONFIG as STUDY
from metaplug.experiments.study.results import read_results
from metaplug.report.page.material import Begun, Material, Unfinished
from metaplug.report.page.small_study import small_study
from metaplug.settings import validated
from metaplug.yaml_text import read_yaml


def gather(folders: Sequence[Path]) -> Material:
    """Read the folder of a study, or folders of runs, which then are a small study.

    A study beside others stands for all its runs.

    Raises:
        RequestError: a folder is neither, a study has no finished cell, or the runs cannot stand
            in one report.
        RunError: a file of a run is damaged.
    """
    for folder in folders:
        if not folder.is_dir():
            raise RequestError(f"there is no folder {folder}: give the folder of a run or a study")
        if not any((folder / name).exists() for name in (STUDY, CONFIG)):
            raise RequestError(
                f"{folder} is neither a study (it has no {STUDY}) nor a run (no {CONFIG}): give a "
                "folder that `metaplug train` or `metaplug study` wrote"
            )
    if len(folders) == 1 and _is_study(folders[0]):
        return _study(folders[0])
    runs = [run for folder in folders for run in _runs_in(folder)]
    return small_study([read_run(run) for run in runs])


def read_run(folder: Path) -> RunResult | Begun:
    """The finished run in a folder, or one that has begun.

    Raises:
        RequestError: it has no iteration yet.
        RunError: a file is damaged.
    """
    if is_finished(folder):
        return read_result(folder)
    lines = read_metrics(folder, finished=False) if (folder / METRICS).exists() else []
    if not lines:
        raise RequestError(
            f"{folder} has no iteration yet, so there is nothing to report: go on with --resume"
        )
    path = folder / CONFIG
    return Begun(folder, validated(ExperimentConfig, read_yaml(path), str(path)), lines)


def _is_study(folder: Path) -> bool:
    return (folder / STUDY).exists()


def _runs_in(folder: Path) -> list[Path]:
    """The folder itself, or the runs of the study in it."""
    if not _is_study(folder):
        return [folder]
    runs = sorted(path.parent for path in (folder / CELLS).glob(f"*/{CONFIG}"))
    finished = [run for run in runs if is_finished(run)]
    if not finished:
        raise RequestError(
            f"{folder}: no cell of this study is finished, so there is nothing to report: let "
            "`metaplug study` finish one"
        )
    return finished


def _study(folder: Path) -> Material:
    """The study in a folder, by its file."""
    study, cells = begun(folder)
    result = read_results(study, cells, folder)
    if result is None:
        raise RequestError(
            f"{folder}: no run of this study is finished, so there is nothing to report: let "
            "`metaplug study` finish one"
        )
    unfinished = [(cell, _begun(cell, folder)) for cell in result.missing]
    return Material(
        folder.resolve().name,
        result,
        tuple(Unfinished(cell.variant, cell.setting, run) for cell, run in unfinished if run),
        (folder / STUDY).read_text(encoding="utf-8"),
    )


def _begun(cell: Cell, folder: Path) -> Begun | None:
    """The unfinished run of a cell; None where it has no iteration yet."""
    place = cell_folder(cell, folder)
    if not (place / METRICS).exists():
        return None
    lines = read_metrics(place, finished=False)
    return Begun(place, cell.config, lines) if lines else None
