"""The bilevel loop once more, as plainly as possible: one task after the other, nothing padded."""

import copy
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaplug import TaskBatch


def sgd():
    return lambda weight, gradient, lr: weight - lr * gradient


def momentum():
    """torch.optim.SGD(momentum=0.9)."""
    kept = []

    def update(weight, gradient, lr):
        kept[:] = [0.9 * kept[0] + gradient if kept else gradient]
        return weight - lr * kept[0]

    return update


def adam():
    """Kingma and Ba 2015, algorithm 1; an entry that never had a gradient stays."""
    first, second, count = [0.0], [0.0], [0]

    def update(weight, gradient, lr):
        count[0] += 1
        first[0] = 0.9 * first[0] + 0.1 * gradient
        second[0] = 0.999 * second[0] + 0.001 * gradient**2
        none = second[0] == 0
        root = torch.where(none, 1.0, second[0] / (1 - 0.999 ** count[0])).sqrt()
        step = torch.where(none, 0.0, first[0] / (1 - 0.9 ** count[0]) / (root + 1e-8))
        return weight - lr * step

    return update


RULES = {"sgd": sgd, "momentum": momentum, "adam": adam}
"""Makers of the update of one tensor: (weight, gradient, learning rate) → weight."""

OPTIMIZERS = {
    "sgd": {},
    "momentum": {"inner_optimizer": "sgd", "inner_optimizer_settings": {"momentum": 0.9}},
    "adam": {"inner_optimizer": "adam"},
}
"""The settings of MetaLearner for the same."""


def predict(model, weights, x):
    """The model's answer with these weights, its logits where it answers with an object."""
    positional, named = (
        ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,), {})
    )
    answer = torch.func.functional_call(model, weights, positional, named)
    return answer if isinstance(answer, torch.Tensor) else answer.logits


def one(task):
    """The examples of a batch of one task, without its axis: support x, y, query x, y."""
    return [
        {name: value[0] for name, value in part.items()}
        if isinstance(part, dict)
        else tuple(value[0] for value in part)
        if isinstance(part, tuple)
        else part[0]
        for part in (task.support_x, task.support_y, task.query_x, task.query_y)
    ]


def loop(
    model,
    tasks,
    *,
    order=2,
    steps=2,
    lr=0.3,
    loss=F.cross_entropy,
    rule=sgd,
    adapted=None,
    ways=None,
    predict=predict,
):
    """Adapt each task, and differentiate the mean of their query losses.

    Args:
        tasks: batches of one task each, or one batch of all.
        adapted: names of what the inner loop moves; default: everything trainable.
        ways: of each task; its loss sees no further outputs.
        predict: (model, weights, x) → the prediction.
    """
    if isinstance(tasks, TaskBatch):
        tasks = [tasks.tasks(slice(row, row + 1)) for row in range(tasks.num_tasks)]
    model = copy.deepcopy(model)
    named = dict(model.named_parameters())
    trained = [name for name, weight in named.items() if weight.requires_grad]
    moved = trained if adapted is None else [name for name in trained if name in adapted]
    results = []
    with sdpa_kernel(SDPBackend.MATH):
        for task, own in zip(tasks, ways or [None] * len(tasks), strict=True):
            x, y, query_x, query_y = one(task)
            fast, rules, losses = dict(named), {name: rule() for name in moved}, []
            for _ in range(steps):
                losses.append(loss(predict(model, fast, x)[:, :own], y))
                taken = torch.autograd.grad(
                    losses[-1],
                    [fast[name] for name in moved],
                    create_graph=order == 2,
                    allow_unused=True,
                )
                for name, gradient in zip(moved, taken, strict=True):
                    if gradient is not None:
                        fast[name] = rules[name](fast[name], gradient, lr)
            prediction = predict(model, fast, query_x)
            losses.append(loss(prediction[:, :own], query_y))
            results.append(SimpleNamespace(weights=fast, losses=losses, prediction=prediction))
        outer = torch.stack([each.losses[-1] for each in results]).mean()
        taken = torch.autograd.grad(outer, [named[name] for name in trained], allow_unused=True)
    pairs = zip(trained, taken, strict=True)
    gradients = {name: each for name, each in pairs if each is not None}
    return SimpleNamespace(tasks=results, outer=outer.detach(), gradients=gradients)


def off(ours, exact):
    """The relative error of meta-gradients as one vector; one that is missing counts as zero."""
    names = {*ours, *exact}
    assert all(ours[name].shape == exact[name].shape for name in {*ours} & {*exact})
    wrong = sum((ours.get(name, 0) - exact.get(name, 0)).square().sum() for name in names)
    return float((wrong / sum(each.square().sum() for each in exact.values())).sqrt())
