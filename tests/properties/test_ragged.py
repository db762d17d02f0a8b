"""Tasks of unequal size in one batch: each gets what it gets alone, against plain loops."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import plugins
from support.plain_loop import OPTIMIZERS, RULES, loop, off
from support.ranks import on_ranks
from torch import nn
from torch.nn import functional as F

from metaplug import MetaLearner, Plugin, RequestError, TaskBatch, hookimpl
from metaplug.contract import registry
from metaplug.execution.ranks import ALONE
from metaplug.execution.traced import CompiledDerivation
from metaplug.testing import found, reference
from metaplug.testing.strategies import seeds

OUTPUTS = 4
EXACT = {"rtol": 1e-10, "atol": 1e-10}
BATCHINGS = ("auto", "vectorized", "sequential")


class Words(nn.Module):
    """Attention over tokens, of which those that pad an example count for nothing."""

    def __init__(self):
        super().__init__()
        self.rows, self.head = nn.Embedding(7, 8, padding_idx=0), nn.Linear(8, OUTPUTS)
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)

    def forward(self, tokens, mask):
        rows, padding = self.rows(tokens), mask == 0
        mixed, _ = self.attention(rows, rows, rows, key_padding_mask=padding, need_weights=False)
        kept = torch.where(mask.bool().unsqueeze(-1), self.norm(rows + mixed), 0.0)
        return self.head(kept.sum(1) / mask.sum(1, keepdim=True))


def perceptron(*norm):
    return nn.Sequential(nn.Linear(3, 6), *norm, nn.Tanh(), nn.Linear(6, OUTPUTS))


def convolutions():
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(12, OUTPUTS))


MODELS = {
    "mlp": perceptron,
    "batch norm": convolutions,
    "layer norm": lambda: perceptron(nn.LayerNorm(6)),
    "attention": Words,
}
LAST = {"mlp": "2", "batch norm": "8", "layer norm": "3", "attention": "head"}
"""The name of the last layer."""


def model_of(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name]().double()


def inputs(name, count, generator):
    if name != "attention":
        shape = (1, 4, 4) if name == "batch norm" else (3,)
        return torch.randn(1, count, *shape, generator=generator, dtype=torch.float64)
    lengths = torch.randint(2, 6, (1, count, 1), generator=generator)
    mask = (torch.arange(5) < lengths).long()
    return {"tokens": mask * torch.randint(1, 7, (1, count, 5), generator=generator), "mask": mask}


def drawn(name, sizes, seed=0):
    """One task of each size (support, query, ways), each with a label of its last class."""
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for support, query, ways in sizes:
        parts = []
        for count in (support, query):
            y = torch.randint(0, ways, (1, count), generator=generator)
            y[0, 0] = ways - 1
            parts += [inputs(name, count, generator), y]
        tasks.append(TaskBatch(*parts))
    return tasks


SIZES = ((4, 3, 2), (2, 5, 3), (4, 3, 2), (3, 3, 4))
sizes_of_tasks = st.lists(
    st.tuples(st.integers(2, 5), st.integers(2, 4), st.integers(2, OUTPUTS)), min_size=1, max_size=4
)


def learner_of(model, **given):
    return MetaLearner(model, **{"inner_lr": 0.3, "inner_steps": 2, **given})


def mean_of(all_gradients):
    """The mean of the meta-gradients of some tasks; a task that has none of a name counts as 0."""
    names = {name: None for each in all_gradients for name in each}
    return {
        name: sum(each[name] for each in all_gradients if name in each) / len(all_gradients)
        for name in names
    }


def assert_alone(outcome, expected, sizes):
    """Each task's row of an outcome is what a plain loop finds for it alone."""
    for row, (task, (_, query, _)) in enumerate(zip(expected.tasks, sizes, strict=True)):
        for name, weight in task.weights.items():
            ours = outcome.adapted_parameters[name][row]
            torch.testing.assert_close(ours, weight, **EXACT, check_dtype=False)
        ours = [losses[row] for losses in outcome.support_losses]
        ours.append(outcome.query_losses[len(ours)][row])
        torch.testing.assert_close(torch.stack(ours), torch.stack(task.losses), **EXACT)
        predictions = outcome.query_predictions[row]
        torch.testing.assert_close(predictions[:query], task.prediction, **EXACT)
        assert not predictions[query:].any()


@pytest.mark.parametrize("name", MODELS)
@given(
    sizes=sizes_of_tasks,
    seed=seeds,
    batching=st.sampled_from(BATCHINGS),
    order=st.sampled_from([1, 2]),
    saving=st.sampled_from([{}, {"chunk_size": 1}, {"chunk_size": 2}, {"checkpoint_steps": 1}]),
    optimizer=st.sampled_from(list(RULES)),
)
def test_each_task_gets_what_it_gets_alone(name, sizes, seed, batching, order, saving, optimizer):
    tasks, model = drawn(name, sizes, seed), model_of(name, seed)
    lr = 0.05 if optimizer == "adam" else 0.3  # Adam's steps are as long as its rate
    exact = loop(
        model, tasks, order=order, lr=lr, rule=RULES[optimizer], ways=[size[2] for size in sizes]
    )
    preset = "maml" if order == 2 else "fomaml"
    learner = learner_of(
        model, preset=preset, task_batching=batching, **OPTIMIZERS[optimizer] | saving | {"inner_lr": lr}
    )
    batch = TaskBatch.from_tasks(tasks)
    taken = found(learner, batch)
    assert off(taken.gradients, exact.gradients) < 1e-10
    torch.testing.assert_close(taken.outer_loss, exact.outer, **EXACT)
    if taken.outcome is not None:
        assert_alone(detached(taken.outcome), detached(exact), sizes)
    assert_alone(learner.engine.evaluate(learner.prepare_batch(batch), 2), detached(exact), sizes)
    most = max(ways for _, _, ways in sizes)
    for part in ("weight", "bias"):  # of classes that no task has
        assert not taken.gradients[f"{LAST[name]}.{part}"][most:].any()


def detached(of):
    if isinstance(of, SimpleNamespace):
        tasks = [
            SimpleNamespace(
                weights={name: each.detach() for name, each in task.weights.items()},
                losses=[each.detach() for each in task.losses],
                prediction=task.prediction.detach(),
            )
            for task in of.tasks
        ]
        return SimpleNamespace(tasks=tasks)
    return dataclasses.replace(
        of,
        adapted_parameters={name: each.detach() for name, each in of.adapted_parameters.items()},
        support_losses=[each.detach() for each in of.support_losses],
        query_losses={after: each.detach() for after, each in of.query_losses.items()},
    )
