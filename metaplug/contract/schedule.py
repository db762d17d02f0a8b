"""Schedules of meta-training: how iterations are counted in epochs."""

from __future__ import annotations

EPOCHS = 100
"""Epochs in a run whose epochs follow its length, as in the schedules of MAML++."""


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
