"""Which runs are of which cell, whatever code computed them: those of the same configuration.

Plugin files are known by their names; where there are two of one name, by their paths too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.json_values import to_json
from metaplug.experiments.plugin_files import file_uses, unrecorded
from metaplug.experiments.runs.layout import CONFIG, SUMMARY
from metaplug.experiments.runs.result import is_finished
from metaplug.experiments.study.cells import Cell
from metaplug.experiments.study.folder import CELLS
from metaplug.experiments.study.identity import asked_by
from metaplug.experiments.study.keeping import KeptRun
from metaplug.settings import validated
from metaplug.yaml_text import read_yaml


def kept_of(cells: Sequence[Cell], kept: Sequence[KeptRun]) -> dict[Cell, list[KeptRun]]:
    """Of every cell the runs that a file has of it, in their order; perhaps none."""
    key, found = _key_among(cells, kept), dict[str, list[KeptRun]]()
    for run in kept:
        found.setdefault(key(run.config), []).append(run)
    return {cell: found.get(key(cell.config), []) for cell in cells}


def to_keep(cells: Sequence[Cell], folder: Path, kept: Sequence[KeptRun]) -> list[Cell]:
    """The finished runs of a study's folder that a file of kept runs lacks; oldest first.

    It lacks one of today's code, and one of another day's where it has none of the cell.

    Raises:
        RequestError: the configuration of a run cannot be read.
    """
    runs = [run for run in (folder / CELLS).glob("*") if is_finished(run)]
    runs.sort(key=lambda run: (run / SUMMARY).stat().st_mtime)
    found = [_Found(run.name, _config_in(run)) for run in runs]
    key, there = _key_among(cells, found), kept_of(cells, kept)
    asked = {key(cell.config): cell for cell in cells}
    return [
        replace(cell, computed_as=run.digest)
        for run in found
        if (cell := asked.get(key(run.config))) is not None
        and (run.digest == cell.digest or not there[cell])
    ]


class _Found(NamedTuple):
    """A finished run in a folder."""

    digest: str
    config: ExperimentConfig


def _key_among(*groups: Sequence[Cell | KeptRun | _Found]) -> Callable[[ExperimentConfig], str]:
    """From a configuration to what those have in common that ask for the same figures."""
    places: dict[str, set[str]] = {}
    for each in chain(*groups):
        places.setdefault(_asked(each.config), set()).add(_places(each.config))

    def key(config: ExperimentConfig) -> str:
        several = len(places.get(asked := _asked(config), ())) > 1
        return asked + _places(config) * several

    return key


def _asked(config: ExperimentConfig) -> str:
    return to_json(asked_by(unrecorded(config)))


def _places(config: ExperimentConfig) -> str:
    return to_json([os.path.normpath(use.plugin) for use in file_uses(config)])


def _config_in(run: Path) -> ExperimentConfig:
    return validated(ExperimentConfig, read_yaml(run / CONFIG), str(run / CONFIG))
