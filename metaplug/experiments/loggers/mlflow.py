"""The logger for MLflow: files in the run's folder by default, or any tracking server."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, final

from pydantic import Field

from metaplug.contract.logger import Ending, LoggedRun, LoggedStep, Logger, LoggerConfig
from metaplug.experiments.loggers.tables import check_installed, final_figures, plain

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_TAG = "metaplug.run"
_MOST_METRICS, _MOST_PARAMS, _LONGEST = 1000, 100, 6000
"""What MLflow takes at once, and the letters of a parameter."""


@final
class Mlflow(Logger):
    """Log to MLflow: metrics, parameters, the curves and the summary as artifacts.

    By default it writes files in the run's folder. Figures are sent at every validation. A run that
    goes on is found by its tag metaplug.run, and goes on as the same run of MLflow.

    Needs pip install 'metaplug[mlflow]'.
    """

    class Config(LoggerConfig):
        """Where the run is tracked."""

        tracking_uri: str | None = Field(
            None,
            description="Server or database, as http://HOST:5000 or sqlite:///FILE; null: the "
            "folder mlruns in the run's folder.",
        )
        experiment: str = Field("metaplug", min_length=1, description="MLflow's experiment.")

    config: Config

    def __init__(self, *, name: str | None = None, **settings: Any) -> None:
        super().__init__(name=name, **settings)
        check_installed("mlflow", "mlflow")

    def start(self, run: LoggedRun) -> int:
        """Begin a run of MLflow, or find the one that this run has."""
        uri = self.config.tracking_uri
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        if uri is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else refused since 3.7
            uri = (run.folder / "mlruns").resolve().as_uri()
        self._mlflow: Any = import_module("mlflow")
        self._client: Any = self._mlflow.MlflowClient(tracking_uri=uri)
        where = self._experiment()
        runs = self._client.search_runs([where], f"tags.`{_TAG}` = '{run.id}'", max_results=1)
        self._waiting = list[Any]()
        self._has: dict[str, int] = {}
        if not runs:
            made = self._client.create_run(where, run_name=run.name, tags={_TAG: run.id})
            self._id: str = made.info.run_id
            self._log_settings(run.settings)  # once, as no parameter may change
        else:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            for key in runs[0].data.metrics:
                history = self._client.get_metric_history(self._id, key)
                self._has[key] = max(point.step for point in history)
        return max(max(self._has.values(), default=0) - 1, 0)  # the last may be there in part

    def _experiment(self) -> str:
        """The id of the experiment, made where it is not there."""
        name = self.config.experiment
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except self._mlflow.MlflowException:
                # Runs of a study begin together, and another one may have made it just now.
                if (found := self._client.get_experiment_by_name(name)) is None:
                    raise
        return str(found.experiment_id)

    def _log_settings(self, settings: Mapping[str, Any]) -> None:
        param = self._mlflow.entities.Param
        texts = {name: plain(value) for name, value in settings.items()}
        params = [
            param(name, text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…")
            for name, text in texts.items()
        ]
        for place in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._id, params=params[place : place + _MOST_PARAMS])

    def log(self, step: LoggedStep, *, durable: bool) -> None:
        """Keep the figures of an iteration, and send all that wait where a checkpoint follows."""
        named = {_allowed(name): value for name, value in step.values.items()}
        new = {name: named[name] for name in named if step.iteration > self._has.get(name, 0)}
        self._wait(new, step.iteration)
        if durable or len(self._waiting) >= _MOST_METRICS:
            self._send()

    def finish(self, summary: Mapping[str, Any], curves: Path | None) -> None:
        """Send the final table as metrics, and the whole summary and the picture as artifacts."""
        self._client.log_dict(self._id, dict(summary), "summary.json")
        if curves is not None:
            self._client.log_artifact(self._id, str(curves))
        self._wait(final_figures(summary), summary["iterations"])

    def close(self, ending: Ending) -> None:
        """Send what waits, and the status."""
        self._send()
        self._client.set_terminated(self._id, _STATUS[ending])

    def _wait(self, figures: Mapping[str, float], iteration: int) -> None:
        metric, now = self._mlflow.entities.Metric, int(time.time() * 1000)
        self._waiting += [metric(name, value, now, iteration) for name, value in figures.items()]

    def _send(self) -> None:
        while self._waiting:
            self._client.log_batch(self._id, metrics=self._waiting[:_MOST_METRICS])
            self._waiting = self._waiting[_MOST_METRICS:]


def _allowed(name: str) -> str:
    """The name of a figure, with an underscore for what MLflow takes in none."""
    return re.sub(r"[^\w./: -]", "_", name)
