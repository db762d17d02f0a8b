"""Test tasks, batch by batch: what each scores, and whether adaptation made its support loss larger."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metaplug.engine import Engine
from metaplug.errors import RunError
from metaplug.evaluation import score
from metaplug.intake import Intake
from metaplug.runtime.memory import memory_explained
from metaplug.tasks.episodes import TaskStream
from metaplug.values import Kind


def measure(
    engine: Engine, intake: Intake, tasks: TaskStream, batches: Sequence[range], *, steps: int, kind: Kind
) -> tuple[Tensor, Tensor, Tensor]:
    """Adapt to tasks that do not see each other.

    Args:
        tasks: task i is `tasks.batch(0, [i])`, whatever the batch.
        batches: the numbers of the tasks that are computed together, from 0 on; each batch is one rank's, computed as in one process.
        steps: inner steps.

    Returns:
        Over all ranks, each (num_tasks,) float64 on the CPU: the scores, and the support losses before the first and after the last step,
        zeros where there is no step.

    Raises:
        RunError: a task's query loss is NaN or Inf; or memory runs out.
    """
    scores, diverged, before, after = torch.zeros(4, batches[-1].stop, dtype=torch.float64)
    for own in batches[engine.world.rank :: engine.world.size]:
        place = slice(own.start, own.stop)
        with memory_explained(engine, len(own), evaluated_steps=steps):
            batch = intake(tasks.batch(0, own), numbers=own)
            outcome = engine.evaluate(batch, steps)
            if steps:
                before[place] = outcome.support_losses[0].detach()
                after[place] = engine.adapted_losses(outcome)
        scores[place] = score(kind, outcome.query_predictions, batch.query_y)
        diverged[place] = ~torch.isfinite(outcome.query_losses[steps])
        if diverged[place].any():
            break
    scores, diverged, before, after = engine.world.sum(torch.stack([scores, diverged, before, after]))
    if diverged.any():
        task = int(diverged.nonzero()[0])
        reason = f"its inner loop diverges; lower inner_lr, which is {engine.inner.inner_lr:.4g}, or inner_steps"
        if steps == 0 or not bool(torch.isfinite(before[task])):
            reason = "it is so before the first step; see whether the weights or that task hold NaN or Inf"
        raise RunError(f"evaluation task {task} has a query loss of NaN or Inf after {steps} inner steps: {reason}")
    return scores, before, after
