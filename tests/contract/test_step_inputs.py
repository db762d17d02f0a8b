"""A start that an encoder makes of a task's support inputs, against a plain loop."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from metaplug import Context, MetaLearner, Plugin, RequestError, TaskBatch, hookimpl
from metaplug.testing import assert_close, check, problem

STEPS, RATE = 2, 0.1


class EncodedStart(Plugin):
    """θ[t,0] = θ + tanh(W · mean of x_t) for the biases of the last layer."""

    @hookimpl
    def setup(self, context: Context):
        self.shape = next(iter(context.shapes.values()))
        self.last = list(context.shapes)[-1]
        outputs = context.shapes[self.last].numel()
        start = torch.full((outputs, 1), 0.3, **context.factory_kwargs)
        self.encoder = nn.Parameter(start)

    @hookimpl
    def initialize_parameters(self, parameters, step):
        x, sizes = step.inputs.flatten(2), step.sizes
        counts = x.new_full((len(x),), x.shape[1])
        if sizes is not None:
            counts = x.new_tensor([size.support for size in sizes])
        code = x.mean(2).sum(1, keepdim=True) / counts.unsqueeze(1)
        shift = torch.tanh(code @ self.encoder.mT).view_as(parameters[self.last])
        return {**parameters, self.last: parameters[self.last] + shift}


def test_a_start_of_the_support_inputs_is_that_of_a_plain_loop():
    case, plugin = problem(tasks=4, steps=STEPS, lr=RATE), EncodedStart()
    gradients = case.learner(plugins=[plugin]).meta_gradients(case.batch)
    own, encoder = dict(case.model.named_parameters()), plugin.encoder
    losses = []
    for x, y, query_x, query_y in zip(
        case.batch.support_x,
        case.batch.support_y,
        case.batch.query_x,
        case.batch.query_y,
        strict=True,
    ):
        shift = torch.tanh(encoder @ x.mean().view(1, 1)).view_as(own[plugin.last])
        fast = {**own, plugin.last: own[plugin.last] + shift}
        for _ in range(STEPS):
            loss = nn.functional.cross_entropy(functional_call(case.model, fast, (x,)), y)
            taken = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {n: w - RATE * g for (n, w), g in zip(fast.items(), taken, strict=True)}
        answer = functional_call(case.model, fast, (query_x,))
        losses.append(nn.functional.cross_entropy(answer, query_y))
    wanted = {**own, "encoded-start.encoder": encoder}
    taken = torch.autograd.grad(torch.stack(losses).mean(), list(wanted.values()))
    assert_close(gradients, dict(zip(wanted, taken, strict=True)))


def test_a_start_of_the_support_inputs_keeps_the_contract():
    check(EncodedStart, models=("mlp",), examples=2)


def test_inputs_by_name_are_given_by_name():
    seen = []

    class Reads(Plugin):
        @hookimpl
        def initialize_parameters(self, parameters, step):
            seen.append({name: each.shape for name, each in step.inputs.items()})

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, left, right):
            return self.layer(left + right)

    x = {"left": torch.randn(2, 4, 3), "right": torch.randn(2, 4, 3)}
    y = torch.zeros(2, 4, dtype=torch.int64)
    MetaLearner(Named(), plugins=[Reads()]).meta_gradients(TaskBatch(x, y, x, y))
    assert seen[-1] == {"left": (2, 4, 3), "right": (2, 4, 3)}


def test_where_there_is_no_batch_there_are_no_inputs():
    def derivative_order(step):
        return 2 if step.inputs is None else 1

    case = problem()
    with pytest.raises(RequestError, match="asks for inputs where there is no batch"):
        case.learner(plugins=[derivative_order]).meta_gradients(case.batch)
