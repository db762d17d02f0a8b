"""Test tasks, batch by batch: what each scores, and where asked, whether adaptation made its support loss larger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metaplug.checks.prepare_batch import Intake
from metaplug.checks.watch import FAILURES, Watch
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.values import Kind
from metaplug.errors import RunError
from metaplug.evaluation.results import larger, score
from metaplug.execution.engine import Engine
from metaplug.execution.memory import memory_explained
from metaplug.tasks.episodes import TaskStream


@dataclass(frozen=True)
class Measured:
    """Test tasks over all ranks.

    Attributes:
        scores: (num_tasks,) float64 on the CPU; NaN for a task whose query loss is NaN or Inf.
        growth: of how many tasks the support loss became larger, and its means before and after; nothing where that was not asked for.
        fault: which task has a query loss of NaN or Inf, the first of them, and why; None for none.
    """

    scores: Tensor
    growth: tuple[int, tuple[float, float]] | tuple[()]
    fault: str | None


def measure(
    engine: Engine,
    intake: Intake,
    tasks: TaskStream,
    batches: Sequence[range],
    *,
    steps: int,
    kind: Kind,
    losses: bool = False,
    skip: bool = False,
) -> Measured:
    """Adapt to tasks that do not see each other. The device is waited for once a batch.

    Args:
        tasks: task i is `tasks.batch(0, [i])`, whatever the batch.
        batches: the numbers of the tasks that are computed together, from 0 on; each batch is one rank's, computed as in one process.
        steps: inner steps.
        losses: measure support losses too, which costs one more forward pass.
        skip: go on behind a task whose query loss, or data, hold NaN or Inf.

    Raises:
        RunError: a task's query loss is NaN or Inf, and it is not to be skipped; a plugin fails, or memory runs out.
    """
    values, found = torch.zeros(4 if losses else 2, batches[-1].stop, dtype=torch.float64), None
    for own in batches[engine.world.rank :: engine.world.size]:
        place, text = slice(own.start, own.stop), None
        with memory_explained(engine, len(own), evaluated_steps=steps):
            batch = intake(tasks.batch(0, own), numbers=own, skip=skip)
            try:
                values[:, place] = _values(engine, batch, steps, kind, losses=losses)
            except FAILURES:
                if (cause := _cause(engine, batch, own.start, steps)) is None:
                    raise
                which = f"task {own.start}" if len(own) == 1 else f"tasks {own.start} to {own[-1]}"
                values[1, place], text = 1.0, f"evaluation {which} cannot be computed: {cause}"
            if values[1, place].any():
                found = (
                    found
                    or text
                    or _told(engine, batch, own.start, int(values[1, place].nonzero()[0]), steps)
                )
                if not skip:
                    break
    values = engine.world.sum(values)
    scores, missing = values[0], values[1].bool()
    fault = None
    if missing.any():  # on every rank; the one that has the first of them says what it is
        first = int(missing.nonzero()[0])
        told = engine.world.gather(found)
        fault = told[
            next(place for place, own in enumerate(batches) if first in own) % engine.world.size
        ]
    if fault is not None and not skip:
        raise RunError(fault)
    growth = (
        (int(larger(*values[2:]).sum()), (float(values[2].mean()), float(values[3].mean())))
        if losses
        else ()
    )
    return Measured(scores.masked_fill(missing, torch.nan), growth, fault)


def _values(engine: Engine, batch: TaskBatch, steps: int, kind: Kind, *, losses: bool) -> Tensor:
    """(2 or 4, T) float64 on the CPU: scores, 1 for a query loss of NaN or Inf, and support losses before and after."""
    outcome = engine.evaluate(batch, steps)
    rows = [
        score(kind, outcome.query_predictions, batch.query_y),
        ~torch.isfinite(outcome.query_losses[steps]),
    ]
    if losses:
        first = outcome.support_losses[0].detach() if steps else torch.zeros_like(rows[0])
        rows += [first, engine.adapted_losses(outcome) if steps else first]
    return torch.stack([row.to(rows[0]) for row in rows]).cpu()


def _told(engine: Engine, batch: TaskBatch, begin: int, place: int, steps: int) -> str:
    """Which task has a query loss that is not finite, `place` of a batch that begins with task number `begin`, and why."""
    row = slice(place, place + 1)
    alone = TaskBatch(
        batch.support_x[row], batch.support_y[row], batch.query_x[row], batch.query_y[row]
    )
    cause = _cause(engine, alone, begin + place, steps) or _cause(
        engine, batch, begin, steps
    )  # a plugin may share between test tasks
    again = (
        f": {cause}"
        if cause
        else ", but not when it was computed once more: see what draws at random"
    )
    return f"evaluation task {begin + place} has a query loss of NaN or Inf after {steps} inner steps{again}"


def _cause(engine: Engine, batch: TaskBatch, begin: int, steps: int) -> str | None:
    """What is the first to be NaN or Inf in an evaluation of these tasks, who made it, and what to do; None for nothing.

    Args:
        begin: the number of the batch's first task.
    """
    watch = engine.chain.watch = Watch(float(engine.inner.inner_lr), begin)
    try:
        watch.look(
            engine.meta_parameters,
            lambda fault: f"{fault} stood in the meta-parameters",
            "go on from a checkpoint before that",
        )
        watch.look_at_data(batch)
        engine.evaluate(batch, steps)
    except FAILURES:
        pass  # on what was found before, or it is known already
    finally:
        engine.chain.watch = None
    return None if watch.fault is None else watch.fault.text
