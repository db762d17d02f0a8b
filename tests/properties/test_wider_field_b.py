"""LoRA, CAVIA and Proto-MAML against straight-line loops written from their equations."""

import pytest
import torch
from torch.nn import functional as F

from metaplug.testing import assert_close, found, problem, reference

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def initialize_parameters(parameters):
    """A start of one parameter that is made of another, which no plugin changes."""
    made = parameters["2.bias"] + parameters["0.weight"][:, :3, 0]
    return {**parameters, "2.bias": made}


@pytest.mark.parametrize("options", [{}, {"checkpoint_steps": 1}, {"task_batching": "sequential"}])
def test_the_inner_gradient_leaves_out_the_way_through_another_start(options):
    case = problem("mlp")
    learner = case.learner(plugins=[initialize_parameters], **options)
    weights = dict(case.model.named_parameters())
    for task in range(case.batch.num_tasks):
        fast = dict(initialize_parameters({name: each[None] for name, each in weights.items()}))
        fast = {name: each[0].detach().requires_grad_() for name, each in fast.items()}
        x, y = case.batch.support_x[task], case.batch.support_y[task]
        for _ in range(case.steps):
            loss = F.cross_entropy(reference.predict(case.model, fast, x), y)
            taken = torch.autograd.grad(loss, list(fast.values()))
            fast = {
                name: fast[name] - case.lr * each for name, each in zip(fast, taken, strict=True)
            }
        ours = found(learner, case.batch).outcome.adapted_parameters
        assert_close({name: each[task].detach() for name, each in ours.items()}, fast, **EXACT)
