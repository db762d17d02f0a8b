"""The cells of a study, computed: once each, several at once, and again after any end."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from metaplug.experiments.build import Experiment, build, build_tasks
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.json_values import to_json
from metaplug.experiments.parallel import Backend, Failed, in_parallel
from metaplug.experiments.runs.folder import BusyError
from metaplug.experiments.runs.result import is_finished
from metaplug.experiments.runs.training import train
from metaplug.experiments.study.cells import Cell, naming, row_text
from metaplug.experiments.study.folder import cell_folder, finished

_WAIT = 1.0
"""Seconds until a cell that another process computes is looked at again."""


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
    folder: Path
    stop_file: Path

    def stopped(self) -> bool:
        return self.stop_file.exists()


Ended = Literal["finished", "stopped", "busy"]


def check(cells: Sequence[Cell], on_built: Callable[[Cell, Experiment], None]) -> None:
    """Build what cells name, so that what cannot be composed is refused before training.

    Of the grid that is every variant, and every value of an axis, once.

    Args:
        on_built: called for the first cell of every variant.

    Raises:
        RequestError: a part is unknown or refuses its settings; names the variant and the setting.
    """
    seen: set[str] = set()
    sources: dict[str, tuple[str, object]] = {}
    for cell in cells:
        marks = {f"{cell.variant} {path}={value!r}" for path, value in cell.setting.items()}
        marks.add(cell.variant)
        if marks <= seen:
            continue
        key = to_json(cell.config.tasks.model_dump(mode="json"))
        with naming(f"variant '{row_text(cell.variant, cell.setting)}'"):
            if key not in sources:
                sources.clear()  # one at a time, as they may be large
                sources[key] = key, build_tasks(cell.config)
            experiment = build(cell.config, sources[key][1])  # type: ignore[arg-type]
        if cell.variant not in seen:
            on_built(cell, experiment)
        seen |= marks


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
    with _stop_file(folder) as stop_file:

        def asked() -> bool:
            if (stopped := stop()) and not stop_file.exists():
                stop_file.touch()
            return stopped

        while left and not asked():
            found = in_parallel(
                _compute,
                [_Job(cell.config, cell_folder(cell, folder), stop_file) for cell in left.values()],
                jobs=workers.jobs,
                backend=workers.backend,
                address=workers.address,
                stop=asked,
            )
            for job, ended in found:
                if isinstance(ended, Failed) or ended == "finished":
                    yield left.pop(job.folder.name), ended if isinstance(ended, Failed) else None
            if left and not asked():
                time.sleep(_WAIT)


def _compute(job: _Job) -> Ended:
    """Train one cell in its folder, or go on with it; a module's function, as workers import it."""
    if is_finished(job.folder):
        return "finished"
    try:
        summary = train(job.config, job.folder, resume=True, stop=job.stopped)
    except BusyError:
        return "busy"
    return "stopped" if summary is None else "finished"


@contextmanager
def _stop_file(folder: Path) -> Iterator[Path]:
    """A file of this process that cells look for after every step, wherever they run."""
    file = folder / f".stop-{socket.gethostname()}-{os.getpid()}"
    with suppress(OSError):
        file.unlink(missing_ok=True)
    try:
        yield file
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
