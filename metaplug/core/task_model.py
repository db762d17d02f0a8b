"""The model and its loss, run for all tasks of a batch, each task with weights of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metaplug.contract.inputs import Inputs, map_inputs
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_groups import Alike, alike, in_order, rows_of
from metaplug.contract.task_sizes import Part
from metaplug.core.frozen_features import FrozenFeatures
from metaplug.core.functional_model import FunctionalModel
from metaplug.core.losses import cross_entropy, of_ways
from metaplug.core.model_calls import Output
from metaplug.core.vmap_rules import TaskRules, for_all_tasks
from metaplug.random_streams import stream

Loss = Callable[[Any, Tensor], Tensor]
"""(prediction, target) of one task → its loss, a tensor of shape ()."""


class TaskModel:
    """Runs a model on the examples of many tasks.

    Args:
        model: called with one task's inputs (n, *input); never changed here.
        loss: of one task.
        adapted: names of the parameters that differ from task to task.
        batch_norm: "batch" (statistics of each task's own batch, in training and evaluation) or
            "frozen" (the model's stored statistics).
        output: the part of the model's answer that is its prediction.

    Attributes:
        vectorized: whether tasks run in one call under vmap, or one after the other.
        autocast: makes the context in which the model's forward passes run.
        first_order_only: whether an operation of the model refuses to be differentiated twice,
            which autograd passes over.
        classes_last: whether classes are on the last axis of an output where shapes do not tell.
        features: keeps what no adapted weight reaches from pass to pass; None computes it anew.
        query_graph: whether forward itself differentiates, so that it needs autograd at evaluation.
        is_adapted: of each parameter, whether its value differs from task to task.
        dtype, device: of the parameters that are trained.

    Example:
        >>> model = TaskModel(nn.Linear(2, 2), nn.functional.cross_entropy, adapted=["bias"],
        ...     batch_norm="batch")
        >>> x, y = torch.ones(3, 4, 2), torch.zeros(3, 4, dtype=torch.int64)
        >>> stacked = [each.expand(3, *each.shape) for each in model.parameters.values()]
        >>> groups = model.groups(TaskBatch(x, y, x, y), "query")
        >>> model.all_tasks(stacked, groups)[0].shape
        torch.Size([3])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        adapted: Collection[str],
        batch_norm: str,
        output: Output = None,
    ) -> None:
        self.loss = loss
        self.vectorized, self.query_graph, self.first_order_only = True, False, False
        self.classes_last = False
        self.features: FrozenFeatures | None = None
        self.autocast: Callable[[], AbstractContextManager[None]] = nullcontext
        self.functional = FunctionalModel(model, batch_norm, output)
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.adapted = tuple(name for name in self.parameters if name in adapted)
        self.is_adapted = list(map(set(self.adapted).__contains__, self.parameters))
        reference = next(each for each in self.parameters.values() if each.requires_grad)
        self.dtype, self.device = reference.dtype, reference.device

    def task(
        self, weights: Sequence[Tensor], x: Inputs, y: Tensor, ways: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return one task's loss () and prediction (n, *output), with weights of its own.

        Args:
            ways: the number of its classes, where the loss is to see no further outputs.
        """
        with self.autocast():
            prediction = self.functional(weights, x)
        if self.autocast is not nullcontext and prediction.is_floating_point():
            prediction = prediction.to(self.dtype)  # losses keep the model's own dtype
        counted = of_ways(prediction, y, ways, last=self.classes_last)
        if self.loss is cross_entropy:
            return cross_entropy(*counted, last=self.classes_last), prediction
        return self.loss(*counted), prediction

    def groups(self, batch: TaskBatch, part: Part) -> list[Alike]:
        """Return examples as the model takes them, masks expanded, those of one size together."""
        return [
            group._replace(x=self.functional.inputs(group.x, self.dtype))
            for group in alike(batch, part)
        ]

    def all_tasks(
        self,
        stacked: Sequence[Tensor],
        groups: Sequence[Alike],
        seeds: Sequence[int] | None = None,
        *,
        keep: Part | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return every task's loss (T,) and prediction (T, n, *output), padded where sizes differ.

        Args:
            stacked: (T, *shape) each, in the model's order.
            groups: what `groups` gave.
            seeds: one for each task, where each draws random numbers of its own; they make tasks
                run one after the other.
            keep: the part of these examples, where this is one of several passes of a loop, which
                may keep `features`.
        """
        losses, predictions = [], []
        for group in groups:
            own = None if seeds is None else [seeds[row] for row in group.rows]
            weights = [
                rows_of(value, group.rows, shared=not adapted)
                for adapted, value in zip(self.is_adapted, stacked, strict=True)
            ]
            loss, prediction = self._alike(weights, group, own, keep)
            losses.append((group.rows, loss))
            predictions.append((group.rows, prediction))
        return in_order(losses), in_order(predictions)

    def _alike(
        self,
        stacked: Sequence[Tensor],
        group: Alike,
        seeds: Sequence[int] | None,
        keep: Part | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the losses and predictions of tasks of one size."""
        x, y, ways = group.x, group.y, group.ways
        if self.vectorized and seeds is None:
            # Weights that no task changed are one tensor, expanded: vmap need not batch them,
            # unless their gradient is asked for by task.
            shared = [
                not adapted and value.stride(0) == 0
                for adapted, value in zip(self.is_adapted, stacked, strict=True)
            ]
            with self._kept(keep, *group.rows):
                return for_all_tasks(partial(self.task, ways=ways), stacked, shared, x, y)
        rows = zip(*(value.unbind(0) for value in stacked), strict=True)
        results = []
        with TaskRules():
            for place, row in enumerate(rows):
                own = map_inputs(partial(Tensor.select, dim=0, index=place), x)
                draws = nullcontext() if seeds is None else stream(seeds[place], self.device)
                with draws, self._kept(keep, group.rows[place]):
                    results.append(self.task(row, own, y[place], ways))
        losses, predictions = zip(*results, strict=True)
        return torch.stack(losses), torch.stack(predictions)

    def _kept(self, part: Part | None, *rows: int) -> AbstractContextManager[None]:
        """Inside, one forward pass of these tasks runs; its features may be kept for the next."""
        if self.features is None or part is None:
            return nullcontext()
        return self.features.examples((part, rows))
