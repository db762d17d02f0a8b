"""The origin of a NaN: a failed iteration is computed once more, and every value in it looked at.

`find_nonfinite` is the diagnosis of a meta-iteration; a `NonFiniteWatch` looks at the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaplug.contract.schedule import iteration_text
from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import RunError, quoted
from metaplug.execution.engine import FAILURES, Engine

GREW = 2.0
"""A support loss that has grown by this factor since the first step belongs to a divergent loop."""

JUMPED = 100.0
"""So does a largest weight that has grown by this factor, whatever the losses were."""


@dataclass(frozen=True)
class Fault:
    """A non-finite value.

    Attributes:
        place: how many values were looked at before it; the same on all ranks.
        text: which value it is, who made it and where, and what to do.
    """

    place: int
    text: str


class NonFiniteWatch:
    """Looks at the values of one iteration, in order, and keeps the first that is NaN or Inf.

    It does not stop there: ranks must go through the same exchanges.

    Args:
        inner_lr: the inner learning rate that steps start with.
        first, stride: task i of a batch is task first + i · stride of the meta-batch.

    Attributes:
        offset: the tasks of the batch before those that are computed now.
        fault: the first non-finite value; None while there is none.
    """

    def __init__(self, inner_lr: float, first: int = 0, stride: int = 1) -> None:
        self.inner_lr, self.first, self.stride, self.offset = inner_lr, first, stride, 0
        self.fault: Fault | None = None
        self._looked = 0
        self._losses: list[Tensor] = []
        self._rates: list[float] = []
        self._weights: list[float] = []

    def look(
        self, values: Any, say: Callable[[str], str], advice: str, *, by_task: bool = False
    ) -> None:
        """Look at a tensor, a TaskBatch, or tensors by name.

        Args:
            say: from "NaN or Inf in …" to who holds it.
            advice: what to do about it.
            by_task: whether the first axis of each tensor is that of the tasks.
        """
        self._looked += 1
        if self.fault is not None or not (named := _non_finite(values)):
            return
        which = self._tasks(named) if by_task else ""
        text = say(f"NaN or Inf in {quoted(list(named)[:3])}{which}")
        self.fault = Fault(self._looked, f"{text}; {self._diverged() or advice}")

    def look_at_data(self, batch: TaskBatch) -> None:
        """Look at the tasks as they were drawn."""
        self._looked += 1
        try:
            batch.check_values(None, self.number)
        except RunError as error:
            self.fault = self.fault or Fault(self._looked, str(error))

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Note the weights from which the inner loop of some tasks begins."""
        self._losses, self._rates, self._weights = [], [], [_largest(weights)]

    def step(self, losses: Tensor) -> None:
        """Note the support losses (T,) before an update."""
        self._losses.append(losses.detach())

    def update(self, rates: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Note the learning rates of an update, and the weights that it made."""
        self._rates.append(_largest(rates))
        self._weights.append(_largest(weights))

    def number(self, task: int) -> int:
        """Return which task of the meta-batch is the `task`-th that is computed now."""
        return self.first + (self.offset + task) * self.stride

    def _diverged(self) -> str | None:
        """Say that the inner loop diverged before the fault; None where nothing shows it."""
        sizes = [size for size in self._weights if math.isfinite(size)]
        jumped = len(sizes) > 1 and max(sizes) > JUMPED * max(sizes[0], 1e-3)
        largest = max(self._rates, default=self.inner_lr)
        if not math.isfinite(largest):
            return None  # the rate itself is the fault
        rate = f"inner_lr = {self.inner_lr:.4g}"
        if not math.isclose(largest, self.inner_lr, rel_tol=1e-5):
            rate += f", of which plugins made up to {largest:.4g}"
        if (found := growth(self._losses, infinite=jumped)) is not None:
            task, step, first, last = found
            of = f"the support loss of task {self.number(task)}"
        elif jumped:
            step, first, last = self._weights.index(max(sizes)), sizes[0], max(sizes)
            of = "the largest weight"
        else:
            return None
        steps = f"{step} inner step{'s' * (step != 1)}"
        grew = f"{of} grew from {first:.4g} to {last:.4g} in {steps}"
        return f"the inner loop diverges: {grew} at {rate}; lower inner_lr"

    def _tasks(self, named: Mapping[str, Tensor]) -> str:
        rows = [
            (~torch.isfinite(value)).reshape(len(value), -1).any(1).nonzero()
            for value in named.values()
        ]
        wrong = sorted({int(row) for each in rows for row in each})
        count = len(next(iter(named.values())))
        if len(wrong) == count > 1:
            return f" of all {count} tasks"
        shown = ", ".join(str(self.number(row)) for row in wrong[:3])
        if len(wrong) == 1:
            return f" of task {shown}"
        return f" of {len(wrong)} tasks ({shown}{', …' * (len(wrong) > 3)})"


def find_nonfinite(
    engine: Engine, batch: TaskBatch, failure: Exception | None, total: int, alone: bool
) -> str:
    """Return the first non-finite value of a failed iteration, who made it, and what to do.

    Args:
        failure: the error that ended the iteration, if one did: it stands where no value was
            non-finite before it.
        alone: whether the ranks part here: one raises the error, the others hear of it.

    Raises:
        RunError: `alone`.
        Exception: `failure`.
    """
    iteration = engine.iteration
    rank, size = engine.world.rank, engine.world.size
    watch = engine.chain.watch = NonFiniteWatch(engine.inner.inner_lr, rank, size)
    try:
        _look_at_meta_parameters(watch, engine, f" before {iteration_text(iteration)}")
        watch.look_at_data(batch)
        found = engine.meta_gradients(batch, iteration, total)
        norm = torch.nn.utils.get_total_norm(found.gradients.values())
        text = f"is Inf in {iteration_text(iteration)}, though each of its elements is finite"
        watch.look(
            {"the meta-gradient": norm.square()},
            lambda _: f"the norm of the meta-gradient, or its square, {text}",
            "clip it inside the loop, or lower inner_lr",
        )
    except FAILURES:
        if watch.fault is None or size > 1:
            raise
    finally:
        engine.chain.watch = None
    if failure is not None and watch.fault is None:
        raise failure
    text, owner = _first(engine.world.gather(watch.fault)) or (_not_again(engine), 0)
    if not alone:
        return text
    if owner != rank:
        engine.world.any()  # the rank that found it says what it is
    raise RunError(f"{iteration_text(iteration)} stopped, nothing was updated: {text}")


def find_nonfinite_at_evaluation(
    engine: Engine, batch: TaskBatch, numbers: Sequence[int], steps: int
) -> str | None:
    """Return the first non-finite value of an evaluation of these tasks; None for none."""
    watch = engine.chain.watch = NonFiniteWatch(engine.inner.inner_lr, numbers[0])
    try:
        _look_at_meta_parameters(watch, engine, "")
        watch.look_at_data(batch)
        engine.evaluate(batch, steps, numbers)
    except FAILURES:
        pass  # on what was found before, or it is known already
    finally:
        engine.chain.watch = None
    return None if watch.fault is None else watch.fault.text


def growth(losses: Sequence[Tensor], *, infinite: bool) -> tuple[int, int, float, float] | None:
    """Return the task whose support loss grew most: its place, steps, first loss and largest.

    Args:
        losses: (T,) support losses before each step, as far as it got.
        infinite: whether Inf counts as grown.

    Returns:
        None where no loss grew GREW-fold.
    """
    rows = torch.stack([each.double().cpu() for each in losses], 1).tolist() if losses else []
    found: tuple[int, int, float, float] | None = None
    for task, row in enumerate(rows):
        known = [value if math.isfinite(value) else -math.inf for value in row]
        if infinite and math.inf in row and max(known) < GREW * row[0]:
            known = row[: row.index(math.inf) + 1]
        step = max(range(len(known)), key=known.__getitem__)
        first, last = row[0], known[step]
        grew = first > 0 and math.isfinite(first) and last >= GREW * first
        if grew and (found is None or last / first > found[3] / found[2]):
            found = task, step, first, last
    return found


def _look_at_meta_parameters(watch: NonFiniteWatch, engine: Engine, when: str) -> None:
    watch.look(
        engine.meta_parameters,
        lambda fault: f"{fault} stood in the meta-parameters{when}",
        "go on from a checkpoint before that",
    )


def _not_again(engine: Engine) -> str:
    way = "the same: see what draws at random"
    if engine.derivation is not None:
        way = "uncompiled and uncaptured: leave compile and capture out"
    when = iteration_text(engine.iteration)
    return f"{when} gave NaN or Inf, but not when it was computed once more, {way}"


def _first(faults: Sequence[Fault | None]) -> tuple[str, int] | None:
    """Return the text of the fault that came first on some rank, and the rank."""
    found = [(fault.place, rank, fault.text) for rank, fault in enumerate(faults) if fault]
    return (min(found)[2], min(found)[1]) if found else None


def _largest(values: Mapping[str, Tensor]) -> float:
    """Return the largest absolute value; NaN or Inf where there is one."""
    largest = [value.detach().abs().max().double() for value in values.values() if value.numel()]
    return float(torch.stack(largest).max())


def _non_finite(values: Any) -> dict[str, Tensor]:
    if isinstance(values, TaskBatch):
        values = values.named_tensors()
    named = values if isinstance(values, Mapping) else {"its value": values}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all())
    }
