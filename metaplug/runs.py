"""An experiment in its folder: every file of a run, and how a run that was killed goes on bit for bit."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from metaplug import checkpoint
from metaplug.config import ExperimentConfig, flatten, to_yaml
from metaplug.errors import RequestError, RunError
from metaplug.evaluation import better
from metaplug.experiment import Experiment, build, environment, result_values, to_json
from metaplug.files import replacing
from metaplug.history import Record
from metaplug.runtime.distributed import ALONE, World
from metaplug.settings import read_yaml, validated

CONFIG, METRICS, LAST, BEST, SUMMARY = "config.yaml", "metrics.jsonl", "last.pt", "best.pt", "summary.json"
"""The files of a run. The last is written last: a run that has it is finished."""


def train(
    config: ExperimentConfig,
    folder: Path,
    *,
    resume: bool = False,
    on_start: Callable[[Experiment], None] = lambda experiment: None,
    on_record: Callable[[Record], None] = lambda record: None,
    stop: Callable[[], bool] = lambda: False,
    world: World = ALONE,
) -> dict[str, Any] | None:
    """Run an experiment in a folder: meta-train, keep the best validation, measure that on unseen test tasks.

    A checkpoint is written at every validation and at a stop. Killed at any moment and resumed, a run gives bit for bit the checkpoints and
    the metrics of one that was left alone.

    Every rank of `world` calls this; rank 0 alone reads and writes the folder. A run may be resumed on another number of ranks, and with
    other settings of the runtime but its precision: then to rounding.

    Args:
        folder: made here; a run that is there already is only touched to resume it.
        resume: go on with the run in `folder`; begins one where there is none yet. A finished run is left as it is.
        on_start: called once, with `learner.iteration` iterations done already.
        on_record: called after every iteration.
        stop: asked after every iteration; True on any rank stops the run.
        world: the processes that train together; `on_start` and `on_record` are called on rank 0.

    Returns:
        The content of summary.json; None for a run that was stopped.

    Raises:
        RequestError: a part is unknown or refuses its settings; the folder holds a run, and another one than this to resume.
        RunError: a loss or gradient is NaN or Inf, memory runs out, or a file cannot be written; the last checkpoint is kept.
    """
    finished = world.from_main(lambda: _look(folder, config, resume))
    if finished is not None:
        return finished
    experiment = build(config, world=world)
    run = _begin(folder, experiment)
    if world.is_main:
        on_start(experiment)
    if not run.iterate(on_record, stop):
        return None
    return run.finish()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, one for each iteration."""
    return [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]


def read_summary(folder: Path) -> dict[str, Any]:
    """A finished run's summary.json."""
    summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    return summary


def load(path: Path, device: str | None = None, world: World = ALONE) -> Experiment:
    """The experiment of a run, as its best validation left it.

    Args:
        path: a run's folder, or one of its checkpoints.
        device: default: as the run was configured.
        world: the processes that evaluate together, of which rank 0 reads.

    Raises:
        RequestError: nothing is there, or it is not a run's.
        RunError: the checkpoint is damaged, or of another model or version.
    """
    file, state = world.from_main(lambda: _read(path))
    config = validated(ExperimentConfig, yaml.safe_load(state["config"]), str(file))
    if device is not None:
        config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"device": device})})
    experiment = build(config, world=world)
    experiment.learner.load_state_dict(state, str(file))
    return experiment


