"""The loop of meta-training: batches in, records out, with validations on the way."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypedDict

from metaplug.checks.prepare_batch import PrepareBatch
from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import RequestError, quoted
from metaplug.evaluation.history import Record
from metaplug.evaluation.results import EvaluationResult
from metaplug.execution.engine import Engine
from metaplug.execution.memory import memory_explained
from metaplug.execution.settings import NonFinite
from metaplug.execution.windows import meta_steps
from metaplug.tasks.episodes import TaskStream


class LoopSettings(TypedDict, total=False):
    """The arguments that `MetaLearner.fit` passes on to `iterate`, which explains them."""

    total: int | None
    tasks_per_batch: int
    validation: TaskStream | Any
    validate_every: int
    validation_tasks: int | None
    non_finite: NonFinite
    profile_tasks: int


@dataclass(frozen=True)
class Loop:
    """Meta-training up to an iteration.

    Attributes:
        end: the iteration to stop after.
        total: the length of the run, which schedules follow; None for `end`.
        tasks_per_batch: of all ranks.
        validate: called every `validate_every` iterations and after the last; None for never.
        check: called with the first batch, prepared, before anything is updated.
        metrics_every: meta-steps after which losses and figures are fetched from the device.
        skip: leave out a batch in which something is NaN or Inf, and count it.
    """

    engine: Engine
    prepare_batch: PrepareBatch
    tasks: TaskStream
    end: int
    total: int | None
    tasks_per_batch: int
    validate: Callable[[], EvaluationResult] | None
    check: Callable[[TaskBatch], None] | None
    validate_every: int
    metrics_every: int
    skip: bool

    def __post_init__(self) -> None:
        size = self.engine.world.size
        if self.tasks_per_batch < size:
            raise RequestError(
                f"tasks_per_batch = {self.tasks_per_batch} on {size} ranks: a rank without a task "
                f"would only wait; give at least {size} tasks, or start fewer ranks"
            )
        if self.total is not None and self.total < self.end:
            raise RequestError(
                f"total = {self.total}: this call ends at iteration {self.end}; give at least that"
            )

    def records(self, begun: Callable[[], None]) -> Iterator[Record]:
        """Make one meta-update after the other, each at a step of the iterator.

        Args:
            begun: called when something was trained on.

        Raises:
            RunError: a loss or gradient is NaN or Inf, or memory runs out.
        """
        engine, total, begin = self.engine, self._length(), self.engine.iteration
        own = engine.world.shard(range(self.tasks_per_batch))
        while engine.iteration < self.end:
            first, due = engine.iteration, self.end
            if self.validate is not None:
                due = min(due, (first // self.validate_every + 1) * self.validate_every)
            until = min(first + self.metrics_every, due)
            batches = (
                self._prepared(iteration, own, trusted=iteration > first, checked=iteration > begin)
                for iteration in range(first, until)
            )
            with memory_explained(engine, len(own)):
                if until == first + 1:
                    step = engine.meta_step(next(batches), total, skip=self.skip)
                    steps = iter([step])
                else:
                    steps = meta_steps(engine, batches, total, skip=self.skip)
                    steps = itertools.chain([next(steps)], steps)  # all of them are made here
            begun()
            for step in steps:
                measured = self.validate is not None and step.iteration == due
                yield Record(step, self.validate() if measured and self.validate else None)

    def _prepared(self, iteration: int, own: range, *, trusted: bool, checked: bool) -> TaskBatch:
        batch = self.prepare_batch(
            self.tasks.batch(iteration, own),
            trusted=trusted,
            numbers=own,
            iteration=iteration,
            skip=self.skip,
        )
        if self.check is not None and not checked:
            self.check(batch)
        return batch

    def _length(self) -> int:
        """The length of the run; a warning where an earlier call's schedules would not go on."""
        before = self.engine.total
        if self.total is not None or not self.engine.iteration or before in (0, self.end):
            return self.end if self.total is None else self.total
        if jumping := self._jumping(before):
            warnings.warn(
                f"this call makes a run of {before} iterations one of {self.end}, so the schedules "
                f"of plugin {quoted(jumping)} jump: give total=, the same in every call",
                stacklevel=4,
            )
        return self.end

    def _jumping(self, before: int) -> tuple[str, ...]:
        """The plugins that answer otherwise in a run of `end` iterations than of `before`."""
        engine, iteration = self.engine, self.engine.iteration
        answers = {
            "scale_meta_learning_rate": engine.factor,
            "outer_step_weights": engine.outer.weights,
            "derivative_order": engine.inner.orders_of,
        }
        names = [
            link.plugin.name
            for hook, ask in answers.items()
            if ask(iteration, before) != ask(iteration, self.end)
            for link in engine.chain.links(hook)
        ]
        # What the other hooks make of the run's length cannot be asked for.
        unasked = engine.chain.reading("meta_iterations", but_in=answers)
        return tuple(dict.fromkeys([*names, *unasked]))
