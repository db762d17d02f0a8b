"""How far the inner loop fits the support examples of a task more than its query examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from metaplug.experiments.study.results import Row, StudyResult

EARLY = 200
"""Iterations up to which meta-training is early."""


@dataclass(frozen=True)
class OverFitting:
    """The inner loop of a row at early validations, on the first validation tasks.

    Losses are means over seeds, by validation and by inner step from 0 on; NaN where one was NaN
    or Inf.

    Attributes:
        row: of the study.
        iterations: of the validations.
        support_losses, query_losses: of each, K + 1 numbers.
        gap_by_seed: the mean over these validations of the gap after the last inner step.
    """

    row: Row
    iterations: tuple[int, ...]
    support_losses: tuple[tuple[float, ...], ...]
    query_losses: tuple[tuple[float, ...], ...]
    gap_by_seed: tuple[float, ...]

    @property
    def gaps(self) -> tuple[float, ...]:
        """By validation, query loss − support loss after the last inner step."""
        pairs = zip(self.query_losses, self.support_losses, strict=True)
        return tuple(query[-1] - support[-1] for query, support in pairs)

    @property
    def gap(self) -> float:
        """The mean of the gaps."""
        return fmean(self.gaps)

    @property
    def query_by_step(self) -> tuple[float, ...]:
        """By inner step, the mean query loss over the validations."""
        return tuple(map(fmean, zip(*self.query_losses, strict=True)))

    @property
    def support_by_step(self) -> tuple[float, ...]:
        """By inner step, the mean support loss over the validations."""
        return tuple(map(fmean, zip(*self.support_losses, strict=True)))


def over_fitting(result: StudyResult, until: int = EARLY) -> tuple[OverFitting, ...]:
    """Measure the rows of a study; those whose runs have no figures by inner step are left out.

    Args:
        until: the last iteration whose validation counts.
    """
    found = [(row, [_profiles(run.metrics, until) for run in row.runs]) for row in result.rows]
    return tuple(
        _measured(row, profiles)
        for row, profiles in found
        if set(profiles[0]).intersection(*profiles)
    )


def _profiles(lines: Sequence[Mapping[str, Any]], until: int) -> dict[int, Mapping[str, Any]]:
    """The inner steps of each early validation, by iteration."""
    return {
        line["iteration"]: inner
        for line in lines
        if line["iteration"] <= until and (inner := (line.get("validation") or {}).get("inner"))
    }


def _measured(row: Row, profiles: Sequence[Mapping[int, Mapping[str, Any]]]) -> OverFitting:
    iterations = tuple(each for each in profiles[0] if all(each in run for run in profiles))
    losses = {
        name: [[_numbers(run[each][name]) for each in iterations] for run in profiles]
        for name in ("support_losses", "query_losses")
    }
    pairs = zip(losses["query_losses"], losses["support_losses"], strict=True)
    gaps = [
        fmean(query[-1] - support[-1] for query, support in zip(*pair, strict=True))
        for pair in pairs
    ]
    support, query = (
        tuple(tuple(map(fmean, zip(*at, strict=True))) for at in zip(*runs, strict=True))
        for runs in losses.values()
    )
    return OverFitting(row, iterations, support, query, tuple(gaps))


def _numbers(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else value for value in values)
