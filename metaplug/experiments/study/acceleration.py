"""How much sooner than another a variant reaches a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from metaplug.evaluation.curves import Curve, Point, best_point, first_reaching
from metaplug.evaluation.results import Metric


@dataclass(frozen=True)
class Acceleration:
    """How much sooner than the baseline a variant reaches a target, seed by seed.

    Attributes:
        targets: by seed; a validation as good as that has reached it.
        baseline: by seed, the baseline's first validation that has; None where it never gets there.
        reached: by seed, the variant's.
    """

    targets: tuple[float, ...]
    baseline: tuple[Point | None, ...]
    reached: tuple[Point | None, ...]

    @property
    def percent(self) -> tuple[float | None, ...]:
        """By seed, (the baseline's iterations / the variant's − 1) · 100; None for unreached."""
        return tuple(
            None if one is None or other is None else (one.iteration / other.iteration - 1) * 100
            for one, other in zip(self.baseline, self.reached, strict=True)
        )

    @property
    def percent_of_seconds(self) -> tuple[float | None, ...]:
        """By seed, the same of the seconds; None where they are not known either."""
        pairs = [
            (one and one.seconds, other and other.seconds)
            for one, other in zip(self.baseline, self.reached, strict=True)
        ]
        return tuple((one / other - 1) * 100 if one and other else None for one, other in pairs)

    @property
    def seeds_reached(self) -> int:
        """The number of seeds in which the variant reached the target."""
        return sum(each is not None for each in self.reached)

    @property
    def seeds_compared(self) -> int:
        """The number of seeds in which both reached it."""
        return sum(each is not None for each in self.percent)

    @property
    def mean_percent(self) -> float | None:
        """The mean over the seeds in which both got there; give `seeds_compared` with it."""
        return _mean(self.percent)

    @property
    def mean_percent_of_seconds(self) -> float | None:
        """The mean over the seeds in which both got there."""
        return _mean(self.percent_of_seconds)


def accelerate(
    metric: Metric, pairs: Sequence[tuple[Curve, Curve]], target: float | None = None
) -> Acceleration:
    """The acceleration, from (the baseline's curve, the variant's curve) of every seed.

    Args:
        target: default: by seed, the best validation value that the baseline reaches.
    """
    targets = [
        best_point(metric, baseline).mean if target is None else target for baseline, _ in pairs
    ]
    found = [
        (first_reaching(metric, baseline, goal), first_reaching(metric, curve, goal))
        for goal, (baseline, curve) in zip(targets, pairs, strict=True)
    ]
    return Acceleration(
        tuple(targets), tuple(one for one, _ in found), tuple(other for _, other in found)
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
