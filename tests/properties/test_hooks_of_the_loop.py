"""Starts, task parameters, other updates, extra passes and order 0: a plain loop's own numbers,
in every way of computing a step."""

import copy
import warnings

import pytest
import torch
from support.hook_plugins import chain, plain
from support.plain_loop import OPTIMIZERS, RULES

from metaplug import TaskBatch
from metaplug.testing import assert_close, found, problem

ALL = ("variables", "start", "ahead", "update", "outer")
SETS = {
    "a start": ("start",),
    "task parameters": ("variables",),
    "a second gradient": ("ahead",),
    "an update": ("update",),
    "outer passes": ("outer",),
    "all of them": ALL,
    "order 0": ("variables", "start", "update", "order-zero"),
}
WAYS = {
    "vectorized": {"task_batching": "vectorized"},
    "sequential": {"task_batching": "sequential"},
    "in chunks": {"chunk_size": 2},
    "recomputed": {"checkpoint_steps": 1},
}


def order_of(parts):
    return 0 if "order-zero" in parts else 2


def assert_is_the_plain_loop(learner, case, parts, **options):
    ours = found(learner, case.batch)
    given = {"order": order_of(parts), "steps": case.steps, "lr": case.lr, **options}
    expected = plain(copy.deepcopy(case.model), case.batch, parts, **given)
    assert_close(ours.gradients, expected.gradients)
    if "order-zero" not in parts:
        assert_close(ours.outer_loss, expected.outer)
    if ours.outcome is not None:
        predictions = torch.stack([each.prediction for each in expected.tasks])
        assert_close(ours.outcome.query_predictions, predictions)
    return ours, expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ["mlp", "conv4", "batch-norm"])
@pytest.mark.parametrize("parts", SETS.values(), ids=SETS)
def test_meta_gradients_are_those_of_a_plain_loop(parts, model, way):
    case = problem(model, tasks=3, steps=2)
    learner = case.learner(plugins=chain(parts), **WAYS[way])
    assert_is_the_plain_loop(learner, case, parts)


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
@pytest.mark.parametrize("parts", SETS.values(), ids=SETS)
def test_first_order_leaves_the_second_derivatives_out(parts, batching):
    if "order-zero" in parts:
        return
    case = problem("conv4", tasks=2)
    learner = case.learner(plugins=["derivative-order", *chain(parts)], task_batching=batching)
    assert_is_the_plain_loop(learner, case, parts, order=1)


@pytest.mark.parametrize("parts", SETS.values(), ids=SETS)
def test_a_loop_of_no_steps_goes_on_from_the_start(parts):
    case = problem("mlp", steps=0)
    assert_is_the_plain_loop(case.learner(plugins=chain(parts)), case, parts)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_inner_optimizers_update_starts_and_task_parameters(name):
    parts, case = ("variables", "start", "ahead", "outer"), problem("mlp", lr=0.05, steps=3)
    learner = case.learner(plugins=chain(parts), **OPTIMIZERS[name])
    assert_is_the_plain_loop(learner, case, parts, rule=RULES[name])


@pytest.mark.parametrize("parts", SETS.values(), ids=SETS)
def test_tasks_of_unequal_size_are_each_as_alone(parts):
    cases = [problem("batch-norm", tasks=1, support=n, query=7 - n, seed=n) for n in (3, 4, 3)]
    alone = [each.batch for each in cases]
    case = cases[0]
    case.batch = TaskBatch.from_tasks(alone)
    ours = found(case.learner(plugins=chain(parts)), case.batch)
    given = {"order": order_of(parts), "lr": case.lr}
    expected = plain(copy.deepcopy(case.model), alone, parts, **given)
    assert_close(ours.gradients, expected.gradients)


@pytest.mark.parametrize("steps", [0, 2, 5])
@pytest.mark.parametrize("model", ["mlp", "batch-norm"])
@pytest.mark.parametrize("parts", SETS.values(), ids=SETS)
def test_test_tasks_are_adapted_as_in_the_plain_loop(parts, model, steps):
    """Also for more steps than were trained, alone and by `adapt`, which gives a plain module."""
    case = problem(model, tasks=3)
    learner = case.learner(plugins=chain(parts))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "adapting for 5 inner steps", UserWarning)
        together = learner.engine.evaluate(case.batch, steps).query_predictions
        expected = plain(
            copy.deepcopy(case.model), case.batch, parts, order=1, steps=steps, lr=case.lr
        )
        for task, one in enumerate(expected.tasks):
            assert_close(together[task], one.prediction)
            single = case.batch.tasks(slice(task, task + 1))
            adapted = learner.adapt(single.support_x[0], single.support_y[0], inner_steps=steps)
            with torch.no_grad():
                assert_close(adapted(single.query_x[0]), one.prediction)
