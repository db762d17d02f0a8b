"""The meta-steps that are measured: a model, a number of tasks, a length of the inner loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from metaplug.bench.encoder import TOKENS, VOCABULARY, Encoder, with_adapters
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
    inputs: Literal["numbers", "images", "tokens"]
    shots: int
    queries: int

    @property
    def kind(self) -> Kind:
        """What is learned: numbers from numbers, or one of five classes."""
        return "regression" if self.inputs == "numbers" else "classification"

    def build(self, device: torch.device = CPU) -> tuple[nn.Module, TaskBatch]:
        """Return the model and a batch of random tasks: the same numbers on every device."""
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = MODELS[self.model]().to(device)
        sizes = (self.shots, self.queries)
        if self.inputs == "numbers":
            numbers = [(self.tasks, n, 1) for n in sizes for _ in "xy"]
            drawn = (torch.randn(form, generator=generator) for form in numbers)
            return model, TaskBatch(*drawn).to(device)
        if self.inputs == "images":
            images = [(self.tasks, 5 * n, 1, 28, 28) for n in sizes]
            support_x, query_x = (torch.rand(form, generator=generator) for form in images)
        else:
            texts = [(self.tasks, 5 * n, TOKENS) for n in sizes]
            support_x, query_x = (
                torch.randint(VOCABULARY, form, generator=generator) for form in texts
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
    "attention": lambda: Encoder(128, layers=2, heads=2),
    "lora": lambda: with_adapters(Encoder(384, layers=6, heads=12), rank=4),
}
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("sinusoid-25x1", "mlp", 25, 1, 0.01, "numbers", 10, 10),
        Workload("sinusoid-25x5", "mlp", 25, 5, 0.01, "numbers", 10, 10),
        Workload("sinusoid-100x5", "mlp", 100, 5, 0.01, "numbers", 10, 10),
        Workload("layernorm-8x5", "layernorm-mlp", 8, 5, 0.01, "numbers", 10, 10),
        Workload("conv4-32-stride-8x3", "conv4-32-stride", 8, 3, 0.4, "images", 1, 5),
        Workload("conv4-32-stride-32x3", "conv4-32-stride", 32, 3, 0.4, "images", 1, 1),
        Workload("conv4-64-max-8x5", "conv4-64-max", 8, 5, 0.4, "images", 1, 5),
        Workload("conv4-64-max-16x5", "conv4-64-max", 16, 5, 0.4, "images", 1, 1),
        Workload("conv4-64-max-32x5", "conv4-64-max", 32, 5, 0.4, "images", 1, 1),
        Workload("resnet12-4x1", "resnet12", 4, 1, 0.1, "images", 1, 1),
        Workload("attention-8x3", "attention", 8, 3, 0.05, "tokens", 1, 1),
        Workload("lora-4x3", "lora", 4, 3, 0.05, "tokens", 1, 1),
    )
}
"""By name; "25x5" is 25 tasks and 5 inner steps."""

ONLY_BY_NAME_ON_A_CPU = ("conv4-64-max-32x5", "lora-4x3")
"""Take minutes on a CPU, so they are measured there only when asked for."""
