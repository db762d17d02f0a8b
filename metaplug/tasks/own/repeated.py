"""Whether a task that is asked for once more is the same task."""

from __future__ import annotations

import torch
from torch import Tensor

from metaplug.contract.task_batch import TaskBatch


def first_difference(one: TaskBatch, other: TaskBatch) -> str | None:
    """Return the first field in which two tasks differ by a bit, a form or a dtype; None if none.

    >>> x, y = torch.zeros(1, 2, 3), torch.zeros(1, 2)
    >>> first_difference(TaskBatch(x, y, x, y), TaskBatch(x, y, x, y + 1))
    'query_y'
    """
    first, second = one.named_tensors(), other.named_tensors()
    for name in dict.fromkeys([*first, *second]):
        if name not in first or name not in second or not _same(first[name], second[name]):
            return name
    return None if one.sizes == other.sizes else "sizes"


def _same(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    # By bytes, as a NaN is not equal to itself.
    return torch.equal(*(each.contiguous().view(torch.uint8) for each in (one, other)))
