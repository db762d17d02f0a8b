"""Clauses on numbers: finite everywhere, and meta-gradients that are the derivative of the outer loss."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from metaplug.checks.find_nonfinite import NonFiniteWatch
from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import MetaplugError, quoted
from metaplug.learner import LOSSES, MetaLearner
from metaplug.testing.clauses import BreachError, Example, Subject, clause, clause_on, fit, in_words
from metaplug.testing.comparing import SAME_SUMS, difference, evaluation, training

STEP, ACCURACY = 1e-5, 1e-5
"""Of central differences in float64: the step, and how far they may be off, relative to the gradient's norm."""


@clause_on("finite", "it works and stays finite in float32 and in float64")
def finite(subject: Subject, example: Example) -> None:
    """The model's dtype is the run's."""
    for dtype in (torch.float32, torch.float64):
        case = example.problem.to(dtype)
        try:
            learner = subject.learner(Example(case))
            _check_finite(learner, case.batch)
            fit(learner, Example(case), 1)
        except BreachError:
            raise
        except Exception as error:
            raise BreachError(
                f"in {_short(dtype)}: {in_words(error)}; create what you need in setup with context.dtype"
            ) from error
        for name, parameter in learner.chain.named_parameters().items():
            if parameter.dtype != dtype:
                raise BreachError(
                    f"the meta-parameter {name} is {_short(parameter.dtype)} beside a model in {_short(dtype)}: use context.dtype"
                )
        if wrong := [
            name for name, value in learner.chain.figures().items() if not math.isfinite(value)
        ]:
            raise BreachError(
                f"the figure {wrong[0]} is NaN or Inf in {_short(dtype)}: log finite numbers"
            )


@clause_on(
    "finite-at-zero",
    "where losses and gradients are exactly zero, of all tasks or of one, nothing becomes NaN or Inf",
)
def finite_at_zero(subject: Subject, example: Example) -> None:
    """A task that is learned has no gradient."""
    base, batch = LOSSES[example.problem.kind], example.problem.batch
    quiet = TaskBatch(
        batch.support_x, _targets(batch.support_y), batch.query_x, _targets(batch.query_y)
    )

    def none(prediction: Tensor, target: Tensor) -> Tensor:
        return 0.0 * base(prediction, target)

    def none_of_zeros(prediction: Tensor, target: Tensor) -> Tensor:
        return (target != 0).any().to(prediction.dtype) * base(prediction, target)

    everywhere, once = (
        ("every loss is 0", none, batch),
        ("the losses of task 0 are 0", none_of_zeros, quiet),
    )
    for (where, loss, tasks), dtype in (
        (everywhere, torch.float32),
        (everywhere, torch.float64),
        (once, torch.float32),
    ):
        case = replace(example.problem, batch=tasks).to(dtype)
        learner = subject.learner(Example(case), loss=loss)
        try:
            _check_finite(learner, case.batch)
        except BreachError as breach:
            raise BreachError(
                f"{breach} where {where} (in {_short(dtype)}): bound from below what you divide by or take the root of, "
                "before the root (x.clamp_min(1e-24).sqrt())"
            ) from None


@clause_on(
    "first-order",
    "with derivatives of first order it runs, and the values on the way are those of second order",
)
def first_order(subject: Subject, example: Example) -> None:
    """Inner gradients are constants then, without a graph."""
    learner, batch = subject.learner(example), example.problem.batch
    first, second = (training(learner, batch, order=order) for order in (1, 2))
    if wrong := first.non_finite():
        raise BreachError(f"{wrong} in first order")
    values = {
        name: value
        for name, value in first.whole.items()
        if not name.startswith("the meta-gradient")
    }
    others = {
        name: value
        for name, value in second.whole.items()
        if not name.startswith("the meta-gradient")
    }
    if text := difference(type(first)(first.by_task, values), type(first)(second.by_task, others)):
        raise BreachError(
            f"{text}, in first and in second order, though only derivatives may differ: let no value depend on requires_grad"
        )


