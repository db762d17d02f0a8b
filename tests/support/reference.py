"""The algorithms once more, as plainly as they can be written: one task after the other, `torch.autograd.grad` over `functional_call`.

Nothing here is shared with metaplug, so that agreement means something.
"""

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F


@dataclass
class Reference:
    """What a plain loop found: meta-gradients by name, the outer loss, and each task's adapted weights."""

    gradients: dict
    outer_loss: torch.Tensor
    adapted: list
    extra: dict = field(default_factory=dict)


def predict(model, weights, x):
    """The model's output with these weights, in the mode that the model is in; its buffers stay as they are."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return torch.func.functional_call(model, {**buffers, **weights}, (x,))


class Sgd:
    """θ ← θ − α b, with b the momentum buffer over g + weight_decay θ: torch.optim.SGD's rule."""

    def __init__(self, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
        self.momentum, self.dampening, self.weight_decay, self.nesterov = momentum, dampening, weight_decay, nesterov
        self.buffer = None

    def __call__(self, weight, gradient, lr):
        gradient = gradient + self.weight_decay * weight
        if self.momentum:
            self.buffer = gradient if self.buffer is None else self.momentum * self.buffer + (1 - self.dampening) * gradient
            gradient = gradient + self.momentum * self.buffer if self.nesterov else self.buffer
        return weight - lr * gradient


class Adam:
    """Kingma and Ba 2015, algorithm 1."""

    def __init__(self, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.steps, self.first, self.second = 0, 0.0, 0.0

    def __call__(self, weight, gradient, lr):
        gradient = gradient + self.weight_decay * weight
        self.steps += 1
        self.first = self.betas[0] * self.first + (1 - self.betas[0]) * gradient
        self.second = self.betas[1] * self.second + (1 - self.betas[1]) * gradient**2
        first = self.first / (1 - self.betas[0] ** self.steps)
        second = self.second / (1 - self.betas[1] ** self.steps)
        return weight - lr * first / (second.sqrt() + self.eps)


class RmsProp:
    """θ ← θ − α g / (√v + ε), v a running mean of g²; centred: of the variance; with momentum: the buffer of these steps."""

    def __init__(self, alpha=0.99, eps=1e-8, momentum=0.0, centered=False):
        self.alpha, self.eps, self.momentum, self.centered = alpha, eps, momentum, centered
        self.second, self.first, self.buffer = 0.0, 0.0, 0.0

    def __call__(self, weight, gradient, lr):
        self.second = self.alpha * self.second + (1 - self.alpha) * gradient**2
        variance = self.second
        if self.centered:
            self.first = self.alpha * self.first + (1 - self.alpha) * gradient
            variance = self.second - self.first**2
        self.buffer = self.momentum * self.buffer + gradient / (variance.sqrt() + self.eps)
        return weight - lr * self.buffer


def maml(model, batch, *, steps, lr, order=2, loss=F.cross_entropy, rule=Sgd, adapted=None, frozen=()):
    """MAML, task by task. `adapted` names what the inner loop moves (default: everything trainable)."""
    parameters = dict(model.named_parameters())
    trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
    adapted = trainable if adapted is None else adapted
    losses, results = [], []
    for task in range(batch.num_tasks):
        weights, rules = dict(parameters), {name: rule() for name in adapted}
        for _ in range(steps):
            objective = loss(predict(model, weights, batch.support_x[task]), batch.support_y[task])
            gradients = torch.autograd.grad(objective, [weights[name] for name in adapted], create_graph=order == 2, allow_unused=True)
            for name, gradient in zip(adapted, gradients, strict=True):
                if gradient is not None:
                    weights[name] = rules[name](weights[name], gradient, lr)
        losses.append(loss(predict(model, weights, batch.query_x[task]), batch.query_y[task]))
        results.append({name: weight.detach() for name, weight in weights.items()})
    outer_loss = torch.stack(losses).mean()
    gradients = torch.autograd.grad(outer_loss, [parameters[name] for name in trainable], allow_unused=True)
    named = {name: gradient for name, gradient in zip(trainable, gradients, strict=True) if gradient is not None}
    return Reference(named, outer_loss.detach(), results)


def loop(
    model,
    batch,
    *,
    steps,
    rate,
    outer_weights=None,
    order=2,
    adapted=None,
    values=None,
    inner=None,
    transform=None,
    extra=None,
    loss=F.cross_entropy,
):
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
    adapted = list(parameters) if adapted is None else [name for name in parameters if name in adapted]
    outer_weights = [0.0] * (steps - 1) + [1.0] if outer_weights is None else outer_weights
    outer_losses, results = [], []
    for task in range(batch.num_tasks):
        weights, outer = dict(parameters), 0.0
        for k in range(steps):
            own = {} if values is None else values(k)
            prediction = predict(model, {**weights, **own}, batch.support_x[task])
            objective = loss(prediction, batch.support_y[task])
            if inner is not None:
                objective = inner(objective, weights, parameters, prediction, batch.support_y[task])
            gradients = torch.autograd.grad(objective, [weights[name] for name in adapted], create_graph=order == 2)
            for name, gradient in zip(adapted, gradients, strict=True):
                weights[name] = weights[name] - rate(k, name) * (gradient if transform is None else transform(k, name, gradient))
            if outer_weights[k]:
                outer = outer + outer_weights[k] * loss(predict(model, {**weights, **own}, batch.query_x[task]), batch.query_y[task])
        outer_losses.append(outer)
        results.append({name: weight.detach() for name, weight in weights.items()})
    outer_loss = torch.stack(outer_losses).mean()
    wanted = {**parameters, **(extra or {})}
    gradients = torch.autograd.grad(outer_loss, list(wanted.values()), allow_unused=True)
    named = {name: gradient for name, gradient in zip(wanted, gradients, strict=True) if gradient is not None}
    return Reference(named, outer_loss.detach(), results)


def gradient_sharing(model, batch, *, steps, lr, gate, momentum, running=None, order=2, loss=F.cross_entropy):
    """Gradient sharing with unit normalisation over all parameters together; all tasks in lock-step.

    Args:
        gate, momentum: K logits each, as leaf tensors that receive meta-gradients.
        running: K stored means, flat; None before the first batch.
    """
    parameters = dict(model.named_parameters())
    names = list(parameters)
    fast = [dict(parameters) for _ in range(batch.num_tasks)]
    stored = []
    for k in range(steps):
        flat = []
        for task, weights in enumerate(fast):
            objective = loss(predict(model, weights, batch.support_x[task]), batch.support_y[task])
            gradients = torch.autograd.grad(objective, list(weights.values()), create_graph=order == 2)
            flat.append(torch.cat([gradient.flatten() for gradient in gradients]))
        lengths = [torch.linalg.vector_norm(gradient) for gradient in flat]
        mean = sum(gradient / length for gradient, length in zip(flat, lengths, strict=True)) / len(flat)
        m, weight = 1 / (1 + torch.exp(-momentum[k])), 1 / (1 + torch.exp(-gate[k]))
        shared = mean if running is None else m * running[k] + (1 - m) * mean
        stored.append(shared.detach())
        for task, (gradient, length) in enumerate(zip(flat, lengths, strict=True)):
            direction = (1 - weight) * gradient + weight * length * shared
            pieces = direction.split([parameters[name].numel() for name in names])
            fast[task] = {name: fast[task][name] - lr * piece.view_as(parameters[name]) for name, piece in zip(names, pieces, strict=True)}
    losses = [loss(predict(model, weights, batch.query_x[task]), batch.query_y[task]) for task, weights in enumerate(fast)]
    outer_loss = torch.stack(losses).mean()
    wanted = {**parameters, "gradient-sharing.gate": gate, "gradient-sharing.momentum": momentum}
    gradients = torch.autograd.grad(outer_loss, list(wanted.values()), allow_unused=True)
    named = {name: gradient for name, gradient in zip(wanted, gradients, strict=True) if gradient is not None}
    adapted = [{name: weight.detach() for name, weight in weights.items()} for weights in fast]
    return Reference(named, outer_loss.detach(), adapted, {"running": stored})


def logit(weight):
    return math.log(weight / (1 - weight))
