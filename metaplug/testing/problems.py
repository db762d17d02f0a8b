"""Small models with every layer that is hard for a differentiable inner loop, and their tasks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.values import Kind
from metaplug.errors import unknown
from metaplug.learner import MetaLearner

CLASSES = 3
FEATURES = 4
IMAGE = (1, 8, 8)
_IMAGES = ("max-pool", "conv4")


class Tied(nn.Module):
    """An encoder whose weight decodes too: one parameter, two names, read outside its module."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(FEATURES, 5)
        self.decode = nn.Linear(FEATURES, 5, bias=False)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(n, FEATURES) → (n, CLASSES)."""
        hidden = torch.tanh(self.encode(x)) + self.decode(x)
        logits: Tensor = self.head(F.linear(hidden, self.encode.weight.T))
        return logits


def _perceptron(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 6), *layers, nn.Linear(6, CLASSES))


def _conv(layers: list[nn.Module], features: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, CLASSES))


def _conv4() -> nn.Module:
    """conv4 as few-shot papers have it, with 4 filters: convolution, batch norm, ReLU, stride 2."""
    layers: list[nn.Module] = []
    for channels, stride in ((1, 2), (4, 2), (4, 1), (4, 1)):
        convolution = nn.Conv2d(channels, 4, 3, stride=stride, padding=1)
        layers += [convolution, nn.BatchNorm2d(4), nn.ReLU()]
    return _conv(layers, 16)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: _perceptron(nn.Tanh()),
    "softplus": lambda: nn.Sequential(
        nn.Linear(FEATURES, 5), nn.Softplus(), nn.Linear(5, 5), nn.Softplus(), nn.Linear(5, CLASSES)
    ),
    "batch-norm": lambda: _perceptron(nn.BatchNorm1d(6), nn.Tanh()),
    "layer-norm": lambda: _perceptron(nn.LayerNorm(6), nn.Softplus()),
    "group-norm": lambda: _perceptron(nn.GroupNorm(2, 6), nn.Tanh()),
    "tied": Tied,
    "max-pool": lambda: _conv([nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)], 48),
    "conv4": _conv4,
    "regression": lambda: _regressor(2, 2),
}
"""Makers of small models, by name: all classify, except "regression"."""

CLASSIFIERS = tuple(name for name in MODELS if name != "regression")
"""The names of those that classify."""

KINKED = ("max-pool", "conv4")
"""Those with kinks, on which finite differences and limits may be inexact."""

SMOOTH = tuple(name for name in CLASSIFIERS if name not in KINKED)
"""The classifiers without kinks."""

WITH_BATCH_NORM = ("batch-norm", "conv4")
"""Those with batch norm layers."""


@dataclass
class Problem:
    """A model and tasks for it.

    Attributes:
        model: in the dtype of the tasks, float64 unless another was asked for.
        batch: T tasks.
        lr, steps: the inner learning rate, and the number of inner steps.
        kind: "classification" or "regression".
        name: of the model in MODELS; empty for another one.
        seed: that it was drawn from.
    """

    model: nn.Module
    batch: TaskBatch
    lr: float = 0.3
    steps: int = 2
    kind: Kind = "classification"
    name: str = ""
    seed: int = 0

    def learner(self, **settings: Any) -> MetaLearner:
        """Make a learner over a copy of the model. `settings` are those of MetaLearner.

        What its plugins draw when they are set up follows the seed, so two learners start alike.
        """
        settings = {"inner_lr": self.lr, "inner_steps": self.steps, "kind": self.kind, **settings}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return MetaLearner(copy.deepcopy(self.model), **settings)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same in another floating dtype."""
        batch = self.batch.map(lambda each: each.to(dtype) if each.is_floating_point() else each)
        return replace(self, model=copy.deepcopy(self.model).to(dtype), batch=batch)

    def __str__(self) -> str:
        tasks, steps = (
            f"{count} {word}{'s' * (count != 1)}"
            for count, word in ((self.batch.num_tasks, "task"), (self.steps, "inner step"))
        )
        support, query = self.batch.support_x.shape[1], self.batch.query_x.shape[1]
        return (
            f"model {self.name or type(self.model).__name__}, {tasks} of {support} support and "
            f"{query} query examples, {steps} of rate {self.lr:g}, seed {self.seed}"
        )


def problem(
    name: str = "mlp",
    *,
    tasks: int = 3,
    support: int = 5,
    query: int = 4,
    lr: float = 0.3,
    steps: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Make a model of MODELS with random weights, and random tasks for it.

    Args:
        tasks, support, query: T, and the examples of a task; at least 3 for batch norm, which is a
            step function over two.
        lr, steps: of the inner loop.
        seed: of weights and tasks; torch's own random numbers are left as they are.
        dtype: of weights and inputs.

    Raises:
        RequestError: no model of that name.
    """
    if name == "regression":
        sizes = {"tasks": tasks, "support": support, "query": query, "steps": steps, "seed": seed}
        return regression(lr=lr, dtype=dtype, **sizes)
    if name not in MODELS:
        raise unknown("model of metaplug.testing", name, MODELS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name]().to(dtype)
        shape = IMAGE if name in _IMAGES else (FEATURES,)
        x = [torch.randn(tasks, count, *shape, dtype=dtype) for count in (support, query)]
        y = [torch.randint(CLASSES, (tasks, count)) for count in (support, query)]
    batch = TaskBatch(x[0], y[0], x[1], y[1])
    return Problem(model, batch, lr, steps, "classification", name, seed)


def regression(
    *,
    tasks: int = 3,
    support: int = 5,
    query: int = 4,
    features: int = 2,
    outputs: int = 2,
    lr: float = 0.1,
    steps: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Make a perceptron from `features` to `outputs` numbers, and random tasks, as `problem`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _regressor(features, outputs).to(dtype)
        tensors = [
            torch.randn(tasks, count, width).to(dtype)
            for count in (support, query)
            for width in (features, outputs)
        ]
    return Problem(model, TaskBatch(*tensors), lr, steps, "regression", "regression", seed)


def _regressor(features: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, outputs))


@dataclass(eq=False)
class Stream:
    """A TaskStream over tasks of one model of MODELS, each drawn from a seed of its own.

    Args:
        name: in MODELS.
        split: streams of splits of unlike length differ.
        support, query, dtype: as for `problem`.
    """

    name: str = "mlp"
    split: str = "train"
    support: int = 5
    query: int = 4
    dtype: torch.dtype = torch.float64

    def batch(self, iteration: int, indices: Sequence[int]) -> TaskBatch:
        """The tasks of these indices."""
        sizes = {"tasks": 1, "support": self.support, "query": self.query}
        seeds = [1000 * iteration + index + len(self.split) for index in indices]
        drawn = [problem(self.name, seed=seed, dtype=self.dtype, **sizes) for seed in seeds]
        return TaskBatch.stack([each.batch for each in drawn])
