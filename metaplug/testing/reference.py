"""The algorithms once more, as plainly as they can be written: one task after the other, `torch.autograd.grad` over `functional_call`.

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
    """What a plain loop found: meta-gradients by name, the outer loss, and each task's adapted weights."""

    gradients: dict[str, Tensor]
    outer_loss: Tensor
    adapted: list[dict[str, Tensor]]
    extra: dict[str, Any] = field(default_factory=dict)


def predict(model: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The model's output with these weights, in the mode that the model is in; its buffers stay as they are."""
    names = {
        id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    given = {**{name: buffer.clone() for name, buffer in model.named_buffers()}, **weights}
    # Every place once: where torch ties weights itself, it leaves a module that stands at two places without its parameters.
    places = {
        f"{path}.{key}" if path else key: given[names[id(tensor)]]
        for path, module in model.named_modules()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and names[id(tensor)] in given
    }
    prediction: Tensor = torch.func.functional_call(model, places, (x,), tie_weights=False)
    return prediction


class Sgd:
    """θ ← θ − α b, with b the momentum buffer over g + weight_decay θ: torch.optim.SGD's rule."""

    def __init__(
        self,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        self.momentum, self.dampening, self.weight_decay, self.nesterov = (
            momentum,
            dampening,
            weight_decay,
            nesterov,
        )
        self.buffer: Tensor | None = None

    def __call__(self, weight: Tensor, gradient: Tensor, lr: float | Tensor) -> Tensor:
        """The weight after one step, differentiable."""
        gradient = gradient + self.weight_decay * weight
        if self.momentum:
            self.buffer = (
                gradient
                if self.buffer is None
                else self.momentum * self.buffer + (1 - self.dampening) * gradient
            )
            gradient = gradient + self.momentum * self.buffer if self.nesterov else self.buffer
        return weight - lr * gradient


class Adam:
    """Kingma and Ba 2015, algorithm 1."""

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.steps, self.first, self.second = 0, torch.zeros(()), torch.zeros(())

    def __call__(self, weight: Tensor, gradient: Tensor, lr: float | Tensor) -> Tensor:
        """The weight after one step, differentiable."""
        gradient = gradient + self.weight_decay * weight
        self.steps += 1
        self.first = self.betas[0] * self.first + (1 - self.betas[0]) * gradient
        self.second = self.betas[1] * self.second + (1 - self.betas[1]) * gradient**2
        first = self.first / (1 - self.betas[0] ** self.steps)
        second = self.second / (1 - self.betas[1] ** self.steps)
        return weight - lr * first / (second.sqrt() + self.eps)


class RmsProp:
    """θ ← θ − α g / (√v + ε), v a running mean of g²; centred: of the variance; with momentum: the buffer of these steps."""

    def __init__(
        self, alpha: float = 0.99, eps: float = 1e-8, momentum: float = 0.0, centered: bool = False
    ) -> None:
        self.alpha, self.eps, self.momentum, self.centered = alpha, eps, momentum, centered
        self.second, self.first, self.buffer = torch.zeros(()), torch.zeros(()), torch.zeros(())

    def __call__(self, weight: Tensor, gradient: Tensor, lr: float | Tensor) -> Tensor:
        """The weight after one step, differentiable."""
        self.second = self.alpha * self.second + (1 - self.alpha) * gradient**2
        variance = self.second
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
    parameters = dict(model.named_parameters())
    trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
    adapted = trainable if adapted is None else adapted
    losses, results = [], []
    for task in range(batch.num_tasks):
        weights: dict[str, Tensor] = dict(parameters)
        rules = {name: rule() for name in adapted}
        for _ in range(steps):
            objective = loss(predict(model, weights, batch.support_x[task]), batch.support_y[task])
            gradients = torch.autograd.grad(
                objective,
                [weights[name] for name in adapted],
                create_graph=order == 2,
                allow_unused=True,
            )
            for name, gradient in zip(adapted, gradients, strict=True):
                if gradient is not None:
                    weights[name] = rules[name](weights[name], gradient, lr)
        losses.append(loss(predict(model, weights, batch.query_x[task]), batch.query_y[task]))
        results.append({name: weight.detach() for name, weight in weights.items()})
    outer_loss = torch.stack(losses).mean()
    gradients = torch.autograd.grad(
        outer_loss, [parameters[name] for name in trainable], allow_unused=True
    )
    named = {
        name: gradient
        for name, gradient in zip(trainable, gradients, strict=True)
        if gradient is not None
    }
    return Reference(named, outer_loss.detach(), results)


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
) -> Reference:
    """The inner and outer loop with everything that the family changes in it, task by task.

    Args:
        rate: (k, name) → the learning rate of a tensor in step k.
        outer_weights: K weights of the query losses after each update; default: the last counts.
        values: k → weights by name that take the place of the model's in every forward pass of step k and in the query pass after it.
        inner: (support loss, fast weights, first weights, prediction, target) → the loss that the inner gradient is taken of.
        transform: (k, name, gradient) → the gradient that is used.
        extra: leaf tensors by name, whose meta-gradients are wanted too.
    """
    parameters = dict(model.named_parameters())
    adapted = (
        list(parameters) if adapted is None else [name for name in parameters if name in adapted]
    )
    outer_weights = [0.0] * (steps - 1) + [1.0] if outer_weights is None else outer_weights
    outer_losses, results = [], []
    for task in range(batch.num_tasks):
        weights: dict[str, Tensor] = dict(parameters)
        outer = torch.zeros(())
        for k in range(steps):
            own: Mapping[str, Tensor] = {} if values is None else values(k)
            prediction = predict(model, {**weights, **own}, batch.support_x[task])
            objective = loss(prediction, batch.support_y[task])
            if inner is not None:
                objective = inner(objective, weights, parameters, prediction, batch.support_y[task])
            gradients = torch.autograd.grad(
                objective, [weights[name] for name in adapted], create_graph=order == 2
            )
            for name, gradient in zip(adapted, gradients, strict=True):
                weights[name] = weights[name] - rate(k, name) * (
                    gradient if transform is None else transform(k, name, gradient)
                )
            if outer_weights[k]:
                outer = outer + outer_weights[k] * loss(
                    predict(model, {**weights, **own}, batch.query_x[task]), batch.query_y[task]
                )
        outer_losses.append(outer)
        results.append({name: weight.detach() for name, weight in weights.items()})
    outer_loss = torch.stack(outer_losses).mean()
    wanted: dict[str, Tensor] = {**parameters, **(extra or {})}
    gradients = torch.autograd.grad(outer_loss, list(wanted.values()), allow_unused=True)
    named = {
        name: gradient
        for name, gradient in zip(wanted, gradients, strict=True)
        if gradient is not None
    }
    return Reference(named, outer_loss.detach(), results)


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
    """Gradient sharing with unit normalisation over all parameters together; all tasks in lock-step.

    Args:
        gate, momentum: K logits each, as leaf tensors that receive meta-gradients.
        running: K stored means, flat; None before the first batch.
    """
    parameters = dict(model.named_parameters())
    names = list(parameters)
    fast: list[dict[str, Tensor]] = [dict(parameters) for _ in range(batch.num_tasks)]
    stored = []
    for k in range(steps):
        flat = []
        for task, weights in enumerate(fast):
            objective = loss(predict(model, weights, batch.support_x[task]), batch.support_y[task])
            gradients = torch.autograd.grad(
                objective, list(weights.values()), create_graph=order == 2
            )
            flat.append(torch.cat([gradient.flatten() for gradient in gradients]))
        lengths = [torch.linalg.vector_norm(gradient) for gradient in flat]
        mean = torch.stack(
            [gradient / length for gradient, length in zip(flat, lengths, strict=True)]
        ).sum(0) / len(flat)
        m, weight = 1 / (1 + torch.exp(-momentum[k])), 1 / (1 + torch.exp(-gate[k]))
        shared = mean if running is None else m * running[k] + (1 - m) * mean
        stored.append(shared.detach())
        for task, (gradient, length) in enumerate(zip(flat, lengths, strict=True)):
            direction = (1 - weight) * gradient + weight * length * shared
            pieces = direction.split([parameters[name].numel() for name in names])
            fast[task] = {
                name: fast[task][name] - lr * piece.view_as(parameters[name])
                for name, piece in zip(names, pieces, strict=True)
            }
    losses = [
        loss(predict(model, weights, batch.query_x[task]), batch.query_y[task])
        for task, weights in enumerate(fast)
    ]
    outer_loss = torch.stack(losses).mean()
    wanted: dict[str, Tensor] = {
        **parameters,
        "gradient-sharing.gate": gate,
        "gradient-sharing.momentum": momentum,
    }
    gradients = torch.autograd.grad(outer_loss, list(wanted.values()), allow_unused=True)
    named = {
        name: gradient
        for name, gradient in zip(wanted, gradients, strict=True)
        if gradient is not None
    }
    adapted = [{name: weight.detach() for name, weight in weights.items()} for weights in fast]
    return Reference(named, outer_loss.detach(), adapted, {"running": stored})


def logit(weight: float) -> float:
    """σ⁻¹: what a sigmoid maps to `weight`, strictly between 0 and 1."""
    return math.log(weight / (1 - weight))
