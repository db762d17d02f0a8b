"""Small models with every kind of layer that is hard for a differentiable inner loop, and batches of tasks for them."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from metaplug import MetaLearner, TaskBatch

CLASSES = 3
FEATURES = 4
IMAGE = (1, 8, 8)


class Tied(nn.Module):
    """An encoder whose weight decodes as well: one parameter under two names, and read without calling its module."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(FEATURES, 5)
        self.decode = nn.Linear(FEATURES, 5, bias=False)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        hidden = torch.tanh(self.encode(x)) + self.decode(x)
        return self.head(F.linear(hidden, self.encode.weight.T))


def _conv(layers, channels, size):
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size, CLASSES))


def _conv4():
    """conv4 as few-shot papers have it, with 4 filters: convolution, batch norm, ReLU, stride 2."""
    layers = []
    for index in range(4):
        layers += [nn.Conv2d(1 if index == 0 else 4, 4, 3, stride=2 if index < 2 else 1, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    return _conv(layers, 4, 4)


MODELS = {
    "tanh": lambda: nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES)),
    "softplus": lambda: nn.Sequential(nn.Linear(FEATURES, 5), nn.Softplus(), nn.Linear(5, 5), nn.Softplus(), nn.Linear(5, CLASSES)),
    "batch-norm": lambda: nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, CLASSES)),
    "layer-norm": lambda: nn.Sequential(nn.Linear(FEATURES, 6), nn.LayerNorm(6), nn.Softplus(), nn.Linear(6, CLASSES)),
    "group-norm": lambda: nn.Sequential(nn.Linear(FEATURES, 6), nn.GroupNorm(2, 6), nn.Tanh(), nn.Linear(6, CLASSES)),
    "tied": Tied,
    "max-pool": lambda: _conv([nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)], 3, 16),
    "conv4": _conv4,
}
SMOOTH = ("tanh", "softplus", "batch-norm", "layer-norm", "group-norm", "tied")
"""Those without kinks, on which finite differences and limits are exact."""


@dataclass
class Problem:
    """A model in float64, and tasks for it."""

    model: nn.Module
    batch: TaskBatch
    lr: float = 0.3
    steps: int = 2

    def learner(self, **settings):
        """A learner over a copy of the model, so that several can be compared."""
        settings = {"inner_lr": self.lr, "inner_steps": self.steps, **settings}
        return MetaLearner(copy.deepcopy(self.model), **settings)


def problem(name="tanh", *, tasks=3, support=5, query=4, lr=0.3, steps=2, seed=0, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[name]().to(dtype)
        shape = IMAGE if name in ("max-pool", "conv4") else (FEATURES,)
        x = [torch.randn(tasks, count, *shape, dtype=dtype) for count in (support, query)]
        y = [torch.randint(CLASSES, (tasks, count)) for count in (support, query)]
    return Problem(model, TaskBatch(x[0], y[0], x[1], y[1]), lr, steps)


def regression(*, tasks=3, support=5, query=4, features=2, outputs=2, lr=0.1, steps=2, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
        tensors = [torch.randn(tasks, count, width).double() for count in (support, query) for width in (features, outputs)]
    return Problem(model, TaskBatch(*tensors), lr, steps)


def found(learner, batch):
    """The engine's own account of one meta-iteration on `batch`: meta-gradients, outer loss and outcome; nothing is updated."""
    if learner.batching is None:
        learner.meta_gradients(batch)
    return learner.engine.meta_gradients(batch, learner.iteration, learner.engine.total)


def adapted(learner, batch):
    """The adapted weights of one meta-iteration, detached, (T, *shape) by name."""
    return {name: weight.detach() for name, weight in found(learner, batch).outcome.adapted_parameters.items()}


def assert_close(actual, expected, *, rtol=1e-10, atol=1e-11):
    """Two mappings (or tensors) are equal up to the tolerances; float64 rounding over a few inner steps unless a test says otherwise."""
    if isinstance(expected, dict):
        assert dict(actual).keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    else:
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


class Stream:
    """A TaskStream over tasks of one problem: task (iteration, index) is drawn from its own seed."""

    def __init__(self, name="tanh", *, split="train", support=5, query=4, dtype=torch.float64):
        self.name, self.split, self.support, self.query, self.dtype = name, split, support, query, dtype

    def batch(self, iteration, indices):
        tasks = [
            problem(
                self.name,
                tasks=1,
                support=self.support,
                query=self.query,
                seed=1000 * iteration + index + len(self.split),
                dtype=self.dtype,
            )
            for index in indices
        ]
        fields = ("support_x", "support_y", "query_x", "query_y")
        return TaskBatch(*(torch.cat([getattr(task.batch, field) for task in tasks]) for field in fields))