@clause_on(
    "recomputed",
    "steps that are taken again in the backward pass (checkpoint_steps) give the same numbers",
)
def recomputed(subject: Subject, example: Example) -> None:
    """The first time no graph is kept, and the second time no statistics."""
    plain, batch = subject.learner(example), example.problem.batch
    mend = "let a hook depend on its arguments alone, not on how often it was called nor on step.statistics"
    for kept, order in ((1, None), (example.problem.steps, 1)):
        again = subject.learner(example, checkpoint_steps=kept)
        try:
            ours = training(again, batch, order=order)
        except MetaplugError as error:
            raise BreachError(f"with checkpoint_steps={kept}: {error}: {mend}") from error
        if text := difference(ours, training(plain, batch, order=order), tolerance=SAME_SUMS):
            raise BreachError(f"{text}, with checkpoint_steps={kept} and without: {mend}")


@clause(
    "meta-parameters-learn", "every one of its meta-parameters receives a gradient that is not zero"
)
def meta_parameters_learn(subject: Subject) -> None:
    """One that receives none stays as it was made, in silence."""
    idle: set[str] = set()
    for seed in range(3):
        example = subject.example(steps=3, seed=seed)
        learner = subject.learner(example)
        fit(learner, example, 2)
        gradients = learner.meta_gradients(example.problem.batch)
        zero = {
            name
            for name in learner.chain.named_parameters()
            if name not in gradients or not bool(gradients[name].any())
        }
        idle = zero if seed == 0 else idle & zero
        if not idle:
            return
    raise BreachError(
        f"no meta-gradient reaches its meta-parameter {quoted(sorted(idle)[:3])}, which would then never learn: "
        "use it without .detach(), .data, .item() or torch.no_grad(), or make it a buffer"
    )


@clause_on(
    "meta-gradients",
    "meta-gradients are the derivative of the outer loss, its own meta-parameters included",
    smooth=True,
    tasks=(1, 3),
)
def meta_gradients(subject: Subject, example: Example) -> None:
    """Central differences along a random direction of each meta-parameter, as gradcheck's fast mode does."""
    if "compute_meta_gradients" in subject.hooks:
        return
    learner, batch = subject.learner(example), example.problem.batch
    found, generator = training(learner, batch, order=2).whole, torch.Generator().manual_seed(0)
    for name, parameter in learner.engine.meta_parameters.items():
        gradient = found.get(f"the meta-gradient of '{name}'", torch.zeros_like(parameter))
        direction = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
        direction = direction / direction.norm()
        analytic, numeric = (
            float((gradient * direction).sum()),
            _slope(learner, batch, parameter, direction),
        )
        if abs(analytic - numeric) > ACCURACY * max(float(gradient.norm()), 1.0):
            raise BreachError(
                f"along a random direction of '{name}' the outer loss rises by {numeric:.6g}, but the meta-gradient says {analytic:.6g}: "
                "use no .detach(), .data, .item() or torch.no_grad() on the way from a meta-parameter or weight to what a hook returns"
            )


def _slope(learner: MetaLearner, batch: TaskBatch, parameter: Tensor, direction: Tensor) -> float:
    """dL/dε at 0 of the outer loss L with ε · direction added to a parameter, by central differences."""
    start, losses = parameter.detach().clone(), []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.copy_(start + sign * STEP * direction)
        losses.append(float(training(learner, batch, order=1).whole["the outer loss"]))
    with torch.no_grad():
        parameter.copy_(start)
    return (losses[0] - losses[1]) / (2 * STEP)


def _check_finite(learner: MetaLearner, batch: TaskBatch) -> None:
    """Refuse NaN and Inf in what training and evaluation find; where a hook made it, it is named."""
    for found in (training, evaluation):
        wrong = found(learner, batch).non_finite()
        if wrong is None:
            continue
        learner.chain.watch = watch = NonFiniteWatch(learner.settings.inner_lr)
        found(learner, batch)
        raise BreachError(
            wrong if watch.fault is None else watch.fault.text.partition("; ")[0]
        )  # the clause has its own advice


def _targets(like: Tensor) -> Tensor:
    """0 for task 0, and 1 for the others."""
    return torch.cat([torch.zeros_like(like[:1]), torch.ones_like(like[1:])])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
