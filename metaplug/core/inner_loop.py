"""What stays the same of an inner loop from batch to batch; `adaptation` runs it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metaplug.contract.chain import Chain
from metaplug.contract.inner_step import InnerStep
from metaplug.contract.outcome import Outcome
from metaplug.core.model_calls import Output
from metaplug.core.optimizers import DifferentiableOptimizer
from metaplug.core.recording import recording
from metaplug.core.task_model import Loss, TaskModel


class InnerLoop(TaskModel):
    """A model with the plugins, the optimizer and the rate by which tasks adapt it.

    Args:
        model: called with one task's inputs (n, *input); never changed here.
        chain: the plugins.
        loss: of one task.
        adapted: names of the parameters that the loop updates.
        inner_steps: K in training, at least 0.
        inner_lr: the inner learning rate, at least 0.
        optimizer, optimizer_settings: a name in OPTIMIZERS, and its settings.
        batch_norm: "batch" (statistics of each task's own batch, in training and evaluation) or
            "frozen" (the model's stored statistics).
        output: the part of the model's answer that is its prediction.
        variables: the starts of the plugins' task parameters by PLUGIN.NAME, without a task axis;
            the loop updates them beside the model's.

    Attributes:
        adapted: the names of what the loop updates.
        checkpoint_steps: keep the graph of this many inner steps; recompute the rest in the
            backward pass. None keeps all of it.

    Example:
        >>> loop = InnerLoop(nn.Linear(2, 2), Chain([]), nn.functional.cross_entropy,
        ...     adapted=("weight",), inner_steps=3, inner_lr=0.1, optimizer="sgd",
        ...     optimizer_settings={}, batch_norm="batch")
        >>> loop.orders_of(iteration=0, total=1)
        (2, 2, 2)
    """

    def __init__(
        self,
        model: nn.Module,
        chain: Chain,
        loss: Loss,
        *,
        adapted: Collection[str],
        inner_steps: int,
        inner_lr: float,
        optimizer: str,
        optimizer_settings: Mapping[str, Any],
        batch_norm: str,
        output: Output = None,
        variables: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(model, loss, adapted=adapted, batch_norm=batch_norm, output=output)
        self.variables = dict(variables or {})
        self.adapted = (*self.adapted, *self.variables)
        self.chain, self.inner_steps, self.inner_lr = chain, inner_steps, inner_lr
        self.checkpoint_steps: int | None = None
        self.optimizer = DifferentiableOptimizer(
            optimizer, optimizer_settings, inner_lr, len(self.adapted)
        )

    def adapted_losses(self, outcome: Outcome, seeds: Sequence[int] | None = None) -> Tensor:
        """Return the (T,) support losses after the last update; asks no hook, keeps no graph."""
        values, batch = outcome.query_parameters, outcome.batch.recordable()
        stacked = [values[name] for name in self.parameters]
        with recording(), torch.set_grad_enabled(self.query_graph):
            losses, _ = self.all_tasks(stacked, self.groups(batch, "support"), seeds)
        return losses.detach()

    def orders_of(self, iteration: int, total: int) -> tuple[int, ...]:
        """Return the derivative order of every inner step of a training iteration."""
        count = self.inner_steps
        if not self.chain.links("derivative_order"):
            return (2,) * count
        steps = [InnerStep(k, count, count, iteration, total, True) for k in range(count)]
        return tuple(self.chain.choose("derivative_order", 2, step=step) for step in steps)
