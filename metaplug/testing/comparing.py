"""What a learner finds on one batch, and whether two findings are the same, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.values import Outcome
from metaplug.core.outer_loop import MetaGradients
from metaplug.learner import MetaLearner

ROUNDING = (1e-6, 1e-7)
"""Relative and absolute tolerance, in float64, of what is equal but for the order of sums: batch norm over three examples amplifies it."""

SAME_SUMS = (1e-7, 1e-9)
"""The same where the same sums are taken in the same order, by other kernels."""


def found(learner: MetaLearner, batch: TaskBatch) -> MetaGradients:
    """The engine's own account of one meta-iteration on `batch`: meta-gradients, outer loss and outcome; nothing is updated."""
    return learner.engine.meta_gradients(
        learner.prepare_batch(batch), learner.iteration, learner.engine.total
    )


def outcome_of(given: MetaGradients) -> Outcome:
    """How the tasks were adapted; every derivation but that in chunks keeps it."""
    assert given.outcome is not None
    return given.outcome


def adapted(learner: MetaLearner, batch: TaskBatch) -> dict[str, Tensor]:
    """The adapted weights of one meta-iteration, detached, (T, *shape) by name."""
    return {
        name: weight.detach()
        for name, weight in outcome_of(found(learner, batch)).adapted_parameters.items()
    }


def assert_close(actual: Any, expected: Any, *, rtol: float = 1e-10, atol: float = 1e-11) -> None:
    """Two mappings (or tensors) are equal up to the tolerances; float64 rounding over a few inner steps unless a test says otherwise."""
    if isinstance(expected, dict):
        assert dict(actual).keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(
                actual[name],
                expected[name],
                rtol=rtol,
                atol=atol,
                msg=lambda text, name=name: f"{name}: {text}",
            )  # type: ignore[misc]
    else:
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@dataclass(frozen=True)
class Findings:
    """What a learner found on one batch, detached.

    Attributes:
        by_task: (T, ...) each, by what it is in words.
        whole: what has no task axis, likewise.
    """

    by_task: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]

    def rows(self, order: list[int]) -> Findings:
        """The same with the tasks in this order."""
        return Findings({name: value[order] for name, value in self.by_task.items()}, self.whole)

    def non_finite(self) -> str | None:
        """The first of it that holds NaN or Inf, in words; None where all of it is finite."""
        for name, value in (*self.by_task.items(), *self.whole.items()):
            wrong = ~torch.isfinite(value)
            if bool(wrong.any()):
                task = f" of task {int(wrong.flatten(1).any(1).nonzero()[0]) if value.dim() > 1 else int(wrong.nonzero()[0])}"
                return f"{name}{task if name in self.by_task else ''} is NaN or Inf"
        return None


def training(learner: MetaLearner, batch: TaskBatch, *, order: int | None = None) -> Findings:
    """What one meta-iteration on `batch` finds; nothing is updated.

    Args:
        order: the derivative order of all inner steps, whatever the plugins say; meta-gradients are then those before they are transformed.
    """
    taken = found(learner, batch) if order is None else _of_order(learner, batch, order)
    outcome = outcome_of(taken)
    by_task = {
        f"the adapted weight '{name}'": weight
        for name, weight in outcome.adapted_parameters.items()
    }
    by_task |= {
        f"the support loss of inner step {step}": losses
        for step, losses in enumerate(outcome.support_losses)
    }
    by_task |= {
        f"the query loss after update {after}": losses
        for after, losses in outcome.query_losses.items()
    }
    whole = {
        "the outer loss": taken.outer_loss,
        **{f"the meta-gradient of '{name}'": value for name, value in taken.gradients.items()},
    }
    whole |= {
        f"the statistic '{name}' of {plugin}": value
        for plugin, kept in taken.statistics.items()
        for name, value in kept.items()
    }
    return Findings(_detached(by_task), _detached(whole))


def evaluation(learner: MetaLearner, batch: TaskBatch, *, steps: int | None = None) -> Findings:
    """How the tasks of `batch` are adapted as test tasks."""
    steps = learner.settings.inner_steps if steps is None else steps
    outcome = learner.engine.evaluate(learner.prepare_batch(batch), steps)
    by_task = {
        f"the adapted weight '{name}'": weight
        for name, weight in outcome.adapted_parameters.items()
    }
    return Findings(
        _detached(
            {
                **by_task,
                "the query prediction": outcome.query_predictions,
                "the query loss": outcome.query_losses[steps],
            }
        ),
        {},
    )


def difference(
    ours: Findings,
    theirs: Findings,
    *,
    exact: bool = False,
    tolerance: tuple[float, float] = ROUNDING,
    only: list[int] | None = None,
) -> str | None:
    """The first thing in which two findings differ, in words with both values; None where they are the same.

    Args:
        exact: bit for bit; else to `tolerance`, relative and absolute.
        only: the tasks that are compared, and nothing without a task axis; default: all of it.
    """
    for task_axis, one, other in (
        (True, ours.by_task, theirs.by_task),
        (False, ours.whole, theirs.whole),
    ):
        if only is not None and not task_axis:
            continue
        for name in {**one, **other}:
            if name not in one or name not in other:
                return f"{name} is found in one of the two only"
            first, second = (
                found[name] if only is None else found[name][only] for found in (one, other)
            )
            if text := _unlike(first, second, None if exact else tolerance):
                place, values = text
                task = f" of task {place if only is None else only[place]}" if task_axis else ""
                return f"{name}{task} is {values}"
    return None


def _unlike(
    one: Tensor, other: Tensor, tolerance: tuple[float, float] | None
) -> tuple[int, str] | None:
    """The index on axis 0, and the two numbers in words, where two tensors differ most; None where they do not."""
    if one.shape != other.shape:
        return 0, f"of shape {tuple(one.shape)} in one and {tuple(other.shape)} in the other"
    same = (
        torch.equal(one, other)
        if tolerance is None
        else torch.allclose(one, other, *tolerance, equal_nan=True)
    )
    if same:
        return None
    gap = torch.nan_to_num((one.double() - other.double()).abs(), nan=torch.inf).flatten()
    place = int(gap.argmax())
    digits = 17 if tolerance is None else 6
    values = f"{float(one.flatten()[place]):.{digits}g} in one and {float(other.flatten()[place]):.{digits}g} in the other"
    return (place // max(one[0].numel(), 1) if one.dim() else 0), values


def _of_order(learner: MetaLearner, batch: TaskBatch, order: int) -> MetaGradients:
    engine, taken = learner.engine, list[MetaGradients]()

    def derive(
        batch: TaskBatch, iteration: int, total: int, weights: Mapping[int, float]
    ) -> MetaGradients:
        taken.append(
            engine.derive(
                batch, iteration, total, weights, orders=[order] * engine.inner.inner_steps
            )
        )
        return taken[0]

    usual, engine.derivation = engine.derivation, derive
    try:
        found(learner, batch)
    finally:
        engine.derivation = usual
    return taken[0]


def _detached(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}
