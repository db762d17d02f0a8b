"""The folder of a study: what was asked, the cells that were ever computed, and the results.

study.yaml    the study as it was last asked for
cells/DIGEST  a run each, as metaplug train keeps it
results.json, table.txt, curves.png    of the cells of study.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from metaplug.errors import RequestError, RunError
from metaplug.experiments.runs.layout import CONFIG as RUN_CONFIG
from metaplug.experiments.runs.result import is_finished
from metaplug.experiments.study.cells import Cell
from metaplug.experiments.study.schema import Study
from metaplug.files import make_folder, replacing

CELLS, CONFIG = "cells", "study.yaml"
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


def begin(study: Study, folder: Path) -> None:
    """Make the folder, and write what is asked; cells that are there stay.

    Raises:
        RunError: it cannot be written.
    """
    try:
        make_folder(folder / CELLS)
    except OSError as error:
        said = f"cannot make the folder {folder / CELLS}: {error.strerror}"
        raise RunError(f"{said}; give another --out") from error
    text = to_yaml(study)
    if not (folder / CONFIG).exists() or (folder / CONFIG).read_text(encoding="utf-8") != text:
        with replacing(folder / CONFIG) as file:
            file.write(text.encode())


def to_yaml(study: Study) -> str:
    """The study as YAML that `read_study` reads back to an equal one."""
    values = study.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=sys.maxsize)
