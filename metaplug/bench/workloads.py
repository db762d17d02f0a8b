"""The meta-steps that are measured: a model, a number of tasks, a length of the inner loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from metaplug.bench.meters import CPU
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.values import Kind
from metaplug.models.conv4 import Conv4
from metaplug.models.mlp import Mlp
from metaplug.models.resnet12 import ResNet12


@dataclass(frozen=True)
class Workload:
    """One meta-step: which model, how many tasks, how long the inner loop."""

    name: str
    model: str
    tasks: int
    inner_steps: int
    inner_lr: float
    kind: Kind
    shots: int
    queries: int

    def build(self, device: torch.device = CPU) -> tuple[nn.Module, TaskBatch]:
        """Return the model and a batch of random tasks: the same numbers on every device."""
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = MODELS[self.model]().to(device)
        sizes = (self.shots, self.queries)
        if self.kind == "regression":
            support_x, support_y, query_x, query_y = (
                torch.randn(self.tasks, n, 1, generator=generator) for n in sizes for _ in "xy"
            )
        else:
            support_x, query_x = (
                torch.rand(self.tasks, 5 * n, 1, 28, 28, generator=generator) for n in sizes
            )
            support_y, query_y = (
                torch.arange(5).repeat_interleave(n).repeat(self.tasks, 1) for n in sizes
            )
        return model, TaskBatch(support_x, support_y, query_x, query_y).to(device)


def _layer_norm_mlp() -> nn.Module:
    """The sinusoid network with layer norm, which goes wrong if differentiated inside vmap."""
    first, second = ([nn.Linear(n, 40), nn.LayerNorm(40), nn.ReLU()] for n in (1, 40))
    return nn.Sequential(*first, *second, nn.Linear(40, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: Mlp((1,), 1),
    "layernorm-mlp": _layer_norm_mlp,
    "conv4-32-stride": lambda: Conv4((1, 28, 28), 5, filters=32, pooling="stride"),
    "conv4-64-max": lambda: Conv4((1, 28, 28), 5, filters=64, pooling="max"),
    "resnet12": lambda: ResNet12((1, 28, 28), 5),
}
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("sinusoid-25x1", "mlp", 25, 1, 0.01, "regression", 10, 10),
        Workload("sinusoid-25x5", "mlp", 25, 5, 0.01, "regression", 10, 10),
        Workload("sinusoid-100x5", "mlp", 100, 5, 0.01, "regression", 10, 10),
        Workload("layernorm-8x5", "layernorm-mlp", 8, 5, 0.01, "regression", 10, 10),
        Workload("conv4-32-stride-8x3", "conv4-32-stride", 8, 3, 0.4, "classification", 1, 5),
        Workload("conv4-32-stride-32x3", "conv4-32-stride", 32, 3, 0.4, "classification", 1, 1),
        Workload("conv4-64-max-8x5", "conv4-64-max", 8, 5, 0.4, "classification", 1, 5),
        Workload("conv4-64-max-16x5", "conv4-64-max", 16, 5, 0.4, "classification", 1, 1),
        Workload("conv4-64-max-32x5", "conv4-64-max", 32, 5, 0.4, "classification", 1, 1),
        Workload("resnet12-4x1", "resnet12", 4, 1, 0.1, "classification", 1, 1),
    )
}
"""By name; "25x5" is 25 tasks and 5 inner steps."""

ONLY_BY_NAME_ON_A_CPU = ("conv4-64-max-32x5",)
"""Takes minutes on a CPU, so it is measured there only when asked for."""
