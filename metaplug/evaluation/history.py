"""The record of meta-training, iteration by iteration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from metaplug.evaluation.results import EvaluationResult
from metaplug.execution.engine import MetaStep


@dataclass(frozen=True)
class Record:
    """One meta-iteration as `fit` saw it: the update, and the validation that followed, if any."""

    step: MetaStep
    validation: EvaluationResult | None = None


@dataclass
class History:
    """The records of one `fit`, in order."""

    records: list[Record] = field(default_factory=list)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def validations(self) -> list[tuple[int, EvaluationResult]]:
        """(iteration, result) of every validation."""
        return [
            (record.step.iteration, record.validation)
            for record in self.records
            if record.validation
        ]

    @property
    def best(self) -> tuple[int, EvaluationResult] | None:
        """The best validation that is finite, and its iteration; the earlier of two equal ones."""
        best = None
        for iteration, result in self.validations:
            if not math.isfinite(result.mean):
                continue
            if best is None or result.better_than(best[1].mean):
                best = iteration, result
        return best
