"""The inner loop seen from outside: losses, gradients and learning rates by inner step.

Let u[t] be the gradient of task t over its length, all adapted values as one vector. The mean of
u[s]·u[t] over the n (n − 1) pairs of different tasks is

    (|Σ_t u[t]|² − n) / (n (n − 1))

so no pair is computed, and a sum over tasks is all that batches and ranks exchange.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from metaplug.contract.outcome import Outcome
from metaplug.execution.engine import Engine


@dataclass(frozen=True)
class InnerProfile:
    """Means over some test tasks, by inner step.

    Attributes:
        support_losses, query_losses: K + 1 numbers: before the first inner step and after each,
            without what plugins add to them.
        cosines: K numbers: between the gradients of two tasks, over all pairs, before
            `transform_gradients`; NaN for one task, and where a gradient is 0.
        learning_rates: K numbers: over all adapted values, after `transform_learning_rates`.
    """

    support_losses: tuple[float, ...]
    query_losses: tuple[float, ...]
    cosines: tuple[float, ...]
    learning_rates: tuple[float, ...]


class InnerProfiler:
    """Gathers the profile of the first tasks of an evaluation, batch by batch.

    Args:
        engine: that adapts them.
        count: how many tasks; with 0 there is no profile.
        steps: inner steps.
        together: whether one batch holds all of them; then no gradient is kept.
    """

    def __init__(self, engine: Engine, count: int, steps: int, *, together: bool) -> None:
        self.engine, self.count, self.steps = engine, count, steps
        inner = engine.inner
        values = {**inner.parameters, **inner.variables}
        self._shapes = {name: values[name].shape for name in inner.adapted}
        # Of every task: support and query losses, then rates and lengths of gradients.
        self._values = torch.zeros(4 * steps + 2, count, dtype=torch.float64)
        self._squares = torch.zeros(steps, dtype=torch.float64, device=engine.device)
        self._sums: list[Tensor] | None = None
        if not together:
            size = sum(shape.numel() for shape in self._shapes.values())
            dtype = torch.promote_types(inner.dtype, torch.float32)
            self._sums = [
                torch.zeros(size, dtype=dtype, device=engine.device) for _ in range(steps)
            ]

    def seen(self, own: range) -> _Steps | None:
        """Return what observes the inner steps of tasks of these numbers; None for none of them."""
        rows = min(len(own), self.count - own.start)
        return _Steps(self._shapes, rows) if rows > 0 else None

    def add(
        self, own: range, seen: _Steps | None, outcome: Outcome, adapted_losses: Tensor
    ) -> None:
        """Take what was seen of a batch, if anything was.

        Args:
            own: the numbers of its tasks.
            adapted_losses: (T,) support losses after the last step; not read without a step.
        """
        if seen is None:
            return
        if not self.steps:
            adapted_losses = self.engine.adapted_losses(outcome, own)
        losses = [*outcome.support_losses, adapted_losses.to(self.engine.device)]
        losses += [outcome.query_losses[after] for after in range(self.steps + 1)]
        found = [loss.detach()[: seen.rows].double() for loss in losses]
        found += [seen.rates[k] for k in range(self.steps)]
        found += [seen.lengths[k] for k in range(self.steps)]
        self._values[:, own.start : own.start + seen.rows] = torch.stack(found).cpu()
        for k in range(self.steps):
            if self._sums is None:
                self._squares[k] = _square(seen.directions[k])
            else:
                self._sums[k] += seen.directions[k]

    def lose(self, own: range) -> None:
        """Note that tasks of these numbers cannot be computed: their means are NaN."""
        self._values[:, own.start : own.stop] = torch.nan

    def profile(self) -> InnerProfile | None:
        """Return the means over the tasks of all ranks, which all call it."""
        if not self.count:
            return None
        world, values = self.engine.world, self.engine.world.sum(self._values)
        if self._sums is None:
            squares = world.sum(self._squares).tolist()
        else:
            squares = [float(_square(world.sum(each))) for each in self._sums]
        means, lengths = iter(values.mean(1).tolist()), values[3 * self.steps + 2 :]
        told = (lengths > 0) & lengths.isfinite()
        n = self.count
        cosines = [
            min(1.0, max(-1.0, (square - n) / (n * (n - 1)))) if n > 1 and every else math.nan
            for square, every in zip(squares, told.all(1).tolist(), strict=True)
        ]
        support, query = (tuple(islice(means, self.steps + 1)) for _ in range(2))
        return InnerProfile(support, query, tuple(cosines), tuple(islice(means, self.steps)))


class _Steps:
    """Observes the inner steps of one batch; seen once more, a step takes the place of the first.

    Attributes:
        rows: the first tasks of the batch, which alone count.
        rates, lengths: by step, (rows,) float64: the mean learning rate, and the gradient's length.
        directions: by step, Σ_t u[t] as one vector.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], rows: int) -> None:
        self.rows, self._shapes = rows, shapes
        self.rates: dict[int, Tensor] = {}
        self.lengths: dict[int, Tensor] = {}
        self.directions: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, index: int, gradients: Mapping[str, Tensor], rates: Mapping[str, Tensor]
    ) -> None:
        flat = {name: self._flat(name, each) for name, each in gradients.items()}
        squares = [
            torch.linalg.vector_norm(each, dim=1, dtype=torch.float64).square()
            for each in flat.values()
        ]
        self.lengths[index] = torch.stack(squares).sum(0).sqrt()
        first = next(iter(flat.values()))
        weights = self.lengths[index].reciprocal().to(first.dtype)
        self.directions[index] = torch.cat(
            [
                weights @ flat[name] if name in flat else first.new_zeros(shape.numel())
                for name, shape in self._shapes.items()
            ]
        )
        self.rates[index] = self._mean_rates(rates)

    def _flat(self, name: str, gradient: Tensor) -> Tensor:
        own = gradient[: self.rows].reshape(self.rows, self._shapes[name].numel())
        return own.to(torch.promote_types(own.dtype, torch.float32))

    def _mean_rates(self, rates: Mapping[str, Tensor]) -> Tensor:
        """(rows,): the mean rate of every task, over all that it adapts."""
        device = next(iter(rates.values())).device
        found = torch.zeros(self.rows, dtype=torch.float64, device=device)
        for name, rate in rates.items():
            shape = self._shapes[name]
            if not shape.numel():
                continue
            # What broadcasts may leave out leading axes; with all of them, the first is of tasks.
            by_task = rate.ndim > len(shape)
            own = rate.reshape(len(rate), -1).mean(1) if by_task else rate.mean()[None]
            found += shape.numel() * own[: self.rows].double()
        mean: Tensor = found / sum(shape.numel() for shape in self._shapes.values())
        return mean


def _square(vector: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vector, dtype=torch.float64)
    return length.square()
