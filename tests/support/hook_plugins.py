"""Small plugins for the hooks beyond MAML's family, and the same algorithms as one plain loop."""

from types import SimpleNamespace

import torch
from support.plain_loop import predict, sgd
from torch import nn
from torch.nn import functional as F

from metaplug import Plugin, TaskBatch, hookimpl

ALL = ("variables", "start", "ahead", "update", "outer")
ZERO = ("variables", "start", "update", "order-zero")
"""Parts that go together, in second order and in order 0."""

RADIUS, RATE, SCALE, SHIFT = 0.2, 0.15, 1.5, 0.1


def head(names):
    """The last weight and the last bias of a model, by name."""
    return tuple(name for name in names if "." in name and name.split(".")[0].isdigit())[-2:]


def learned(value, context):
    return nn.Parameter(torch.full((), value, dtype=context.dtype, device=context.device))


def frequencies(targets, like):
    """Of the classes among a task's labels, in the form of `like`; padding counts for nothing."""
    is_class = targets.unsqueeze(-1) == torch.arange(like.shape[1], device=targets.device)
    return is_class.to(like.dtype).sum(-2) / (targets >= 0).sum(-1, keepdim=True)


class Start(Plugin):
    """Start a learned step down the support loss, with the head's bias by class frequencies."""

    @hookimpl
    def setup(self, context):
        self.rate, self.adapted = learned(RATE, context), context.adapted
        self.bias = head(context.shapes)[1]

    @hookimpl
    def initialize_parameters(self, parameters, step):
        losses, _ = step.forward(parameters)
        taken = step.gradients(losses, {name: parameters[name] for name in self.adapted})
        start = {**parameters, **{n: parameters[n] - self.rate * g for n, g in taken.items()}}
        bias = start[self.bias]
        return {**start, self.bias: bias + self.rate * frequencies(step.targets, bias)}


class Variables(Plugin):
    """A learned shift of the head's bias, and a stretch of its weight that starts from 0."""

    @hookimpl
    def setup(self, context):
        self.head = head(context.shapes)
        shape = context.shapes[self.head[1]]
        self.shift = nn.Parameter(
            torch.full(shape, SHIFT, dtype=context.dtype, device=context.device)
        )

    @hookimpl
    def task_parameters(self, context):
        zero = torch.zeros((), dtype=context.dtype, device=context.device)
        return {"shift": self.shift, "stretch": zero}

    @hookimpl
    def transform_parameters(self, parameters):
        shift, stretch = (parameters[f"{self.name}.{name}"] for name in ("shift", "stretch"))
        weight, bias = (parameters[name] for name in self.head)
        changed = (weight * (1 + stretch.view(-1, 1, 1)), bias + shift)
        return {**parameters, **dict(zip(self.head, changed, strict=True))}


class Ahead(Plugin):
    """Penalise weights, and take the gradient a learned radius up the gradient."""

    @hookimpl
    def setup(self, context):
        self.radius = learned(RADIUS, context)

    @hookimpl
    def transform_inner_losses(self, losses, step):
        squares = [
            each.reshape(len(losses), -1).square().sum(1) for each in step.parameters.values()
        ]
        return losses + 0.01 * torch.stack(squares).sum(0)

    @hookimpl
    def transform_gradients(self, gradients, step):
        ahead = {name: step.parameters[name] + self.radius * g for name, g in gradients.items()}
        return step.gradients(step.objective(ahead), ahead)


class Update(Plugin):
    """Step by a learned scale of the gradient, squashed."""

    @hookimpl
    def setup(self, context):
        self.scale = learned(SCALE, context)

    @hookimpl
    def update_parameters(self, parameters, gradients, learning_rates):
        return {
            name: value - learning_rates[name] * torch.tanh(self.scale * gradients[name])
            if name in gradients
            else value
            for name, value in parameters.items()
        }


class Outer(Plugin):
    """Add support losses, query losses at the start, and a squared gradient; keep what it adds."""

    @hookimpl
    def setup(self, context):
        self.weight = head(context.shapes)[0]
        self.register_buffer("seen", torch.zeros((), dtype=context.dtype, device=context.device))

    @hookimpl
    def transform_outer_losses(self, losses, outcome):
        end, weight = outcome.adapted_parameters, self.weight
        query, _ = outcome.forward(end)
        taken = outcome.gradients(query, {weight: end[weight]})[weight]
        before, _ = outcome.forward(outcome.initial_parameters)
        more = 0.3 * outcome.objective(end) + 0.2 * before
        more = more + 0.1 * taken.flatten(1).square().sum(1)
        outcome.keep("more", more.mean())
        return losses + more

    @hookimpl
    def commit(self, kept):
        self.seen.copy_(kept["more"])

    @hookimpl
    def end_meta_step(self):
        return {"more": float(self.seen)}


class OrderZero(Plugin):
    """First-order meta-gradients with no graph through the loop: those of one more query pass."""

    @hookimpl
    def derivative_order(self):
        return 0

    @hookimpl
    def compute_meta_gradients(self, outcome, meta_parameters):
        end = outcome.adapted_parameters
        query, _ = outcome.forward(end)
        taken = outcome.gradients(query, {name: end[name] for name in outcome.adapted})
        outcome.keep("query", query.mean())
        zeros = {name: torch.zeros_like(each) for name, each in meta_parameters.items()}
        means = {name: each.detach().mean(0) for name, each in taken.items()}
        return zeros | {name: each for name, each in means.items() if name in zeros}


