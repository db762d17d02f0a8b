"""The logger for Weights & Biases: offline by default, for `wandb sync` to send."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, final

from pydantic import Field

from metaplug.contract.logger import Ending, LoggedRun, LoggedStep, Logger, LoggerConfig
from metaplug.experiments.loggers.tables import check_installed, final_figures
from metaplug.experiments.loggers.wandb_files import last_step

_STATUS = {"finished": 0, "failed": 1, "stopped": 255}
"""What wandb calls finished, failed, and killed by Ctrl-C."""


@final
class Wandb(Logger):
    """Log to Weights & Biases: history, the configuration, the curves and the final table.

    Offline by default, so nothing leaves the machine: wandb sync sends the files when you like. A
    run that goes on keeps its id at Weights & Biases.

    Needs pip install 'metaplug[wandb]'.
    """

    class Config(LoggerConfig):
        """Where figures go at Weights & Biases, and in files here."""

        project: str = Field("metaplug", min_length=1, description="Project of the run.")
        entity: str | None = Field(
            None, description="Team or user that the project is of; null: your default one."
        )
        mode: Literal["offline", "online"] = Field(
            "offline", description="Whether to write files alone, or to send figures at once."
        )
        folder: str | None = Field(
            None, description="Folder for a folder wandb with the files; null: the run's folder."
        )

    config: Config

    def __init__(self, *, name: str | None = None, **settings: Any) -> None:
        super().__init__(name=name, **settings)
        check_installed("wandb", "wandb")

    def start(self, run: LoggedRun) -> int:
        """Begin a run of this id, or go on with it."""
        folder, online = Path(self.config.folder or run.folder), self.config.mode == "online"
        folder.mkdir(parents=True, exist_ok=True)
        if not online:
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it calls home
        self._wandb: Any = import_module("wandb")
        has = 0 if online else last_step(folder / "wandb", run.id)
        self._run: Any = self._wandb.init(
            project=self.config.project,
            entity=self.config.entity,
            mode=self.config.mode,
            dir=str(folder),
            id=run.id,
            name=run.name,
            config=dict(run.settings),
            allow_val_change=True,  # a run may go on with other settings of the runtime
            resume="allow" if online else None,
            reinit="create_new",  # a run of the caller's own goes on undisturbed
            settings=self._wandb.Settings(
                console="off",  # or it takes standard output and error into its hands
                silent=True,
                disable_code=True,
                disable_git=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        return self._run.starting_step - 1 if online and self._run.resumed else has

    def log(self, step: LoggedStep, *, durable: bool) -> None:
        """Hand an iteration over; what is lost with a killed process, the run logs again."""
        self._run.log(step.values, step=step.iteration, commit=True)

    def finish(self, summary: Mapping[str, Any], curves: Path | None) -> None:
        """Put the final table into the run's summary, and the picture beside its charts."""
        self._run.summary.update(final_figures(summary))
        if curves is not None:
            self._run.log({"curves": self._wandb.Image(str(curves))}, commit=True)

    def close(self, ending: Ending) -> None:
        """End the run, online once everything is sent."""
        self._run.finish(exit_code=_STATUS[ending])
