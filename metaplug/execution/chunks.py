"""Meta-gradients of a batch from a few of its tasks at a time: the memory of those few."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metaplug.contract.task_batch import TaskBatch
from metaplug.execution.engine import Engine, MetaGradients


class ChunkedDerivation:
    """Derives meta-gradients as `Engine.derive` does, `chunk_size` tasks at a time. For plugins that do not couple tasks.

        G = Σ over chunks c of n_c / T · G_c        n_c of the T tasks; statistics that plugins keep alike

    Args:
        engine: whose derivation it is.
        chunk_size: tasks that are computed together, at least 1.
    """

    def __init__(self, engine: Engine, chunk_size: int) -> None:
        self.engine, self.chunk_size = engine, chunk_size

    def __call__(
        self, batch: TaskBatch, iteration: int, total: int, weights: Mapping[int, float]
    ) -> MetaGradients:
        """The meta-gradients of the batch; how its tasks were adapted is not kept."""
        tasks = batch.num_tasks
        gradients: dict[str, Tensor] = {}
        statistics: dict[str, dict[str, Tensor]] = {}
        sums: list[Tensor] = []
        for begin in range(0, tasks, self.chunk_size):
            rows = slice(begin, begin + self.chunk_size)
            if (watch := self.engine.chain.watch) is not None:
                watch.offset = begin
            chunk = TaskBatch(
                batch.support_x[rows],
                batch.support_y[rows],
                batch.query_x[rows],
                batch.query_y[rows],
            )
            found, share = (
                self.engine.derive(chunk, iteration, total, weights),
                chunk.num_tasks / tasks,
            )
            _add(gradients, found.gradients, share)
            for plugin, kept in found.statistics.items():
                _add(statistics.setdefault(plugin, {}), kept, share)
            values = [share * found.outer_loss, share * found.losses]
            sums = (
                values
                if not sums
                else [one + other for one, other in zip(sums, values, strict=True)]
            )
        ordered = {
            name: gradients[name] for name in self.engine.meta_parameters if name in gradients
        }
        return MetaGradients(ordered, sums[0], sums[1], statistics, None)


def _add(sums: dict[str, Tensor], values: Mapping[str, Tensor], share: float) -> None:
    for name, value in values.items():
        sums[name] = (
            share * value if name not in sums else torch.add(sums[name], value, alpha=share)
        )
