"""A batch of tasks: support and query examples of every task, stacked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaplug.errors import RequestError, RunError


@dataclass(frozen=True, slots=True)
class TaskBatch:
    """T tasks of equal size. Checked when made.

    Attributes:
        support_x: (T, n_support, *input).
        support_y: (T, n_support, *target).
        query_x: (T, n_query, *input), of the dtype of support_x.
        query_y: (T, n_query, *target), of the dtype of support_y.

    Raises:
        RequestError: shapes, dtypes or devices do not fit each other; the field and the shapes are named.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    @property
    def num_tasks(self) -> int:
        return len(self.support_x)

    @property
    def device(self) -> torch.device:
        return self.support_x.device

    def to(self, device: torch.device | str) -> TaskBatch:
        return TaskBatch(self.support_x.to(device), self.support_y.to(device), self.query_x.to(device), self.query_y.to(device))

    def check_values(self, outputs: int | None) -> None:
        pass
