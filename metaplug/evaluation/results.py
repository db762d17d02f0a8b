"""The scores of tasks, and the 95 % confidence interval of their mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy.special import stdtrit
from torch import Tensor

from metaplug.contract.task_batch import IGNORED
from metaplug.contract.values import Kind
from metaplug.errors import RequestError, unknown

Metric = Literal["accuracy", "mean squared error"]
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
        metric: "accuracy" (in [0, 1]; more is better) or "mean squared error" (less is better).
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
    """

    metric: Metric
    per_task: Tensor
    inner_steps: int
    transductive: tuple[str, ...] = ()
    training_classes: int | None = None
    seed: int = 0
    raised: int | None = None
    support_losses: tuple[float, float] | None = None

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


def metric_of(kind: Kind) -> Metric:
    """Return the metric of a kind of task."""
    return "accuracy" if kind == "classification" else "mean squared error"


def score(kind: Kind, predictions: Tensor, targets: Tensor) -> Tensor:
    """Return (T,) float64, on the device of the predictions: accuracy, or mean squared error.

    Accuracy is the share of right targets, of each pixel or token where there are many in an
    example, without those that are IGNORED (-100). A single logit, and the logits of floating-point
    targets (one label or several, 0 or 1 each), count as 1 above 0.

    Args:
        predictions: for regression (T, n, *target). For classification (T, n, classes, *rest) or
            (T, n, *rest, classes) beside class indices; else of the targets' shape.
        targets: (T, n, *target); class indices (T, n, *rest), or floating-point labels.
    """
    if kind == "regression":
        return (predictions.double() - targets.double()).square().flatten(1).mean(1)
    counted = targets != IGNORED
    if targets.is_floating_point() or predictions.numel() == targets.numel():
        right = (predictions.reshape(targets.shape) > 0) == (targets > 0.5)
    else:
        right = predictions.argmax(class_axis(predictions, targets)) == targets
    return (right & counted).flatten(1).double().sum(1) / counted.flatten(1).sum(1)


def class_axis(predictions: Tensor, targets: Tensor) -> int:
    """Return the axis of the classes: the third, as torch's losses have it, or the last.

    Raises:
        RequestError: neither fits the class indices.
    """
    for axis in (2, predictions.dim() - 1):
        if predictions.shape[:axis] + predictions.shape[axis + 1 :] == targets.shape:
            return axis
    raise RequestError(
        f"predictions of shape {tuple(predictions.shape[2:])} an example cannot be scored with "
        f"class indices of shape {tuple(targets.shape[2:])}: answer with an axis of classes first "
        "or last, and the targets' axes beside it"
    )


def larger(before: Tensor, after: Tensor) -> Tensor:
    """Return whether losses grew, by more than 1 % and than rounding; NaN counts as larger."""
    return ~(after <= before + 0.01 * before.abs() + 1e-12)


def better(metric: Metric, candidate: float, than: float) -> bool:
    """Return whether `candidate` is the better value of the metric."""
    return candidate > than if metric == "accuracy" else candidate < than
