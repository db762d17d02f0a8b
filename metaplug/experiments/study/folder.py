"""The folder of a study: what was asked, the cells that were ever computed, and the results.

study.yaml    the study as it was last asked for
cells.json    the folder of each of its runs, which code of another day would name otherwise
cells/DIGEST  a run each, as metaplug train keeps it
results.json, table.txt, curves.png    of the cells of study.yaml
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from metaplug.errors import RequestError, RunError, said_by
from metaplug.experiments.json_values import to_json
from metaplug.experiments.runs.layout import CONFIG as RUN_CONFIG
from metaplug.experiments.runs.result import is_finished
from metaplug.experiments.study.cells import Cell, cells_of
from metaplug.experiments.study.schema import Study, read_study
from metaplug.files import make_folder, replacing

CELLS, CONFIG, INDEX = "cells", "study.yaml", "cells.json"
RESULTS, TABLE, CURVES = "results.json", "table.txt", "curves.png"


def cell_folder(cell: Cell, folder: Path) -> Path:
    """The folder of a cell in its study's."""
    return folder / CELLS / cell.digest


def finished(cell: Cell, folder: Path) -> bool:
    """Whether a cell was computed to its end."""
    return is_finished(cell_folder(cell, folder))


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a study.

    Raises:
        RequestError: as said.
    """
    mend = "give another --name or --out"
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RequestError(f"{folder} is a file, not a folder for a study: {mend}")
    if (folder / RUN_CONFIG).exists():
        raise RequestError(f"{folder} holds a run, not a study: {mend}")
    if any(folder.iterdir()) and not (folder / CONFIG).exists() and not (folder / CELLS).exists():
        raise RequestError(f"{folder} is not empty, and holds no study: {mend}")


def begin(study: Study, cells: Sequence[Cell], folder: Path) -> None:
    """Make the folder, and write what is asked; cells that are there stay.

    Results of another question, or of another day's code, go.

    Raises:
        RunError: it cannot be written.
    """
    try:
        make_folder(folder / CELLS)
    except OSError as error:
        said = f"cannot make the folder {folder / CELLS}: {error.strerror}"
        raise RunError(f"{said}; give another --out") from error
    index = to_json({cell.label: cell.digest for cell in cells}, indent=2)
    texts = {CONFIG: to_yaml(study).encode(), INDEX: f"{index}\n".encode()}
    if any(not _holds(folder / name, text) for name, text in texts.items()):
        for name in (RESULTS, TABLE, CURVES):
            (folder / name).unlink(missing_ok=True)
    for name, text in texts.items():
        with replacing(folder / name) as file:
            file.write(text)


def _holds(path: Path, text: bytes) -> bool:
    return path.is_file() and path.read_bytes() == text


def begun(folder: Path) -> tuple[Study, tuple[Cell, ...]]:
    """The study in a folder and its cells, as they were last computed, whatever code that was.

    Raises:
        RequestError: the study cannot be read, or is none that this version takes.
        RunError: the index of its cells is damaged.
    """
    study = read_study(folder / CONFIG)
    cells = cells_of(study, str(folder / CONFIG), to_compute=False)
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        named = [replace(cell, computed_as=str(index[cell.label])) for cell in cells]
    except (OSError, ValueError, LookupError, TypeError) as error:
        fault = f"{path} is not the index of this study that metaplug wrote ({said_by(error)})"
        raise RunError(f"{fault}: run the study again, which writes it") from None
    if any(Path(cell.digest).name != cell.digest for cell in named):
        raise RunError(f"{path} names folders elsewhere: run the study again, which writes it")
    return study, tuple(named)


def to_yaml(study: Study) -> str:
    """The study as YAML that `read_study` reads back to an equal one."""
    values = study.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=sys.maxsize)
