"""The run's own record of figures, metrics.jsonl: the one logger that is always on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from metaplug.contract.logger import LoggedRun, LoggedStep, Logger
from metaplug.errors import RunError
from metaplug.experiments.json_values import to_json
from metaplug.files import append, replacing

METRICS = "metrics.jsonl"


@final
class Jsonl(Logger):
    """Log every iteration as a line of JSON in metrics.jsonl, in the run's folder.

    Always on: every run writes this file, and naming the logger changes nothing. --resume goes on
    from it, and other loggers are filled up from it, so a failure here stops the run.

    The file never falls behind a checkpoint: a line is on the disk before the checkpoint that
    counts on it, and a run that goes on cuts away the lines beyond its own.
    """

    def start(self, run: LoggedRun) -> int:
        """Leave exactly the lines of the iterations that are done.

        Raises:
            RunError: some of them are not there, or the file cannot be written.
        """
        self._path = run.folder / METRICS
        lines = self._path.read_bytes().split(b"\n")[:-1] if self._path.exists() else []
        if len(lines) < run.iteration:
            what = f"lacks lines of the {run.iteration} iterations that its checkpoint has done"
            mend = "bring them back, or train the run anew; its weights are whole"
            raise RunError(f"{self._path} {what}: {mend}")
        with replacing(self._path) as file:
            file.write(b"".join(line + b"\n" for line in lines[: run.iteration]))
        return run.iteration

    def log(self, step: LoggedStep, *, durable: bool) -> None:
        """Add the line of an iteration."""
        append(self._path, to_json(line_of(step)) + "\n", durable=durable)


def line_of(step: LoggedStep) -> dict[str, Any]:
    """The line of an iteration, as values for JSON."""
    values: dict[str, Any] = {
        "iteration": step.iteration,
        "outer_loss": step.outer_loss,
        "meta_gradient_norm": step.meta_gradient_norm,
        "meta_lr": step.meta_lr,
        "figures": dict(step.figures),
    }
    if step.skipped is not None:
        values["skipped"] = step.skipped
    if step.validation is not None:
        values["validation"] = dict(step.validation)
    return values


def step_of(line: Mapping[str, Any]) -> LoggedStep:
    """The iteration of a line."""
    return LoggedStep(
        line["iteration"],
        line["outer_loss"],
        line["meta_gradient_norm"],
        line["meta_lr"],
        line["figures"],
        line.get("validation"),
        line.get("skipped"),
    )
