from __future__ import annotations
from collections.abc import Sequence
from typing import Protocol
from metaplug.tasks.batch import TaskBatch


class TaskStream(Protocol):
    split: str

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch: ...
