"""Meta-training in a folder: a run that was killed at any moment goes on bit for bit."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metaplug import checkpoint
from metaplug.contract.logger import LoggedRun, LoggedStep, Logger
from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import RunError
from metaplug.evaluation.history import Record
from metaplug.execution.ranks import ALONE, World
from metaplug.experiments.build import Experiment, build
from metaplug.experiments.configuration import ExperimentConfig, flatten, to_yaml
from metaplug.experiments.json_values import environment, result_values, to_json
from metaplug.experiments.loggers.asking import RunLoggers, make_loggers
from metaplug.experiments.loggers.jsonl import Jsonl, step_of
from metaplug.experiments.plugin_files import keep_names, recorded
from metaplug.experiments.runs.data import check_same_data, claimed, digests_of, kept_of
from metaplug.experiments.runs.folder import RunFolder
from metaplug.experiments.runs.layout import BEST, CONFIG, CURVES, LAST
from metaplug.experiments.runs.reading import read_metrics, read_summary
from metaplug.experiments.runs.sessions import read_sessions, session
from metaplug.tasks.sources import TaskSource
from metaplug.tasks.splits import SPLITS


class EndedError(Exception):
    """Raised by `on_start` or `on_record` in a process alone: the run is stopped where it stands.

    It goes on from its last checkpoint, which at a validation is what it is then.
    """


def train(
    config: ExperimentConfig,
    folder: Path,
    *,
    resume: bool = False,
    on_start: Callable[[Experiment], None] = lambda experiment: None,
    on_record: Callable[[Record], None] = lambda record: None,
    on_trained: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
    loggers: Sequence[Logger] = (),
    name: str | None = None,
    world: World = ALONE,
    tasks: TaskSource | None = None,
    test: bool = True,
) -> dict[str, Any] | None:
    """Run an experiment in a folder: meta-train, then test the best validation on unseen tasks.

    A checkpoint is written at every validation, at a stop, and after `runtime.save_every` other
    iterations. Killed at any moment and resumed, a run gives bit for bit the checkpoints and the
    metrics of one that was left alone, but for the seconds that were spent. While this process
    lives, no other can train in the folder.

    Every rank of `world` calls this; rank 0 alone reads and writes the folder. A run may be
    resumed on another number of ranks, and with other settings of the runtime but its precision;
    then it is the same to rounding.

    Args:
        folder: made here; a run that is there already is only touched to resume it.
        resume: go on with the run in `folder`, or begin one where there is none yet. A finished run
            is left as it is.
        on_start: called once, with `learner.iteration` iterations done already.
        on_record: called after every iteration.
        on_trained: called once, before the test or at a stop, while the folder is still locked.
        stop: asked after every iteration; True on any rank stops the run.
        loggers: of the caller's own, beside those of the configuration.
        name: of the run for loggers; default: the folder's.
        world: the processes that train together; rank 0 calls the three functions and the loggers.
        tasks: the source that `build_tasks` made of the same configuration, to share it.
        test: whether the test follows; without it the run stays unfinished, to be resumed with it.

    Returns:
        The content of summary.json, or without a test its best validation alone, None where none
        was finite; None for a run that was stopped.

    Raises:
        RequestError: a part is unknown or refuses its settings; the folder holds another run than
            this to resume, or one to leave alone; or another process trains there.
        RunError: a loss or gradient is NaN or Inf, memory runs out, or a file cannot be written;
            the last checkpoint is kept.
    """
    config, asked = recorded(config), [*loggers]
    world.from_main(lambda: asked.extend(make_loggers(config.loggers)))
    with RunFolder(folder) as place:
        if world.from_main(lambda: place.check(config, resume=resume)):
            return world.from_main(lambda: read_summary(folder))
        if resume and world.from_main((folder / CONFIG).exists):
            keep_names(config)  # the digests are those of the run, as checked
        experiment = build(config, tasks=tasks, world=world)
        run = _begin(place, experiment, asked if world.is_main else [], name)
        with run.loggers:
            try:
                if world.is_main:
                    on_start(experiment)
                ended = run.iterate(on_record, stop)
            except EndedError:
                ended = False
            world.from_main(on_trained)
            if ended and not test:
                return {"best_validation": run.best}
            return run.finish(stop) if ended else None


def _begin(
    folder: RunFolder, experiment: Experiment, asked: Sequence[Logger], name: str | None
) -> _Run:
    """A new run, or the one in the folder from its last checkpoint on, without what came after."""
    learner, path, record = experiment.learner, folder.path, Jsonl()
    # A state that no file can hold is refused now, not after hours.
    learner.world.from_main(lambda: checkpoint.check_writable(path / LAST, learner.state_dict()))
    found = learner.world.from_main(lambda: folder.begin(experiment.config))
    best, seconds, clock = None, 0.0, list[float]()
    if found is not None:
        file, state = found
        config, tasks = experiment.config, experiment.tasks
        # On every rank alike, as one that stopped alone would leave the others waiting.
        learner.world.from_main(lambda: check_same_data(state, file, tasks, config.tasks.source))
        learner.load_state_dict(state, str(file))
        learner.trained_on = claimed(learner.trained_on, state, config.tasks)
        best, seconds, clock = state["best"], state["seconds"], [*state.get("clock", ())]
    run = learner.world.from_main(lambda: _take_up(folder, experiment, record, name))
    loggers = RunLoggers(asked, run, lambda: [step_of(line) for line in read_metrics(path)])
    return _Run(experiment, folder, record, loggers, best, seconds, clock)


def _take_up(
    folder: RunFolder, experiment: Experiment, record: Jsonl, name: str | None
) -> LoggedRun:
    """Cut the record to where the run is, add this session, and say what loggers may know."""
    path, begun = folder.path, session(experiment)
    first = [*read_sessions(path), begun][0]
    run = LoggedRun(
        id=hashlib.sha256(to_json(first).encode()).hexdigest()[:16],
        name=name or path.resolve().name,
        folder=path,
        settings=flatten(experiment.config.model_dump(mode="json", exclude={"loggers"})),
        iteration=experiment.learner.iteration,
    )
    record.start(run)
    if run.iteration:
        read_metrics(path)  # damaged lines are said now too
    folder.record(begun)
    return run


@dataclass
class _Run:
    """A run under way.

    Attributes:
        record: its own record of figures.
        loggers: the others.
        best: its best validation so far.
        seconds: spent before this process.
        clock: the seconds that were spent before each validation ended.
        unsaved: the iterations since the last checkpoint.
    """

    experiment: Experiment
    folder: RunFolder
    record: Jsonl
    loggers: RunLoggers
    best: dict[str, Any] | None
    seconds: float
    clock: list[float]
    unsaved: int = 0

    def __post_init__(self) -> None:
        self._begun = time.monotonic() - self.seconds
        self._world = self.experiment.learner.world
        self._data = kept_of(self.experiment.tasks)

    def iterate(self, on_record: Callable[[Record], None], stop: Callable[[], bool]) -> bool:
        """Train to the end; False if stopped on the way."""
        learner, tasks = self.experiment.learner, self.experiment.tasks
        apart = {"iterations", "test_tasks", "score"}
        options = self.experiment.config.training.model_dump(exclude=apart)
        left = self.experiment.config.training.iterations - learner.iteration
        save_every = self.experiment.config.runtime.save_every or math.inf
        for record in learner.iterate(
            tasks.train, iterations=left, validation=tasks.val, **options
        ):
            is_newest = record.step.iteration == learner.iteration  # of which the weights are
            [stopped] = self._world.any(stop() and is_newest)
            self.unsaved += 1
            due = stopped or (self.unsaved >= save_every and is_newest)
            if self._world.is_main:
                self._log(record, durable=due or record.validation is not None)
            self._save(record, due)
            if self._world.is_main:
                on_record(record)
            if stopped:
                return False
        return True

    def finish(self, stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Test the weights of the best validation, and write the summary; None if stopped.

        Only a process alone can stop here: ranks would wait for one another.
        """
        learner, config = self.experiment.learner, self.experiment.config
        path = self.folder.path / BEST
        if self.best is None:
            what = f"no validation of {self.folder.path} was finite, so there is nothing to test"
            raise RunError(f"{what}: try a smaller learning rate")
        # Both are read before they become those of the best validation.
        seconds, skipped = time.monotonic() - self._begun, learner.skipped
        learner.load_state_dict(self._world.from_main(lambda: checkpoint.read(path)), str(path))
        tasks = self.experiment.tasks.test
        try:
            test = learner.evaluate(
                tasks if self._world.size > 1 else _Stoppable(tasks, stop),
                num_tasks=config.training.test_tasks,
            )
        except _StoppedError:
            return None
        summary = {
            "test": result_values(test),
            "per_task": test.per_task.tolist(),
            **({} if test.per_class is None else {"per_class": test.per_class.tolist()}),
            "best_validation": self.best,
            "iterations": config.training.iterations,
            "skipped": skipped,
            "seed": config.seed,
            "data": digests_of(self.experiment.tasks, SPLITS),
            "plugins": {hook: list(names) for hook, names in learner.chain.order().items()},
            "seconds": round(seconds, 3),
            "clock": [round(each, 3) for each in self.clock],
            **environment(learner),
        }
        if self._world.is_main:
            self.folder.finish(summary)
            self.loggers.finish(summary, self.folder.path / CURVES)
        return summary

    def _log(self, record: Record, *, durable: bool) -> None:
        """Log in the run's own record first: no logger counts for as much."""
        step, validation, values = record.step, record.validation, None
        if validation is not None:
            raised = (validation.raised or 0) / validation.num_tasks
            inner = {} if validation.inner is None else {"inner": asdict(validation.inner)}
            values = {**result_values(validation), "raised": raised, **inner}
        logged = LoggedStep(
            step.iteration,
            step.outer_loss,
            step.meta_gradient_norm,
            step.meta_lr,
            step.figures,
            values,
            step.skipped,
        )
        self.folder.check_lock()
        self.record.log(logged, durable=durable)
        self.loggers.log(logged, durable=durable)

    def _save(self, record: Record, due: bool) -> None:
        """Write the best checkpoint first: killed between the two, a run writes it again."""
        validation = record.validation
        if validation is not None:
            self.clock.append(time.monotonic() - self._begun)
        if validation is not None and math.isfinite(validation.mean):
            mean, interval = validation.mean, validation.interval
            if self.best is None or validation.better_than(self.best["mean"]):
                best = {"iteration": record.step.iteration, "mean": mean, "interval": interval}
                self.best = best
                self._write(BEST)
        if validation is not None or due:
            self._write(LAST)
            self.unsaved = 0

    def _write(self, name: str) -> None:
        if self._world.is_main:
            own = {
                "best": self.best,
                "config": to_yaml(self.experiment.config),
                "data": self._data,
                "seconds": time.monotonic() - self._begun,
                "clock": self.clock,
            }
            self.folder.save(name, {**self.experiment.learner.state_dict(), **own})


class _StoppedError(Exception):
    """The test was asked to stop."""


class _Stoppable:
    """Test tasks that end the test where a stop is asked for."""

    def __init__(self, tasks: Any, stop: Callable[[], bool]) -> None:
        self._tasks, self._stop = tasks, stop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tasks, name)

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """As the tasks have it."""
        if self._stop():
            raise _StoppedError
        batch: TaskBatch = self._tasks.batch(iteration, indices)
        return batch