PARTS = {
    "variables": Variables,
    "start": Start,
    "ahead": Ahead,
    "update": Update,
    "outer": Outer,
    "order-zero": OrderZero,
}
"""By name, in the order of a chain that has several."""

META = {
    "variables": {},
    "start": {"start.rate": RATE},
    "ahead": {"ahead.radius": RADIUS},
    "update": {"update.scale": SCALE},
}
"""The plugins' meta-parameters that are numbers, by part."""


def chain(parts):
    """New plugins of these parts."""
    return [PARTS[name]() for name in PARTS if name in parts]


class _Plain:
    """One task's inner loop with some parts, from what tasks share."""

    def __init__(self, model, parts, *, order, lr):
        self.model, self.parts, self.order, self.lr = model, parts, order, lr
        self.own = dict(model.named_parameters())
        self.weight, self.bias = head(self.own)
        numbers = {name: each for part in parts for name, each in META.get(part, {}).items()}
        self.leaf = {
            name: torch.tensor(each, dtype=torch.float64, requires_grad=True)
            for name, each in numbers.items()
        }
        self.shared = dict(self.own)
        if "variables" in parts:
            shift = torch.full_like(self.own[self.bias], SHIFT).detach().requires_grad_()
            self.leaf["variables.shift"] = self.shared["variables.shift"] = shift
            self.shared["variables.stretch"] = torch.zeros((), dtype=shift.dtype).requires_grad_()

    def answer(self, weights, x):
        used = {name: weights[name] for name in self.own}
        if "variables" in self.parts:
            used[self.weight] = used[self.weight] * (1 + weights["variables.stretch"])
            used[self.bias] = used[self.bias] + weights["variables.shift"]
        return predict(self.model, used, x)

    def gradient(self, loss, weights):
        given = {"create_graph": self.order == 2, "retain_graph": True, "allow_unused": True}
        taken = torch.autograd.grad(loss, list(weights.values()), **given)
        return {name: g for name, g in zip(weights, taken, strict=True) if g is not None}

    def loss(self, weights, x, y):
        return F.cross_entropy(self.answer(weights, x), y)

    def objective(self, weights, *support):
        loss = self.loss(weights, *support)
        if "ahead" in self.parts:
            loss = loss + 0.01 * sum(each.square().sum() for each in weights.values())
        return loss

    def start(self, x, y):
        start = self.shared
        if "start" in self.parts:
            rate, taken = self.leaf["start.rate"], self.gradient(self.loss(start, x, y), start)
            start = start | {name: start[name] - rate * g for name, g in taken.items()}
            counts = F.one_hot(y, len(start[self.bias])).double().mean(0)
            start[self.bias] = start[self.bias] + rate * counts
        return self.linked(start)

    def step(self, fast, rules, *support):
        taken = self.gradient(self.objective(fast, *support), fast)
        if "ahead" in self.parts:
            radius = self.leaf["ahead.radius"]
            ahead = {name: fast[name] + radius * g for name, g in taken.items()}
            taken = self.gradient(self.objective(ahead, *support), ahead)
        if "update" in self.parts:
            taken = {name: torch.tanh(self.leaf["update.scale"] * g) for name, g in taken.items()}
        return self.linked(fast | {n: rules[n](fast[n], g, self.lr) for n, g in taken.items()})

    def linked(self, fast):
        """The same with a graph to what was before; without one in order 0."""
        if self.order:
            return fast
        return {name: each.detach().requires_grad_() for name, each in fast.items()}


def plain(model, tasks, parts, *, order=2, steps=2, lr=0.3, rule=sgd):
    """The same by one loop over tasks: losses, predictions, starts, ends and meta-gradients.

    Args:
        tasks: batches of one task each, or one batch of all.
    """
    if isinstance(tasks, TaskBatch):
        tasks = [tasks.tasks(slice(row, row + 1)) for row in range(tasks.num_tasks)]
    own, results = _Plain(model, parts, order=order, lr=lr), []
    for task in tasks:
        support = task.support_x[0], task.support_y[0]
        query = task.query_x[0], task.query_y[0]
        start = fast = own.start(*support)
        rules = {name: rule() for name in start}
        for _ in range(steps):
            fast = own.step(fast, rules, *support)
        loss = outer = own.loss(fast, *query)
        if "outer" in parts:
            [taken] = torch.autograd.grad(loss, fast[own.weight], create_graph=True)
            outer = loss + 0.3 * own.objective(fast, *support) + 0.2 * own.loss(start, *query)
            outer = outer + 0.1 * taken.square().sum()
        prediction = own.answer(fast, query[0]).detach()
        results.append(SimpleNamespace(end=fast, prediction=prediction, loss=loss, outer=outer))
    mean, wanted = torch.stack([each.outer for each in results]).mean(), own.own | own.leaf
    if order == 0:
        taken = [own.gradient(each.loss, each.end) for each in results]
        zeros = {name: torch.zeros_like(each) for name, each in wanted.items()}
        gradients = zeros | {
            name: sum(each[name] for each in taken) / len(taken)
            for name in taken[0]
            if name in wanted
        }
    else:
        gradients = own.gradient(mean, wanted)
        gradients = {name: each.detach() for name, each in gradients.items()}
    return SimpleNamespace(tasks=results, outer=mean.detach(), gradients=gradients)


class QueryReader(Plugin):
    """Add the entropy of the query predictions to the support losses."""

    transductive = property(lambda self: True)

    @hookimpl
    def transform_inner_losses(self, losses, step):
        log_p = step.forward({}, "query").log_softmax(2)
        return losses - 0.1 * (log_p.exp() * log_p).sum(2).mean(1)
