"""What computing a failed iteration once more finds: the first NaN or Inf, who made it, and whether the inner loop diverged before."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import RunError, quoted

GREW = 2.0
"""A support loss that has become so many times as large as before the first step is of a loop that diverges."""

JUMPED = 100.0
"""The largest weight that has become so many times as large is of one, too, whatever the losses were."""

FAILURES: tuple[type[Exception], ...] = (RunError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
"""What plugins and models raise on NaN that something else had made."""


@dataclass(frozen=True)
class Fault:
    """A value that is NaN or Inf.

    Attributes:
        place: how many values were looked at before it; the same on all ranks.
        text: which it is, who made it and where; what to do.
    """

    place: int
    text: str


class Watch:
    """Looks at every value of one iteration, in the order in which they are made, and keeps the first that is NaN or Inf.

    It does not stop there, so that ranks go through the same exchanges; what comes after is of no interest.

    Args:
        inner_lr: the inner learning rate that steps start with.
        first, stride: task i of a batch is task first + i · stride of the meta-batch.
    """

    def __init__(self, inner_lr: float, first: int = 0, stride: int = 1) -> None:
        self.inner_lr, self.first, self.stride = inner_lr, first, stride
        self.offset = 0
        """The tasks of the batch before those that are computed now."""
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
        diverged = self._diverged()
        self.fault = Fault(
            self._looked,
            f"{say(f'NaN or Inf in {quoted(list(named)[:3])}{which}')}; {diverged or advice}",
        )

    def look_at_data(self, batch: TaskBatch) -> None:
        """Look at the tasks as they were drawn."""
        self._looked += 1
        try:
            batch.check_values(None, self.number)
        except RunError as error:
            self.fault = self.fault or Fault(self._looked, str(error))

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """The inner loop of a batch, or of some of its tasks, begins from these weights."""
        self._losses, self._rates, self._weights = [], [], [_largest(weights)]

    def step(self, losses: Tensor) -> None:
        """A support loss (T,) before an update."""
        self._losses.append(losses.detach())

    def update(self, rates: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """The learning rates of an update, and the weights that it made."""
        self._rates.append(_largest(rates))
        self._weights.append(_largest(weights))

    def number(self, task: int) -> int:
        """Which task of the meta-batch is the `task`-th that is computed now."""
        return self.first + (self.offset + task) * self.stride

    def _diverged(self) -> str | None:
        """That the inner loop diverged before the fault, with its figures; None where nothing shows it."""
        sizes = [size for size in self._weights if math.isfinite(size)]
        jumped = len(sizes) > 1 and max(sizes) > JUMPED * max(sizes[0], 1e-3)
        largest = max(self._rates, default=self.inner_lr)
        if not math.isfinite(largest):
            return None  # the rate is the fault
        rate = f"inner_lr = {self.inner_lr:.4g}"
        if not math.isclose(largest, self.inner_lr, rel_tol=1e-5):
            rate += f", of which plugins made up to {largest:.4g}"
        if (found := growth(self._losses, infinite=jumped)) is not None:
            task, step, first, last = found
            what = (
                f"the support loss of task {self.number(task)} grew from {first:.4g} to {last:.4g}"
            )
        elif jumped:
            step = self._weights.index(max(sizes))
            what = f"the largest weight grew from {sizes[0]:.4g} to {max(sizes):.4g}"
        else:
            return None
        return f"the inner loop diverges: {what} in {step} inner step{'s' * (step != 1)} at {rate}; lower inner_lr"

    def _tasks(self, named: Mapping[str, Tensor]) -> str:
        wrong = sorted(
            {
                int(row)
                for value in named.values()
                for row in (~torch.isfinite(value)).reshape(len(value), -1).any(1).nonzero()
            }
        )
        count = len(next(iter(named.values())))
        if len(wrong) == count > 1:
            return f" of all {count} tasks"
        shown = ", ".join(str(self.number(row)) for row in wrong[:3])
        return (
            f" of task {shown}"
            if len(wrong) == 1
            else f" of {len(wrong)} tasks ({shown}{', …' * (len(wrong) > 3)})"
        )


def growth(losses: Sequence[Tensor], *, infinite: bool) -> tuple[int, int, float, float] | None:
    """The task whose support loss grew most: its place, the steps until then, the first loss and the largest; None for none GREW-fold.

    Args:
        losses: (T,) support losses before each step, as far as it got.
        infinite: whether Inf counts as grown.
    """
    rows = torch.stack([each.double().cpu() for each in losses], 1).tolist() if losses else []
    found: tuple[int, int, float, float] | None = None
    for task, row in enumerate(rows):
        known = [value if math.isfinite(value) else -math.inf for value in row]
        if infinite and math.inf in row and max(known) < GREW * row[0]:
            known = row[: row.index(math.inf) + 1]
        step = max(range(len(known)), key=known.__getitem__)
        first, last = row[0], known[step]
        if (
            first > 0
            and math.isfinite(first)
            and last >= GREW * first
            and (found is None or last / first > found[3] / found[2])
        ):
            found = task, step, first, last
    return found


def _largest(values: Mapping[str, Tensor]) -> float:
    """The largest absolute value; NaN or Inf where there is one."""
    return float(
        torch.stack(
            [value.detach().abs().max().double() for value in values.values() if value.numel()]
        ).max()
    )


def _non_finite(values: Any) -> dict[str, Tensor]:
    if isinstance(values, TaskBatch):
        values = {
            name: getattr(values, name) for name in ("support_x", "support_y", "query_x", "query_y")
        }
    named = values if isinstance(values, Mapping) else {"its value": values}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all())
    }
