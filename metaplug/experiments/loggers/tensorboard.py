"""The logger for TensorBoard: event files, which `tensorboard --logdir` shows."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, final

from pydantic import Field

from metaplug.contract.logger import Ending, LoggedRun, LoggedStep, Logger, LoggerConfig
from metaplug.experiments.loggers.tables import check_installed, final_figures, markdown


@final
class Tensorboard(Logger):
    """Log to TensorBoard: scalars, the configuration, the curves and the final table.

    It writes event files; tensorboard --logdir runs shows those of all runs while they train. A run
    that goes on adds a file, and the points that a killed process left too many are purged.

    Needs pip install 'metaplug[tensorboard]'.
    """

    class Config(LoggerConfig):
        """Where the event files are."""

        folder: str | None = Field(
            None,
            description="Folder that holds event files of several runs, each in one of its own; "
            "null: tensorboard in the run's folder.",
        )

    config: Config

    def __init__(self, *, name: str | None = None, **settings: Any) -> None:
        super().__init__(name=name, **settings)
        check_installed("tensorboard", "tensorboard")

    def start(self, run: LoggedRun) -> int:
        """Go on after the last point that is whole."""
        own = self.config.folder
        folder = run.folder / "tensorboard" if own is None else Path(own, f"{run.name}-{run.id}")
        # A killed process may have written a part of its last iteration.
        has = min(max(_last_iteration(folder) - 1, 0), run.iteration)
        _wait_for_a_later_name(folder)
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        self._writer: Any = writer(folder, purge_step=has + 1)
        if not has:
            table = markdown(run.settings, "field", "value")
            self._writer.add_text("configuration", table, global_step=0)
        return has

    def log(self, step: LoggedStep, *, durable: bool) -> None:
        """Write a point for each figure."""
        for name, value in step.values.items():
            self._writer.add_scalar(name, value, global_step=step.iteration)
        if durable:
            self._writer.flush()

    def finish(self, summary: Mapping[str, Any], curves: Path | None) -> None:
        """Write the test as points and as a table, and the picture."""
        figures, end = final_figures(summary), summary["iterations"]
        for name in (name for name in figures if name.startswith("test/")):
            self._writer.add_scalar(name, figures[name], global_step=end)
        self._writer.add_text("final", markdown(figures, "figure", "value"), global_step=end)
        if curves is not None:
            pixels = import_module("matplotlib.image").imread(curves)[..., :3]
            self._writer.add_image("curves", pixels, global_step=end, dataformats="HWC")

    def close(self, ending: Ending) -> None:
        """Write out what waits."""
        self._writer.close()


def _last_iteration(folder: Path) -> int:
    """The last iteration in the event files of a folder; 0 without any."""
    if not folder.is_dir():
        return 0
    reader = import_module("tensorboard.backend.event_processing.event_accumulator")
    log = logging.getLogger("tensorboard")
    before = log.level
    log.setLevel(logging.ERROR)  # it warns of every point that it purges, as it is asked to
    try:
        events = reader.EventAccumulator(str(folder), size_guidance={"images": 1}).Reload()
    finally:
        log.setLevel(before)
    tags = events.Tags()["scalars"]
    return max((events.Scalars(tag)[-1].step for tag in tags), default=0)


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait a second at most: files are read by name, and two of one second in no given order."""
    begun = [file.name.split(".")[3] for file in folder.glob("events.out.tfevents.*")]
    newest = max((int(second) for second in begun if second.isdigit()), default=0)
    time.sleep(min(max(newest + 1 - time.time(), 0.0), 1.0))
