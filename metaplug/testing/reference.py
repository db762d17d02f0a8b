"""The algorithms once more, as plainly as possible: one task after the other, nothing stacked.

Nothing here is shared with metaplug, so that agreement means something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaplug.contract.task_batch import TaskBatch

Loss = Callable[[Tensor, Tensor], Tensor]
"""(prediction, target) of one task → ()."""


@dataclass
class Reference:
    """Results of a plain loop: meta-gradients by name, the outer loss, each task's weights."""

    gradients: dict[str, Tensor]
    outer_loss: Tensor
    adapted: list[dict[str, Tensor]]
    extra: dict[str, Any] = field(default_factory=dict)


def predict(model: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The model's output with these weights, in its own mode; its buffers stay as they are."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    names = {id(tensor): name for name, tensor in tensors}
    given = {**{name: buffer.clone() for name, buffer in model.named_buffers()}, **weights}
    # Every place once: torch itself leaves a module that stands at two places without parameters.
    places = {
        f"{path}.{key}" if path else key: given[names[id(tensor)]]
        for path, module in model.named_modules()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and names[id(tensor)] in given
    }
    prediction: Tensor = torch.func.functional_call(model, places, (x,), tie_weights=False)
    return prediction


@dataclass
class Sgd:
    """θ ← θ − α b, with b the momentum buffer over g + weight_decay θ: torch.optim.SGD's rule."""

    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    buffer: Tensor | None = None

    def __call__(self, weight: Tensor, gradient: Tensor, lr: float | Tensor) -> Tensor:
        """The weight after one step, differentiable."""
        gradient = gradient + self.weight_decay * weight
        if self.momentum:
            if self.buffer is None:
                self.buffer = gradient
            else:
                self.buffer = self.momentum * self.buffer + (1 - self.dampening) * gradient
            gradient = gradient + self.momentum * self.buffer if self.nesterov else self.buffer
        return weight - lr * gradient


@dataclass
class Adam:
    """Kingma and Ba 2015, algorithm 1."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    steps: int = 0
    first: Tensor | float = 0.0
    second: Tensor | float = 0.0

    def __call__(self, weight: Tensor, gradient: Tensor, lr: float | Tensor) -> Tensor:
        """The weight after one step, differentiable."""
        gradient = gradient + self.weight_decay * weight
        self.steps += 1
        self.first = self.betas[0] * self.first + (1 - self.betas[0]) * gradient
        self.second = self.betas[1] * self.second + (1 - self.betas[1]) * gradient**2
        first = self.first / (1 - self.betas[0] ** self.steps)
        second = self.second / (1 - self.betas[1] ** self.steps)
        return weight - lr * first / (second.sqrt() + self.eps)


@dataclass
class RmsProp:
    """θ ← θ − α g / (√v + ε), v a running mean of g², or, centred, of its variance.

    With momentum, θ moves by the buffer of these steps.
    """

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False
    second: Tensor | float = 0.0
    first: Tensor | float = 0.0
    buffer: Tensor | float = 0.0

    def __call__(self, weight: Tensor, gradient: Tensor, lr: float | Tensor) -> Tensor:
        """The weight after one step, differentiable."""
        self.second = variance = self.alpha * self.second + (1 - self.alpha) * gradient**2
        if self.centered:
            self.first = self.alpha * self.first + (1 - self.alpha) * gradient
            variance = self.second - self.first**2
        self.buffer = self.momentum * self.buffer + gradient / (variance.sqrt() + self.eps)
        return weight - lr * self.buffer


def maml(
    model: nn.Module,
    batch: TaskBatch,
    *,
    steps: int,
    lr: float | Tensor,
    order: int = 2,
    loss: Loss = F.cross_entropy,
    rule: Callable[[], Any] = Sgd,
    adapted: Sequence[str] | None = None,
) -> Reference:
    """MAML, task by task.

    Args:
        order: 2, or 1 for inner gradients that are constants to the meta-gradient.
        rule: makes the inner update of one tensor: (weight, gradient, learning rate) → weight.
        adapted: names of what the inner loop moves; default: everything trainable.
    """
    given: dict[str, Any] = {"order": order, "loss": loss, "rule": rule, "adapted": adapted}
    return loop(model, batch, steps=steps, rate=lambda k, name: lr, **given)


def loop(
    model: nn.Module,
    batch: TaskBatch,
    *,
    steps: int,
    rate: Callable[[int, str], float | Tensor],
    outer_weights: Sequence[float] | None = None,
    order: int = 2,
    adapted: Collection[str] | None = None,
    values: Callable[[int], Mapping[str, Tensor]] | None = None,
    inner: Callable[..., Tensor] | None = None,
    transform: Callable[[int, str, Tensor], Tensor] | None = None,
    extra: Mapping[str, Tensor] | None = None,
    loss: Loss = F.cross_entropy,
    rule: Callable[[], Any] = Sgd,
) -> Reference:
    """The inner and outer loop with everything that the family changes in it, task by task.

    Args:
        rate: (k, name) → the learning rate of a tensor in step k.
        outer_weights: K weights of the query losses after each update; default: the last counts.
        values: k → weights by name that replace the model's in every forward pass of step k and
            in the query pass after it.
        inner: (support loss, fast weights, first weights, prediction, target) → the loss that the
            inner gradient is taken of.
        transform: (k, name, gradient) → the gradient that is used.
        extra: leaf tensors by name, whose meta-gradients are wanted too.
        rule: as for `maml`.
    """
    parameters = dict(model.named_parameters())
    trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
    moved = [name for name in trainable if adapted is None or name in adapted]
    outer_weights = [0.0] * (steps - 1) + [1.0] if outer_weights is None else outer_weights
    outer_losses, results = [], []
    for x, y, query_x, query_y in zip(
        batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True
    ):
        weights: dict[str, Tensor] = dict(parameters)
        rules = {name: rule() for name in moved}
        outer = torch.zeros(()) if steps else loss(predict(model, weights, query_x), query_y)
        for k in range(steps):
            own: Mapping[str, Tensor] = {} if values is None else values(k)
            prediction = predict(model, {**weights, **own}, x)
            objective = loss(prediction, y)
            if inner is not None:
                objective = inner(objective, weights, parameters, prediction, y)
            wanted = [weights[name] for name in moved]
            for name, gradient in zip(moved, _grad(objective, wanted, order == 2), strict=True):
                if gradient is not None:
                    used = gradient if transform is None else transform(k, name, gradient)
                    weights[name] = rules[name](weights[name], used, rate(k, name))
            if outer_weights[k]:
                prediction = predict(model, {**weights, **own}, query_x)
                outer = outer + outer_weights[k] * loss(prediction, query_y)
        outer_losses.append(outer)
        results.append(weights)
    wanted_by_name = {**{name: parameters[name] for name in trainable}, **(extra or {})}
    return _reference(outer_losses, wanted_by_name, results)


def gradient_sharing(
    model: nn.Module,
    batch: TaskBatch,
    *,
    steps: int,
    lr: float | Tensor,
    gate: Tensor,
    momentum: Tensor,
    running: Sequence[Tensor] | None = None,
    order: int = 2,
    loss: Loss = F.cross_entropy,
) -> Reference:
    """Gradient sharing with unit normalisation over all parameters; all tasks in lock-step.

    Args:
        gate, momentum: K logits each, as leaf tensors that receive meta-gradients.
        running: K stored means, flat; None before the first batch.
    """
    parameters = dict(model.named_parameters())
    sizes = [parameter.numel() for parameter in parameters.values()]
    fast: list[dict[str, Tensor]] = [dict(parameters) for _ in range(batch.num_tasks)]
    stored = []
    for k in range(steps):
        flat = []
        for weights, x, y in zip(fast, batch.support_x, batch.support_y, strict=True):
            objective = loss(predict(model, weights, x), y)
            gradients = torch.autograd.grad(
                objective, list(weights.values()), create_graph=order == 2
            )
            flat.append(torch.cat([gradient.flatten() for gradient in gradients]))
        lengths = [torch.linalg.vector_norm(gradient) for gradient in flat]
        units = [gradient / length for gradient, length in zip(flat, lengths, strict=True)]
        mean = torch.stack(units).sum(0) / len(flat)
        m, weight = 1 / (1 + torch.exp(-momentum[k])), 1 / (1 + torch.exp(-gate[k]))
        shared = mean if running is None else m * running[k] + (1 - m) * mean
        stored.append(shared.detach())
        for weights, gradient, length in zip(fast, flat, lengths, strict=True):
            direction = (1 - weight) * gradient + weight * length * shared
            for name, piece in zip(parameters, direction.split(sizes), strict=True):
                weights[name] = weights[name] - lr * piece.view_as(parameters[name])
    losses = [
        loss(predict(model, weights, x), y)
        for weights, x, y in zip(fast, batch.query_x, batch.query_y, strict=True)
    ]
    own = {"gradient-sharing.gate": gate, "gradient-sharing.momentum": momentum}
    return _reference(losses, {**parameters, **own}, fast, running=stored)


def logit(weight: float) -> float:
    """σ⁻¹: what a sigmoid maps to `weight`, strictly between 0 and 1."""
    return math.log(weight / (1 - weight))


def _grad(loss: Tensor, wanted: Sequence[Tensor], graph: bool = False) -> Sequence[Tensor | None]:
    return torch.autograd.grad(loss, wanted, create_graph=graph, allow_unused=True)


def _reference(
    losses: list[Tensor],
    wanted: Mapping[str, Tensor],
    weights: list[dict[str, Tensor]],
    **extra: Any,
) -> Reference:
    outer_loss = torch.stack(losses).mean()
    gradients = zip(wanted, _grad(outer_loss, list(wanted.values())), strict=True)
    named = {name: gradient for name, gradient in gradients if gradient is not None}
    adapted = [{name: weight.detach() for name, weight in each.items()} for each in weights]
    return Reference(named, outer_loss.detach(), adapted, extra)
