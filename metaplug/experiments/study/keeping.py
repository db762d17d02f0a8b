"""Runs kept small: a line of JSON for each finished one, in a file that a repository can hold.

A line has all that results are made of, and no weights.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StrictStr

from metaplug.errors import RequestError, RunError, reason
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.json_values import to_json
from metaplug.experiments.runs.reading import (
    Figure,
    MetricsLine,
    Summary,
    Validation,
    Values,
    read_as,
)
from metaplug.experiments.runs.result import read_result
from metaplug.experiments.runs.sessions import read_sessions
from metaplug.experiments.study.cells import Cell
from metaplug.experiments.study.folder import cell_folder
from metaplug.files import make_folder
from metaplug.settings import validated

_DIGITS = 6
"""Significant ones of figures."""
_SAME_FOR_ALL = ("interval_method", "low", "high", "num_tasks", "inner_steps", "transductive")
"""Of every validation: what its other values or the configuration and the test tell."""
_OF_THE_MACHINE = ("folder", "process")
"""Of every session: what says nothing on another machine."""


class _Summary(Summary):
    per_task: list[Figure] = Field(min_length=1)


class _Line(MetricsLine):
    validation: Validation


class _Form(Values):
    label: StrictStr
    digest: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    config: ExperimentConfig
    sessions: list[dict[str, Any]]
    summary: _Summary
    metrics: list[_Line] = Field(min_length=1)


@dataclass(frozen=True)
class KeptRun:
    """A line of a file of kept runs.

    Attributes:
        digest: of the cell, by the code that computed it.
        config: its configuration.
        values: the whole line.
    """

    digest: str
    config: ExperimentConfig
    values: Mapping[str, Any]


def read_kept(path: Path) -> list[KeptRun]:
    """The runs in a file, in their order; none where there is no file yet.

    Raises:
        RequestError: it cannot be read.
        RunError: a line is not one that `keep` writes; names it.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RequestError(f"cannot read {path}: {reason(error)}; give another --keep") from None
    mend = "take it from a backup, or remove the line, and the run is computed anew"
    found = []
    for number, line in enumerate(lines[: -1 if lines[-1] == b"" else None], 1):
        where = f"{path}, line {number}"
        values = read_as(line, _Form, f"{where},", mend)
        config = validated(ExperimentConfig, values["config"], where)
        found.append(KeptRun(values["digest"], config, values))
    return found


def keep(path: Path, cells: Iterable[Cell], folder: Path) -> None:
    """Add finished cells of a study's folder to a file, but those that are there; it may be new.

    Every line is one write, so two commands may add to one file.

    Raises:
        RunError: a run or the file is damaged, or the file cannot be written.
    """
    there = {run.digest for run in read_kept(path)}
    for cell in cells:
        if cell.digest in there:
            continue
        there.add(cell.digest)
        _append(path, to_json(_line(cell, cell_folder(cell, folder)), dense=True))


def _line(cell: Cell, folder: Path) -> dict[str, Any]:
    run = read_result(folder)
    validations = [
        {**line, "validation": _without(line["validation"], _SAME_FOR_ALL)}
        for line in run.metrics
        if line.get("validation")
    ]
    return {
        "label": cell.label,
        "digest": cell.digest,
        "config": run.config.model_dump(mode="json"),
        "sessions": [_portable(session) for session in read_sessions(folder)],
        "summary": _short(_portable(run.summary)),
        "metrics": _short(validations),
    }


def _portable(session: Mapping[str, Any]) -> dict[str, Any]:
    """What a session or a summary tells on another machine too: plugin files by digest alone."""
    own, files = _without(session, _OF_THE_MACHINE), session.get("plugin_files") or {}
    digests = {name: _without(file, ["path"]) for name, file in files.items()}
    return own | ({"plugin_files": digests} if digests else {})


def _without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _short(value: Any, name: str = "") -> Any:
    """The values with rounded numbers, but for means: targets are compared with them exactly."""
    if isinstance(value, dict):
        return {key: _short(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [_short(inner) for inner in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) and name != "mean" else value


def _append(path: Path, line: str) -> None:
    """Add a line in one write, as others may write too; first end one that an editor cut short."""
    try:
        make_folder(path.parent)
        with path.open("ab+", buffering=0) as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            cut = file.read() not in (b"", b"\n")
            text = b"\n" * cut + f"{line}\n".encode()
            if file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
    except OSError as error:
        mend = "give another --keep, and do it again"
        raise RunError(f"cannot write {path}: {reason(error)}; {mend}") from error
