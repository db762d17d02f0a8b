"""The scores of tasks, and the 95 % confidence interval of their mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import numpy as np
from torch import Tensor

from metaplug.errors import RequestError, unknown
from metaplug.evaluation.inner_profile import InnerProfile
from metaplug.evaluation.scores import named

Metric: TypeAlias = str
"""A score by its name in words, such as "balanced accuracy"."""
IntervalMethod = Literal["t", "bootstrap"]

RESAMPLES = 9999
"""Of a bootstrap."""

FEWEST_RESAMPLED = 20
"""Tasks of a bootstrap; with two, its interval is a thirteenth of t's."""

_NUMBERS_AT_ONCE = 2**22
"""Of the bootstrap's resamples: 32 MiB, and as much for where they stand."""


@dataclass(frozen=True)
class EvaluationResult:
    """How well unseen tasks were adapted to.

    Attributes:
        metric: the score, such as "accuracy" (in [0, 1]) or "mean squared error".
        per_task: (num_tasks,) float64, on the CPU; NaN for a task of a validation whose query loss
            was NaN or Inf (`non_finite="skip"`).
        inner_steps: the number of steps that each task was adapted for.
        transductive: what lets the examples of a test batch see each other; empty for none.
        training_classes: how many of the stream's classes were trained on; None where a stream
            does not say what its classes are.
        seed: of the bootstrap.
        raised: how many tasks have a larger support loss after adaptation than before, by more
            than 1 %: where most have, the inner loop diverges. None except at the validations of
            training, as it costs one more forward pass.
        support_losses: their mean over tasks before and after adaptation; both 0 without an inner
            step. None where `raised` is.
        more_is_better: of the metric; metaplug's own scores know it themselves.
        per_class: (num_tasks, classes) float64: the accuracy of each class, NaN where a task has
            none of its targets; with "per-class accuracy" alone.
        inner: the inner loop step by step, on the first of the tasks; None except at the
            validations of training.
    """

    metric: Metric
    per_task: Tensor
    inner_steps: int
    transductive: tuple[str, ...] = ()
    training_classes: int | None = None
    seed: int = 0
    raised: int | None = None
    support_losses: tuple[float, float] | None = None
    more_is_better: bool = True
    per_class: Tensor | None = None
    inner: InnerProfile | None = None

    def __post_init__(self) -> None:
        if (score := named(self.metric)) is not None:
            object.__setattr__(self, "more_is_better", score.more_is_better)

    @property
    def num_tasks(self) -> int:
        """The number of tasks."""
        return len(self.per_task)

    @property
    def mean(self) -> float:
        """The mean over tasks."""
        return float(self.per_task.mean())

    @property
    def all_equal(self) -> bool:
        """Whether every task has the same value, so the interval has no width and says nothing."""
        return bool((self.per_task == self.per_task[0]).all())

    @property
    def interval(self) -> float:
        """Half the width of the 95 % confidence interval of the mean; NaN for one task.

        t(0.975; n − 1) · s / √n over n tasks.
        """
        n = self.num_tasks
        if n > 1 and self.all_equal:
            return 0.0  # as s is only to rounding
        if n == 1:
            return math.nan
        from scipy.special import stdtrit  # noqa: PLC0415 -- a fifth of a second to import

        return float(stdtrit(n - 1, 0.975)) * float(self.per_task.std()) / math.sqrt(n)

    def bounds(self, method: IntervalMethod = "t") -> tuple[float, float]:
        """Return the ends of the 95 % confidence interval of the mean; both NaN for one task.

        Args:
            method: "t", mean ± `interval`, by Student's t; or "bootstrap", bias-corrected and
                accelerated (BCa; Efron 1987), from 9999 resamples of the tasks that `seed` decides:
                for values far from a normal distribution, as it need not be symmetric.

        Raises:
            RequestError: no such method, or a bootstrap of fewer than 20 tasks.
        """
        if method not in get_args(IntervalMethod):
            raise unknown("interval method", method, get_args(IntervalMethod))
        if method == "t" or self.num_tasks == 1 or self.all_equal or not math.isfinite(self.mean):
            return self.mean - self.interval, self.mean + self.interval
        if self.num_tasks < FEWEST_RESAMPLED:
            raise RequestError(
                f"a bootstrap of {self.num_tasks} tasks: resamples of so few say less of other "
                f"tasks than they seem to; give at least {FEWEST_RESAMPLED} tasks, or take the "
                "interval by t"
            )
        from scipy.stats import bootstrap  # noqa: PLC0415 -- a second to import, which nothing else needs

        # Of one scale for every metric: the cubes in the acceleration would over- or underflow.
        deviations = (self.per_task - self.per_task.mean()).numpy()
        scale = float(abs(deviations).max())
        found = bootstrap(
            (deviations / scale,),
            np.mean,
            n_resamples=RESAMPLES,
            batch=max(1, _NUMBERS_AT_ONCE // self.num_tasks),
            vectorized=True,
            method="BCa",
            rng=np.random.default_rng(self.seed % 2**64),
        ).confidence_interval
        return self.mean + scale * float(found.low), self.mean + scale * float(found.high)

    def better_than(self, value: float) -> bool:
        """Return whether the mean is a better one than `value`."""
        return self.mean > value if self.more_is_better else self.mean < value

    @property
    def by_class(self) -> dict[int, EvaluationResult]:
        """The accuracy of each class over the tasks that have it; empty without `per_class`."""
        if self.per_class is None:
            return {}
        columns = enumerate(self.per_class.unbind(1))
        found = {each: column[~column.isnan()] for each, column in columns}
        return {
            each: replace(self, metric="accuracy", per_task=values, per_class=None, inner=None)
            for each, values in found.items()
            if len(values)
        }

    def __str__(self) -> str:
        tasks = (
            "1 task, which gives no interval"
            if self.num_tasks == 1
            else f"95 % interval over {self.num_tasks} tasks"
        )
        spread = "" if self.num_tasks == 1 else f" ± {self.interval:.4f}"
        equal = ", all of them equal" if self.num_tasks > 1 and self.all_equal else ""
        seen = f"; {training_classes_text(self.training_classes)}" if self.training_classes else ""
        seen = f"{transductive_text(self.transductive)}{seen}"
        return f"{self.metric} {self.mean:.4f}{spread} ({tasks}{equal}; {seen})"


def transductive_text(reasons: Sequence[str]) -> str:
    """Say whether examples see each other: "transductive: no", or why."""
    return f"transductive: {' and '.join(reasons) or 'no'}"


def training_classes_text(count: int) -> str:
    """Say of `count` classes, 1 or more, that they were trained on."""
    return f"not of unseen classes: {count} of them {'was' if count == 1 else 'were'} trained on"


def larger(before: Tensor, after: Tensor) -> Tensor:
    """Return whether losses grew, by more than 1 % and than rounding; NaN counts as larger."""
    return ~(after <= before + 0.01 * before.abs() + 1e-12)
