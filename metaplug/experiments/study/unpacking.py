"""Kept runs as results, and as the folders of runs without weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from metaplug.errors import RunError, reason
from metaplug.experiments.configuration import to_yaml
from metaplug.experiments.json_values import to_json
from metaplug.experiments.runs.layout import CONFIG, METRICS, RECORD, SUMMARY
from metaplug.experiments.runs.result import is_finished, result_from
from metaplug.experiments.study.cells import Cell
from metaplug.experiments.study.folder import cell_folder, finished
from metaplug.experiments.study.keeping import KeptRun
from metaplug.experiments.study.matching import kept_of
from metaplug.experiments.study.results import StudyResult, collected
from metaplug.experiments.study.schema import Study
from metaplug.files import make_folder


def kept_results(
    study: Study, cells: Sequence[Cell], kept: Sequence[KeptRun]
) -> StudyResult | None:
    """The results of a study's cells that are kept, without a folder; None of none.

    Of several runs of one configuration the last one counts.
    """
    latest = {cell: runs[-1] for cell, runs in kept_of(cells, kept).items() if runs}
    found = {
        cell: result_from(
            Path(run.digest), run.config, run.values["summary"], run.values["metrics"]
        )
        for cell, run in latest.items()
    }
    return collected(study, cells, found)


def unpack(kept: Sequence[KeptRun], cells: Sequence[Cell], folder: Path) -> tuple[Cell, ...]:
    """The cells of a study, those that were kept as run folders without weights in the study's.

    A cell that is finished there already stays as it is. Of several runs of one configuration that
    of today's code counts, else the last one.

    Raises:
        RunError: the folder cannot be written.
    """
    return tuple(_unpacked(runs, cell, folder) for cell, runs in kept_of(cells, kept).items())


def _unpacked(kept: Sequence[KeptRun], cell: Cell, folder: Path) -> Cell:
    """The cell as it was kept, with a folder; or as it is, where it need not or cannot be."""
    if not kept or finished(cell, folder):
        return cell
    run = next((run for run in kept if run.digest == cell.digest), kept[-1])
    named = replace(cell, computed_as=run.digest)
    place = cell_folder(named, folder)
    if not place.exists():
        _write(run, place)
    return named if finished(named, folder) else cell  # else it has begun there, and goes on


def _write(kept: KeptRun, place: Path) -> None:
    """Write the folder of a run, whole or not at all."""
    values = kept.values
    texts = {
        CONFIG: to_yaml(kept.config),
        RECORD: to_json({"sessions": values["sessions"]}, indent=2) + "\n",
        METRICS: "".join(f"{json.dumps(line)}\n" for line in values["metrics"]),
        SUMMARY: to_json(values["summary"], indent=2) + "\n",
    }
    try:
        make_folder(place.parent)
        with TemporaryDirectory(dir=place.parent, prefix=".", suffix=".tmp") as temporary:
            run = Path(temporary) / place.name
            run.mkdir()
            for name, text in texts.items():
                (run / name).write_text(text, encoding="utf-8")
            if not place.exists():
                run.rename(place)
    except OSError as error:
        if not is_finished(place):  # or another command has unpacked it meanwhile
            raise RunError(f"cannot write {place}: {reason(error)}; give another --out") from error