def _read(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a run, and the file that it is from."""
    file = path / BEST if path.is_dir() else path
    if not file.exists():
        what = f"{path} has no {BEST} yet" if path.is_dir() else f"there is no run {path}"
        raise RequestError(f"{what}: give the folder of a run that `metaplug train` has validated at least once")
    state = checkpoint.read(file)
    if "config" not in state:
        raise RequestError(f"{file} holds a learner without its experiment: load it in Python with MetaLearner.load")
    return file, state


@dataclass
class _Run:
    """A run under way: its experiment, its folder, the best validation so far and the seconds spent before this process."""

    experiment: Experiment
    folder: Path
    best: dict[str, Any] | None
    seconds: float

    def __post_init__(self) -> None:
        self._begun = time.monotonic() - self.seconds
        self._world = self.experiment.learner.world

    def iterate(self, on_record: Callable[[Record], None], stop: Callable[[], bool]) -> bool:
        """Train to the end; False if stopped on the way."""
        learner, tasks, training = self.experiment.learner, self.experiment.tasks, self.experiment.config.training
        records = learner.iterate(
            tasks.train,
            iterations=training.iterations - learner.iteration,
            tasks_per_batch=training.tasks_per_batch,
            validation=tasks.val,
            validate_every=training.validate_every,
            validation_tasks=training.validation_tasks,
        )
        for record in records:
            if self._world.is_main:
                self._log(record)
            [stopped] = self._world.any(stop() and record.step.iteration == learner.iteration)  # its weights are those of this record
            self._save(record, stopped)
            if self._world.is_main:
                on_record(record)
            if stopped:
                return False
        return True

    def finish(self) -> dict[str, Any]:
        """Measure the best validation's weights on the test tasks, and write the summary."""
        if self.best is None:
            raise RunError(f"no validation of {self.folder} was finite, so that there is nothing to test: try a smaller learning rate")
        learner, config = self.experiment.learner, self.experiment.config
        seconds = time.monotonic() - self._begun
        best = self._world.from_main(lambda: checkpoint.read(self.folder / BEST))
        learner.load_state_dict(best, str(self.folder / BEST))
        test = learner.evaluate(self.experiment.tasks.test, num_tasks=config.training.test_tasks)
        summary = {
            "test": result_values(test),
            "best_validation": self.best,
            "iterations": config.training.iterations,
            "seed": config.seed,
            "plugins": {hook: list(names) for hook, names in learner.chain.order().items()},
            "seconds": round(seconds, 3),
            **environment(learner),
        }
        if self._world.is_main:
            _write_text(self.folder / SUMMARY, to_json(summary, indent=2) + "\n")
        return summary

    def _log(self, record: Record) -> None:
        step, validation = record.step, record.validation
        values: dict[str, Any] = {
            "iteration": step.iteration,
            "outer_loss": step.outer_loss,
            "meta_gradient_norm": step.meta_gradient_norm,
            "meta_lr": step.meta_lr,
            "figures": dict(step.figures),
        }
        if validation is not None:
            values["validation"] = {"metric": validation.metric, "mean": validation.mean, "interval": validation.interval}
        path = self.folder / METRICS
        try:
            with path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(to_json(values) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {path}: {error}; free some space, then resume the run") from error

    def _save(self, record: Record, stopped: bool) -> None:
        """The best checkpoint first: killed between the two, a resumed run comes by here again and writes the same."""
        validation = record.validation
        if validation is None and not stopped:
            return
        if validation is not None and math.isfinite(validation.mean):
            metric, mean = validation.metric, validation.mean
            if self.best is None or better(metric, mean, self.best["mean"]):
                self.best = {"iteration": record.step.iteration, "mean": mean, "interval": validation.interval}
                self._write(BEST)
        self._write(LAST)

    def _write(self, name: str) -> None:
        if self._world.is_main:
            checkpoint.write(self.folder / name, self._state())

    def _state(self) -> dict[str, Any]:
        own = {"best": self.best, "config": to_yaml(self.experiment.config), "seconds": time.monotonic() - self._begun}
        return {**self.experiment.learner.state_dict(), **own}


def _look(folder: Path, config: ExperimentConfig, resume: bool) -> dict[str, Any] | None:
    """The summary of a finished run in the folder; None for a folder in which a run may begin or go on."""
    _check_folder(folder, config, resume)
    return read_summary(folder) if (folder / SUMMARY).exists() else None


def _check_folder(folder: Path, config: ExperimentConfig, resume: bool) -> None:
    """Refuse a folder that is taken, or that holds another run than the one to resume."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RequestError(f"{folder} is a file, not a folder for a run: give another --name or --out")
    taken = any(not entry.name.startswith(".") for entry in folder.iterdir())
    if not resume and taken:
        raise RequestError(f"the run folder {folder} already exists: give another --name or --out, or --resume to go on with it")
    saved = folder / CONFIG
    if not saved.exists():
        if taken:
            raise RequestError(f"{folder} holds no run to resume, as it has no {CONFIG}: give another --name or --out")
        return
    begun = flatten(validated(ExperimentConfig, read_yaml(saved), str(saved)).model_dump(mode="json"))
    asked = flatten(config.model_dump(mode="json"))
    for path in {**begun, **asked}:
        if begun.get(path) != asked.get(path) and not (path.startswith("runtime.") and path != "runtime.precision"):
            raise RequestError(
                f"{folder} was begun with {path} = {_shown(begun, path)}, which cannot become {_shown(asked, path)}: "
                f"resume it as it was begun ({saved}), or give another --name"
            )


def _begin(folder: Path, experiment: Experiment) -> _Run:
    """A new run, or the one in the folder from its last checkpoint on, with what came after that cut away."""
    learner = experiment.learner
    state = learner.world.from_main(lambda: _prepare(folder, experiment.config))
    if state is None:
        return _Run(experiment, folder, None, 0.0)
    learner.load_state_dict(state, str(folder / LAST))
    learner.world.from_main(lambda: _cut(folder / METRICS, learner.iteration))
    return _Run(experiment, folder, state["best"], state["seconds"])


def _prepare(folder: Path, config: ExperimentConfig) -> dict[str, Any] | None:
    """Make the folder of a run, or clear up in it; its last checkpoint."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the run folder {folder}: {error.strerror}; give another --out") from error
    if not (folder / CONFIG).exists() or read_yaml(folder / CONFIG) != config.model_dump(mode="json"):
        _write_text(folder / CONFIG, to_yaml(config))  # resumed with other settings of the runtime
    if not (folder / LAST).exists():
        _write_text(folder / METRICS, "")
        return None
    return checkpoint.read(folder / LAST)


def _cut(metrics: Path, iterations: int) -> None:
    """Leave exactly the lines of the first `iterations` iterations."""
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)[:iterations] if metrics.exists() else []
    if len(lines) < iterations or any(not line.endswith("\n") for line in lines):
        raise RunError(f"{metrics} lacks lines of the {iterations} iterations that its checkpoint has done: begin the run anew")
    _write_text(metrics, "".join(lines))


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def _shown(values: Mapping[str, Any], path: str) -> str:
    return repr(values[path]) if path in values else "not set"
