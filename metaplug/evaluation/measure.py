"""Test tasks, batch by batch: the score of each, and whether adaptation raised its support loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metaplug.checks.find_nonfinite import find_nonfinite_at_evaluation
from metaplug.checks.prepare_batch import PrepareBatch
from metaplug.contract.outcome import Outcome
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_sizes import IGNORED, TaskSize
from metaplug.errors import RunError
from metaplug.evaluation.inner_profile import InnerProfile, InnerProfiler
from metaplug.evaluation.results import larger
from metaplug.evaluation.score_tasks import Scorer
from metaplug.execution.engine import FAILURES, Engine
from metaplug.execution.memory import memory_explained
from metaplug.tasks.episodes import TaskStream

LOST, UNSCORED = 1.0, 2.0
"""Of a task without a query loss, and of one with a loss and no score that is a finite number."""


@dataclass(frozen=True)
class Measured:
    """Test tasks over all ranks.

    Attributes:
        scores: (num_tasks,) float64 on the CPU; NaN for a task whose query loss is NaN or Inf.
        growth: the number of tasks whose support loss grew, and its means before and after; empty
            where that was not asked for.
        per_class: (num_tasks, classes) float64 where the score has such a table.
        fault: the first task with a non-finite query loss, and why; None for none.
        inner: the profile of the inner loop, where one was asked for.
    """

    scores: Tensor
    growth: tuple[int, tuple[float, float]] | tuple[()]
    per_class: Tensor | None
    fault: str | None
    inner: InnerProfile | None


def measure(
    engine: Engine,
    prepare: PrepareBatch,
    tasks: TaskStream,
    batches: Sequence[range],
    *,
    steps: int,
    scorer: Scorer,
    losses: bool = False,
    skip: bool = False,
    profiled: int = 0,
) -> Measured:
    """Adapt to tasks that do not see each other. The device is waited for once a batch.

    Args:
        tasks: task i is `tasks.batch(0, [i])`, whatever the batch.
        batches: the numbers, from 0 on, of the tasks that are computed together, each batch on one
            rank.
        steps: inner steps.
        scorer: of the tasks' predictions.
        losses: measure support losses too, which costs one more forward pass.
        skip: go on after a task whose query loss, or data, hold NaN or Inf.
        profiled: profile the inner loop of this many tasks, of the first; with `losses` alone.

    Raises:
        RequestError: the score is not for such targets.
        RunError: a task's query loss or score is NaN or Inf, and it is not to be skipped; a plugin
            fails, or memory runs out.
    """
    values, found = torch.zeros(4 if losses else 2, batches[-1].stop, dtype=torch.float64), None
    tables: dict[int, list[list[float]]] = {}
    profiler = InnerProfiler(engine, profiled, steps, together=profiled <= len(batches[0]))
    for own in batches[engine.world.rank :: engine.world.size]:
        place, text = slice(own.start, own.stop), None
        seen = profiler.seen(own)
        with memory_explained(engine, len(own), evaluated_steps=steps):
            batch = prepare(tasks.batch(0, own), numbers=own, skip=skip)
            scorer.outputs, scorer.classes_last = engine.outputs, engine.inner.classes_last
            try:
                outcome = engine.evaluate(batch, steps, own, seen)
                values[:, place] = _values(engine, outcome, own, steps, scorer, losses=losses)
                profiler.add(own, seen, outcome, values[-1, place])
                if (table := scorer.by_class(*_scored(outcome))) is not None:
                    tables[own.start] = table.tolist()
            except FAILURES:
                cause = find_nonfinite_at_evaluation(engine, batch, own, steps)
                if cause is None:
                    raise
                which = f"task {own.start}" if len(own) == 1 else f"tasks {own.start} to {own[-1]}"
                profiler.lose(own)
                values[1, place], text = LOST, f"evaluation {which} cannot be computed: {cause}"
            if values[1, place].any():
                if found is None:
                    first = int(values[1, place].nonzero()[0])
                    if values[1, own[first]] == UNSCORED:
                        text = _unscored(scorer, own[first])
                    found = text or _explain(engine, batch, own, first, steps=steps, scorer=scorer)
                if not skip:
                    break
    values = engine.world.sum(values)
    scores, missing = values[0], values[1].bool()
    fault = None
    if missing.any():  # on every rank; the one that has the first of them says what it is
        first = int(missing.nonzero()[0])
        owner = next(place for place, own in enumerate(batches) if first in own)
        fault = engine.world.gather(found)[owner % engine.world.size]
    if fault is not None and not skip:
        raise RunError(fault)
    growth: tuple[int, tuple[float, float]] | tuple[()] = ()
    if losses:
        before, after = values[2], values[3]
        growth = int(larger(before, after).sum()), (float(before.mean()), float(after.mean()))
    per_class = _joined(engine.world.gather(tables), batches) if scorer.has_table else None
    own_scores = scores.masked_fill(missing, torch.nan)
    return Measured(own_scores, growth, per_class, fault, profiler.profile())


def _scored(outcome: Outcome) -> tuple[Tensor, Tensor, tuple[TaskSize, ...] | None]:
    return outcome.query_predictions, outcome.batch.query_y, outcome.batch.sizes


def _values(
    engine: Engine,
    outcome: Outcome,
    numbers: Sequence[int],
    steps: int,
    scorer: Scorer,
    *,
    losses: bool,
) -> Tensor:
    """(2 or 4, T) float64 on the CPU: scores; LOST, UNSCORED or 0; support losses."""
    scores = scorer(*_scored(outcome))
    missing = ~torch.isfinite(outcome.query_losses[steps])
    if scorer.kind == "classification":
        missing = missing | (outcome.batch.query_y == IGNORED).flatten(1).all(1)
    missing = torch.where(missing, LOST, (~torch.isfinite(scores)).double() * UNSCORED)
    rows = [scores, missing]
    if losses:
        first = outcome.support_losses[0].detach() if steps else torch.zeros_like(rows[0])
        rows += [first, engine.adapted_losses(outcome, numbers) if steps else first]
    return torch.stack([row.to(rows[0]) for row in rows]).cpu()


def _joined(
    tables: Sequence[dict[int, list[list[float]]]], batches: Sequence[range]
) -> Tensor | None:
    """The tables of all batches, from all ranks; NaN for one that could not be computed."""
    known = {start: table for own in tables for start, table in own.items()}
    if not known:
        return None
    missing = [math.nan] * len(next(iter(known.values()))[0])
    rows = [row for own in batches for row in known.get(own.start, [missing] * len(own))]
    return torch.tensor(rows, dtype=torch.float64)


def _unscored(scorer: Scorer, number: int) -> str:
    return (
        f"score '{scorer.score.name}' of evaluation task {number} is NaN or Inf, while its query "
        "loss is finite: choose a score that is finite for every task"
    )


def _explain(
    engine: Engine,
    batch: TaskBatch,
    numbers: Sequence[int],
    place: int,
    *,
    steps: int,
    scorer: Scorer,
) -> str:
    """Say which task, at `place` of its batch, has a non-finite query loss, and why."""
    alone = batch.tasks(slice(place, place + 1))
    number = numbers[place]
    if scorer.kind == "classification" and (alone.query_y == IGNORED).all():
        return (
            f"evaluation task {number} has no query target that counts, as all of them are "
            f"{IGNORED}: leave the task out, or give it others"
        )
    cause = find_nonfinite_at_evaluation(engine, alone, [number], steps)
    if cause is None:  # a plugin may share between test tasks
        cause = find_nonfinite_at_evaluation(engine, batch, numbers, steps)
    again = ", but not when it was computed once more: see what draws at random"
    return (
        f"evaluation task {number} has a query loss of NaN or Inf after {steps} inner steps"
        f"{again if cause is None else f': {cause}'}"
    )
