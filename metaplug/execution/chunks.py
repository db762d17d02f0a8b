"""Meta-gradients of a batch from a few of its tasks at a time: the memory of those few."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metaplug.contract.task_batch import TaskBatch
from metaplug.core.outer_loop import MetaGradients
from metaplug.execution.engine import Engine


class ChunkedDerivation:
    """Derives meta-gradients as `Engine.derive` does, `chunk_size` tasks at a time.

        G = Σ over chunks c of n_c / T · G_c        n_c of the T tasks; kept statistics alike

    For plugins that do not couple tasks.

    Args:
        engine: whose derivation it is.
        chunk_size: tasks that are computed together, at least 1.
    """

    def __init__(self, engine: Engine, chunk_size: int) -> None:
        self.engine, self.chunk_size = engine, chunk_size

    def __call__(
        self, batch: TaskBatch, iteration: int, total: int, weights: Mapping[int, float]
    ) -> MetaGradients:
        """Return the meta-gradients of the batch; how its tasks were adapted is not kept."""
        tasks = batch.num_tasks
        gradients: dict[str, Tensor] = {}
        statistics: dict[str, dict[str, Tensor]] = {}
        sums: dict[str, Tensor] = {}
        for begin in range(0, tasks, self.chunk_size):
            if (watch := self.engine.chain.watch) is not None:
                watch.offset = begin
            chunk = batch.tasks(slice(begin, begin + self.chunk_size))
            found = self.engine.derive(chunk, iteration, total, weights)
            share = chunk.num_tasks / tasks
            _add(gradients, found.gradients, share)
            for plugin, kept in found.statistics.items():
                _add(statistics.setdefault(plugin, {}), kept, share)
            _add(sums, {"outer_loss": found.outer_loss, "losses": found.losses}, share)
        order = self.engine.meta_parameters
        ordered = {name: gradients[name] for name in order if name in gradients}
        return MetaGradients(ordered, **sums, statistics=statistics, outcome=None)


def _add(sums: dict[str, Tensor], values: Mapping[str, Tensor], share: float) -> None:
    for name, value in values.items():
        if name in sums:
            sums[name] = torch.add(sums[name], value, alpha=share)
        else:
            sums[name] = share * value
