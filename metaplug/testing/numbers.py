"""Clauses on numbers: finite in every dtype, and where losses are zero."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from metaplug.checks.find_nonfinite import NonFiniteWatch
from metaplug.contract.task_batch import TaskBatch
from metaplug.learner import MetaLearner
from metaplug.testing.clauses import BreachError, Example, Subject, clause_on, fit, in_words
from metaplug.testing.comparing import evaluation, training
from metaplug.training.assemble import LOSSES


@clause_on("finite", "it works and stays finite in float32 and in float64")
def finite(subject: Subject, example: Example) -> None:
    """The model's dtype is the run's."""
    for dtype in (torch.float32, torch.float64):
        case, short = example.problem.to(dtype), _short(dtype)
        try:
            learner = subject.learner(Example(case))
            _check_finite(learner, case.batch)
            fit(learner, Example(case), 1)
        except BreachError:
            raise
        except Exception as error:
            advice = "create what you need in setup with context.dtype"
            raise BreachError(f"in {short}: {in_words(error)}; {advice}") from error
        for name, parameter in learner.chain.named_parameters().items():
            if parameter.dtype != dtype:
                raise BreachError(
                    f"the meta-parameter {name} is {_short(parameter.dtype)} beside a model in "
                    f"{short}: use context.dtype"
                )
        for name, value in learner.chain.figures().items():
            if not math.isfinite(value):
                raise BreachError(f"the figure {name} is NaN or Inf in {short}: log finite numbers")


@clause_on(
    "finite-at-zero",
    "where losses and gradients are exactly zero, of all tasks or of one, nothing becomes NaN or "
    "Inf",
    steps=(2, 3),
)
def finite_at_zero(subject: Subject, example: Example) -> None:
    """A task that is learned has no gradient."""
    base, batch = LOSSES[example.problem.kind], example.problem.batch
    zero_for_one = TaskBatch(
        batch.support_x, _targets(batch.support_y), batch.query_x, _targets(batch.query_y)
    )

    def none(prediction: Tensor, target: Tensor) -> Tensor:
        return 0.0 * base(prediction, target)

    def none_of_zeros(prediction: Tensor, target: Tensor) -> Tensor:
        return (target != 0).any().to(prediction.dtype) * base(prediction, target)

    for where, loss, tasks, dtype in (
        ("every loss is 0", none, batch, torch.float32),
        ("every loss is 0", none, batch, torch.float64),
        ("the losses of task 0 are 0", none_of_zeros, zero_for_one, torch.float32),
    ):
        case = replace(example.problem, batch=tasks).to(dtype)
        learner = subject.learner(Example(case), loss=loss)
        try:
            _check_finite(learner, case.batch)
        except BreachError as breach:
            raise BreachError(
                f"{breach} where {where} (in {_short(dtype)}): bound from below what you divide by "
                "or take the root of, before the root (x.clamp_min(1e-24).sqrt())"
            ) from None


def _check_finite(learner: MetaLearner, batch: TaskBatch) -> None:
    """Refuse NaN and Inf in training and evaluation; names the hook that made it."""
    for found in (training, evaluation):
        wrong = found(learner, batch).non_finite()
        if wrong is None:
            continue
        learner.chain.watch = watch = NonFiniteWatch(learner.settings.inner_lr)
        found(learner, batch)
        # The clause has its own advice.
        raise BreachError(wrong if watch.fault is None else watch.fault.text.partition("; ")[0])


def _targets(like: Tensor) -> Tensor:
    """0 for task 0, and 1 for the others."""
    return torch.cat([torch.zeros_like(like[:1]), torch.ones_like(like[1:])])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
