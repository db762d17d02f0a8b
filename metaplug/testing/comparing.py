"""Findings of a learner on one batch, and the first difference between two of them, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaplug.contract.outcome import Outcome
from metaplug.contract.task_batch import TaskBatch
from metaplug.core.outer_loop import MetaGradients
from metaplug.learner import MetaLearner

ROUNDING = (1e-6, 1e-7)
"""Relative and absolute tolerance, in float64, of what is equal but for the order of sums, which
batch norm over three examples amplifies."""

SAME_SUMS = (1e-7, 1e-9)
"""The same where the same sums are taken in the same order, by other kernels."""


def found(learner: MetaLearner, batch: TaskBatch) -> MetaGradients:
    """Derive one meta-iteration on `batch`: meta-gradients, losses, outcome; updates nothing."""
    engine = learner.engine
    return engine.meta_gradients(learner.prepare_batch(batch), learner.iteration, engine.total)


def adapted(learner: MetaLearner, batch: TaskBatch) -> dict[str, Tensor]:
    """Adapt as one meta-iteration does: the weights, detached, (T, *shape) by name."""
    weights = outcome_of(found(learner, batch)).adapted_parameters
    return {name: weight.detach() for name, weight in weights.items()}


def outcome_of(given: MetaGradients) -> Outcome:
    """The outcome, which every derivation but that in chunks keeps."""
    assert given.outcome is not None
    return given.outcome


def assert_close(actual: Any, expected: Any, *, rtol: float = 1e-10, atol: float = 1e-11) -> None:
    """Assert that two mappings or tensors are equal up to float64 rounding over a few steps."""
    if not isinstance(expected, dict):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
        return
    assert dict(actual).keys() == expected.keys()
    for name, value in expected.items():
        try:
            torch.testing.assert_close(actual[name], value, rtol=rtol, atol=atol)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@dataclass(frozen=True)
class Findings:
    """Values that a learner found on one batch, detached.

    Attributes:
        by_task: (T, ...) each, by what it is in words.
        whole: what has no task axis, likewise.
    """

    by_task: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]

    def rows(self, order: list[int]) -> Findings:
        """The same with the tasks in this order."""
        return Findings({name: value[order] for name, value in self.by_task.items()}, self.whole)

    def renamed(self, plugin: str, to: str) -> Findings:
        """The same as found of a plugin of another name."""

        def of(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {
                name.replace(f"'{plugin}.", f"'{to}.").replace(f"of {plugin}", f"of {to}"): each
                for name, each in values.items()
            }

        return Findings(of(self.by_task), of(self.whole))

    def known_to(self, other: Findings) -> Findings:
        """The same without what the other has not: a plugin's own parameters and statistics."""
        by_task = {name: each for name, each in self.by_task.items() if name in other.by_task}
        whole = {name: each for name, each in self.whole.items() if name in other.whole}
        return Findings(by_task, whole)

    def without(self, *prefixes: str) -> Findings:
        """The same without what of `whole` begins with one of `prefixes`."""
        kept = {name: value for name, value in self.whole.items() if not name.startswith(prefixes)}
        return Findings(self.by_task, kept)

    def non_finite(self) -> str | None:
        """Name the first value that holds NaN or Inf; None if all are finite."""
        for name, value in (*self.by_task.items(), *self.whole.items()):
            wrong = ~torch.isfinite(value)
            if bool(wrong.any()):
                task = int(wrong.reshape(len(value), -1).any(1).nonzero()[0]) if value.dim() else 0
                return f"{name}{f' of task {task}' * (name in self.by_task)} is NaN or Inf"
        return None


def training(learner: MetaLearner, batch: TaskBatch, *, order: int | None = None) -> Findings:
    """Find what one meta-iteration on `batch` computes; update nothing.

    Args:
        order: the derivative order of all inner steps, whatever the plugins say; meta-gradients
            are then those before they are transformed.
    """
    taken = found(learner, batch) if order is None else _of_order(learner, batch, order)
    outcome = outcome_of(taken)
    by_task = _weights(outcome)
    for step, losses in enumerate(outcome.support_losses):
        by_task[f"the support loss of inner step {step}"] = losses
    for after, losses in outcome.query_losses.items():
        by_task[f"the query loss after update {after}"] = losses
    return Findings(_detached(by_task), derived(taken).whole)


