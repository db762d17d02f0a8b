"""Who made the first NaN or Inf of an iteration that failed: it is computed once more, and everything in it looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from metaplug.checks.watch import FAILURES, Fault, Watch
from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import RunError

if TYPE_CHECKING:
    from metaplug.execution.engine import Engine


def culprit(
    engine: Engine, batch: TaskBatch, failure: Exception | None, total: int, *, alone: bool
) -> str:
    """What was the first to be NaN or Inf in an iteration that failed, who made it, and what to do.

    Args:
        failure: what ended the iteration, where an error did: it stands where nothing was NaN or Inf before it.
        alone: whether the ranks part here, the one that found it with the error, the others to hear of it.

    Raises:
        RunError: `alone`.
        Exception: `failure`.
    """
    iteration = engine.iteration
    watch = engine.chain.watch = Watch(
        float(engine.inner.inner_lr), engine.world.rank, engine.world.size
    )
    try:
        watch.look(
            engine.meta_parameters,
            lambda fault: f"{fault} stood in the meta-parameters before iteration {iteration}",
            "go on from a checkpoint before that",
        )
        watch.look_at_data(batch)
        found = engine.meta_gradients(batch, iteration, total)
        watch.look(
            {"the meta-gradient": torch.nn.utils.get_total_norm(found.gradients.values())},
            lambda _: (
                f"the norm of the meta-gradient is Inf in iteration {iteration}, though each of its elements is finite"
            ),
            "clip it inside the loop, or lower inner_lr",
        )
    except FAILURES:
        if watch.fault is None or engine.world.size > 1:
            raise
    finally:
        engine.chain.watch = None
    if failure is not None and watch.fault is None:
        raise failure
    faults = engine.world.gather(watch.fault)
    text, owner = _first(faults) or (_not_again(engine), 0)
    if not alone:
        return text
    if owner != engine.world.rank:
        engine.world.any()  # the rank that found it says what it is
    raise RunError(f"iteration {iteration} stopped, nothing was updated: {text}")


def _not_again(engine: Engine) -> str:
    way = (
        "uncompiled and uncaptured: leave compile and capture out"
        if engine.derivation is not None
        else "the same: see what draws at random"
    )
    return f"iteration {engine.iteration} gave NaN or Inf, but not when it was computed once more, {way}"


def _first(faults: Sequence[Fault | None]) -> tuple[str, int] | None:
    """The text of the fault that came first on some rank, and the rank."""
    found = [
        (fault.place, rank, fault.text) for rank, fault in enumerate(faults) if fault is not None
    ]
    return (min(found)[2], min(found)[1]) if found else None
