"""The cells of a study, computed: once each, several at once, and again after any end."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from metaplug.experiments.build import Experiment, build, build_tasks
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.parallel import Backend, Failed, in_parallel
from metaplug.experiments.runs.data import agree, digests_of
from metaplug.experiments.runs.folder import BusyError
from metaplug.experiments.runs.reading import read_summary
from metaplug.experiments.runs.result import is_finished
from metaplug.experiments.runs.training import train
from metaplug.experiments.study.cells import Cell, naming, row_text
from metaplug.experiments.study.folder import cell_folder, finished
from metaplug.experiments.study.same_data import source_key
from metaplug.tasks.splits import SPLITS

_WAIT = 1.0
"""Seconds until a cell that another process computes is looked at again."""
_LOOK = 0.1
"""Seconds between two looks at whether a stop was asked for."""
_ELSEWHERE = (
    "it is finished, but not in this folder: workers on other machines must see the study's folder "
    "under the same path; give one of a shared file system by --out"
)


@dataclass(frozen=True)
class Workers:
    """Where cells are computed.

    Attributes:
        jobs: how many at once; None is 1, or all workers of a cluster.
        backend, address: of a cluster that takes their place.
    """

    jobs: int | None = None
    backend: Backend = "processes"
    address: str | None = None


@dataclass(frozen=True)
class _Job:
    config: ExperimentConfig
    name: str
    folder: Path
    stop_file: Path

    def stopped(self) -> bool:
        return self.stop_file.exists()


Ended = Literal["finished", "stopped", "busy"]


def check(
    cells: Sequence[Cell], on_built: Callable[[Cell, Experiment], None]
) -> dict[str, dict[str, str]]:
    """Build what cells name, so that what cannot be composed is refused before training.

    Of the grid that is every variant, and every value of an axis, once.

    Args:
        on_built: called for the first cell of every variant.

    Returns:
        The digests of the data that were read, by `source_key` and split.

    Raises:
        RequestError: a part is unknown or refuses its settings; names the variant and the setting.
    """
    seen: set[str] = set()
    key, tasks, read = None, None, dict[str, dict[str, str]]()
    for cell in cells:
        marks = {f"{cell.variant} {path}={value!r}" for path, value in cell.setting.items()}
        marks.add(cell.variant)
        if marks <= seen:
            continue
        with naming(f"variant '{row_text(cell.variant, cell.setting)}'"):
            if key != (key := (cell.config.tasks, cell.config.model, cell.seed)):
                tasks = build_tasks(cell.config)
                read[source_key(cell.config)] = digests_of(tasks, SPLITS)
            experiment = build(cell.config, tasks)
        if cell.variant not in seen:
            on_built(cell, experiment)
        seen |= marks
    return read


def on_other_data(
    cells: Sequence[Cell], folder: Path, read: Mapping[str, Mapping[str, str]]
) -> list[Cell]:
    """The finished cells that are of other data than `check` has read.

    Raises:
        RunError: the summary of one is damaged.
    """
    return [
        cell
        for cell in cells
        if finished(cell, folder) and (now := read.get(source_key(cell.config))) is not None
        if not agree(read_summary(cell_folder(cell, folder)).get("data") or {}, now)
    ]


def compute(
    cells: Sequence[Cell],
    folder: Path,
    workers: Workers,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Cell, Failed | None]]:
    """Train the cells that are not finished; each is yielded as it ends, with what it failed by.

    Cells that another process computes in this folder are waited for, while others are computed.
    After a stop the cells under way end after their step, with a checkpoint, and none is yielded.

    Args:
        folder: the study's; workers on other machines must see it under the same path.
    """
    left = {cell.digest: cell for cell in cells if not finished(cell, folder)}
    with _stop_file(folder, stop) as stop_file:
        while left and not stop():
            found = in_parallel(
                _compute,
                [
                    _Job(cell.config, cell.label, cell_folder(cell, folder), stop_file)
                    for cell in left.values()
                ],
                jobs=workers.jobs,
                backend=workers.backend,
                address=workers.address,
                stop=stop,
            )
            for job, ended in found:
                if isinstance(ended, Failed):
                    yield left.pop(job.folder.name), ended
                elif ended == "finished":
                    here = is_finished(job.folder)
                    yield left.pop(job.folder.name), None if here else Failed(_ELSEWHERE)
            if left and not stop():
                time.sleep(_WAIT)


def _compute(job: _Job) -> Ended:
    """Train one cell in its folder, or go on with it; a module's function, as workers import it."""
    if is_finished(job.folder):
        return "finished"
    try:
        summary = train(job.config, job.folder, resume=True, stop=job.stopped, name=job.name)
    except BusyError:
        return "busy"
    return "stopped" if summary is None else "finished"


@contextmanager
def _stop_file(folder: Path, stop: Callable[[], bool]) -> Iterator[Path]:
    """A file that is there after a stop: cells look for it after every step, wherever they run."""
    file = folder / f".stop-{socket.gethostname()}-{os.getpid()}"
    with suppress(OSError):
        file.unlink(missing_ok=True)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_LOOK):
            if stop():
                file.touch()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield file
    finally:
        ended.set()
        watcher.join()
        with suppress(OSError):
            file.unlink(missing_ok=True)