def derived(taken: MetaGradients) -> Findings:
    """Find what every derivation of meta-gradients gives, traced ones too."""
    whole = {"the outer loss": taken.outer_loss}
    whole |= {f"the meta-gradient of '{name}'": value for name, value in taken.gradients.items()}
    for plugin, kept in taken.statistics.items():
        whole |= {f"the statistic '{name}' of {plugin}": value for name, value in kept.items()}
    return Findings({}, _detached(whole))


def evaluation(learner: MetaLearner, batch: TaskBatch, *, steps: int | None = None) -> Findings:
    """Find how the tasks of `batch` are adapted as test tasks."""
    steps = learner.settings.inner_steps if steps is None else steps
    outcome = learner.engine.evaluate(learner.prepare_batch(batch), steps)
    by_task = _weights(outcome)
    by_task["the query prediction"] = outcome.query_predictions
    by_task["the query loss"] = outcome.query_losses[steps]
    return Findings(_detached(by_task), {})


def difference(
    ours: Findings,
    theirs: Findings,
    *,
    exact: bool = False,
    tolerance: tuple[float, float] = ROUNDING,
    only: list[int] | None = None,
) -> str | None:
    """Describe the first difference with both values; None if there is none.

    Args:
        exact: bit for bit; else to `tolerance`, relative and absolute.
        only: the tasks that are compared, and nothing without a task axis; default: everything.
    """
    for name, one, other in _pairs(ours.by_task, theirs.by_task):
        if one is None or other is None:
            return f"{name} is found in one of the two only"
        rows = list(range(len(one))) if only is None else only
        if text := _unlike(one[rows], other[rows], None if exact else tolerance):
            return f"{name} of task {rows[text[0]]} is {text[1]}"
    for name, one, other in _pairs(ours.whole, theirs.whole) if only is None else ():
        if one is None or other is None:
            return f"{name} is found in one of the two only"
        if text := _unlike(one, other, None if exact else tolerance):
            return f"{name} is {text[1]}"
    return None


def _pairs(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    return ((name, ours.get(name), theirs.get(name)) for name in {**ours, **theirs})


def _unlike(
    one: Tensor, other: Tensor, tolerance: tuple[float, float] | None
) -> tuple[int, str] | None:
    """Find where two tensors differ most: the index on axis 0, and both numbers; None if equal."""
    if one.shape != other.shape:
        return 0, f"of shape {tuple(one.shape)} in one and {tuple(other.shape)} in the other"
    if tolerance is None and torch.equal(one, other):
        return None
    if tolerance is not None and torch.allclose(one, other, *tolerance, equal_nan=True):
        return None
    gap = torch.nan_to_num((one.double() - other.double()).abs(), nan=torch.inf).flatten()
    place, digits = int(gap.argmax()), 17 if tolerance is None else 6
    first, second = (f"{float(each.flatten()[place]):.{digits}g}" for each in (one, other))
    row = place // max(one[0].numel(), 1) if one.dim() else 0
    return row, f"{first} in one and {second} in the other"


def _of_order(learner: MetaLearner, batch: TaskBatch, order: int) -> MetaGradients:
    engine, taken = learner.engine, list[MetaGradients]()
    orders: Sequence[int] = [order] * engine.inner.inner_steps

    def derive(*given: Any) -> MetaGradients:
        taken.append(engine.derive(*given, orders=orders))
        return taken[0]

    usual, engine.derivation = engine.derivation, derive
    try:
        found(learner, batch)
    finally:
        engine.derivation = usual
    return taken[0]


def _weights(outcome: Outcome) -> dict[str, Tensor]:
    starts, ends = outcome.initial_parameters, outcome.adapted_parameters
    found = {f"the start of '{name}'": start for name, start in starts.items()}
    return found | {f"the adapted weight '{name}'": weight for name, weight in ends.items()}


def _detached(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}
