"""Accuracy or error per task, and the 95 % confidence interval of their mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scipy.special import stdtrit
from torch import Tensor

from metaplug.values import Kind

Metric = Literal["accuracy", "mean squared error"]


@dataclass(frozen=True)
class EvaluationResult:
    """How well unseen tasks were adapted to.

    Attributes:
        metric: "accuracy" (a fraction in [0, 1]; more is better) or "mean squared error" (less is better).
        per_task: (num_tasks,) float64, on the CPU.
        inner_steps: the number of steps that each task was adapted for.
        transductive: what lets the examples of a test batch see each other, in words; empty for none.
    """

    metric: Metric
    per_task: Tensor
    inner_steps: int
    transductive: tuple[str, ...] = ()

    @property
    def num_tasks(self) -> int:
        """The number of tasks."""
        return len(self.per_task)

    @property
    def mean(self) -> float:
        """The mean over tasks."""
        return float(self.per_task.mean())

    @property
    def interval(self) -> float:
        """Half the width of the 95 % confidence interval of the mean, t(0.975; n − 1) · s / √n over n tasks; NaN for one task."""
        n = self.num_tasks
        return float(stdtrit(n - 1, 0.975)) * float(self.per_task.std()) / math.sqrt(n) if n > 1 else math.nan

    def __str__(self) -> str:
        return f"{self.metric} {self.mean:.4f} ± {self.interval:.4f} (95 % interval over {self.num_tasks} tasks)"


def metric_of(kind: Kind) -> Metric:
    """The metric that a kind of task is measured by."""
    return "accuracy" if kind == "classification" else "mean squared error"


def score(kind: Kind, predictions: Tensor, targets: Tensor) -> Tensor:
    """(T,) float64 on the CPU: each task's accuracy, or its mean squared error.

    Args:
        predictions: (T, n, classes) for classification, (T, n, *target) for regression.
        targets: (T, n) class indices, or (T, n, *target).
    """
    if kind == "classification":
        return (predictions.argmax(2) == targets).double().mean(1).cpu()
    return (predictions.double() - targets.double()).square().flatten(1).mean(1).cpu()


def better(metric: Metric, candidate: float, than: float) -> bool:
    """Whether `candidate` is the better value of the metric."""
    return candidate > than if metric == "accuracy" else candidate < than
