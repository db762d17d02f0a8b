"""How iterations are counted: for people, and in epochs, as schedules of meta-training do."""

from __future__ import annotations

from typing import Any

EPOCHS = 100
"""Epochs in a run whose epochs follow its length, as in the schedules of MAML++."""


def iteration_text(iteration: Any) -> str:
    """Name an iteration for people, who count from 1 as records and logs do.

    Hooks, streams and everything else in the code count from 0.

    >>> iteration_text(0)
    'iteration 1'
    """
    # A trace lets its number be shown, not computed.
    return f"iteration {getattr(iteration, 'shown', iteration) + 1}"


def step_text(iteration: Any, index: int, *, training: bool) -> str:
    """Say for people where in which loop an inner step is, counted from 0 as `step.index` is.

    So figures such as `rate/0` and the slots of per-step meta-parameters have the same number.

    >>> step_text(2, 0, training=True), step_text(0, 1, training=False)
    ('iteration 3, inner step 0', 'evaluation, inner step 1')
    """
    return f"{iteration_text(iteration) if training else 'evaluation'}, inner step {index}"


def epoch_of(iteration: int, total: int, iterations_per_epoch: int | None) -> int:
    """Count iterations in epochs: ⌊i / n⌋, or ⌊100 i / total⌋ without n.

    Args:
        iteration: i, counted from 0.
        total: the iterations of the whole run; 0 where none has begun, which is epoch 0.
        iterations_per_epoch: n, at least 1; None for a hundredth of the run.

    >>> epoch_of(1_000, 50_000, 500), epoch_of(1_000, 50_000, None)
    (2, 2)
    """
    if iterations_per_epoch is not None:
        return iteration // iterations_per_epoch
    return EPOCHS * iteration // total if total else 0
