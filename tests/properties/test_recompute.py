"""Inner steps whose graph is made again in the backward pass: the same numbers, with every plugin,
in less memory."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import plugins
from torch import nn

from metaplug import MetaLearner, RequestError, TaskBatch
from metaplug.bench.meters import torch_memory as _memory
from metaplug.core.rematerialize import rematerialize
from metaplug.models import Conv4
from metaplug.testing import Stream, assert_close, found, problem
from metaplug.testing.strategies import problems


@given(
    problems(("batch-norm", "conv4"), steps=(1, 5), lrs=(0.01, 0.3)),
    st.integers(1, 6),
    st.sampled_from(["maml", "fomaml"]),
)
def test_it_gives_the_same_meta_gradients(case, steps, preset):
    """Every plugin alike: tests/test_conformance.py."""
    plain, again = (
        case.learner(preset=preset, checkpoint_steps=checkpoint, task_batching="vectorized")
        for checkpoint in (None, steps)
    )
    ours, theirs = found(again, case.batch), found(plain, case.batch)
    # Batch norm amplifies what rounding differs; gradients of a tensor that stands in two places
    # are added in another order.
    assert_close(ours.gradients, dict(theirs.gradients), rtol=1e-7, atol=1e-9)
    assert_close(ours.outer_loss, theirs.outer_loss, rtol=1e-12, atol=1e-14)
    assert_close(
        ours.outcome.query_predictions, theirs.outcome.query_predictions, rtol=1e-12, atol=1e-14
    )
    for one, other in zip(ours.outcome.support_losses, theirs.outcome.support_losses, strict=True):
        assert_close(one, other, rtol=1e-12, atol=1e-14)
    for plugin, kept in theirs.outcome.statistics.items():
        assert_close(dict(ours.outcome.statistics[plugin]), dict(kept), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("sgd", {"momentum": 0.9, "nesterov": True}),
        ("sgd", {"momentum": 0.5, "weight_decay": 0.1}),
        ("adam", {}),
        ("rmsprop", {"momentum": 0.3, "centered": True}),
        ("adagrad", {}),
        ("adadelta", {}),
        ("adamax", {}),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_state_of_the_optimizer_goes_on_from_piece_to_piece(optimizer, settings, steps):
    case = problem("mlp", steps=5, lr=0.05)
    given = {"inner_optimizer": optimizer, "inner_optimizer_settings": settings}
    plain, again = (
        case.learner(checkpoint_steps=checkpoint, **given).meta_gradients(case.batch)
        for checkpoint in (None, steps)
    )
    assert_close(again, plain, rtol=1e-9, atol=1e-11)


def test_no_run_begins_with_the_optimizers_state_of_the_last():
    case = problem("mlp", steps=3, lr=0.05)
    plain, again = (
        case.learner(inner_optimizer="adam", checkpoint_steps=checkpoint)
        for checkpoint in (None, 1)
    )
    for _ in range(2):
        ours, theirs = (each.meta_gradients(case.batch) for each in (again, plain))
        assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    ours, theirs = (
        each.engine.evaluate(case.batch, 3).query_predictions for each in (again, plain)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
def test_random_numbers_are_the_same_the_second_time(batching):
    torch.manual_seed(0)
    case = problem(steps=4)
    case.model = nn.Sequential(
        nn.Linear(4, 12), nn.Tanh(), nn.Dropout(0.4), nn.Linear(12, 3)
    ).double()
    settings = {"plugins": ["gradient-noise"], "task_batching": batching}
    before = torch.get_rng_state()
    plain = case.learner(**settings).meta_gradients(case.batch)
    again = case.learner(
        **{**settings, "plugins": ["gradient-noise"]}, checkpoint_steps=2
    ).meta_gradients(case.batch)
    assert_close(again, plain, rtol=1e-10, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_is_the_same_to_rounding():
    learners = [
        problem("conv4", steps=3).learner(
            preset="maml++", plugins=["gradient-sharing"], checkpoint_steps=each
        )
        for each in (None, 1)
    ]
    for learner in learners:
        learner.fit(Stream("conv4"), iterations=3, tasks_per_batch=3)
    assert_close(
        dict(learners[1].model.state_dict()),
        dict(learners[0].model.state_dict()),
        rtol=1e-6,
        atol=1e-7,
    )


def batch_of(tasks):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat(tasks, 1)
    return TaskBatch(
        *(
            value
            for _ in range(2)
            for value in (torch.rand(tasks, 5, 1, 28, 28, generator=generator), labels)
        )
    )


def test_memory_hardly_grows_with_the_inner_steps():
    """Without, it grows with K; with a piece for every step, by K fast weights alone: below √K from
    4 to 16 steps."""
    peaks = {}
    for steps in (4, 16):
        for checkpoint in (None, 1):
            learner = MetaLearner(
                Conv4((1, 28, 28), 5, filters=16),
                inner_steps=steps,
                inner_lr=0.1,
                task_batching="vectorized",
                checkpoint_steps=checkpoint,
            )
            batch = batch_of(2)
            learner.meta_gradients(batch)
            peaks[steps, checkpoint] = _memory(
                lambda learner=learner, batch=batch: learner.meta_gradients(batch)
            )[0]
    assert peaks[16, None] > 3 * peaks[4, None]
    assert peaks[16, 1] < 2 * peaks[4, 1]
    assert peaks[16, 1] < 0.4 * peaks[16, None]


def test_nothing_is_left_behind():
    case = problem("conv4", steps=3)
    learner = case.learner(plugins=["gradient-sharing"], checkpoint_steps=1)
    learner.meta_gradients(case.batch)
    gc.collect()
    before = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    for _ in range(3):
        learner.meta_gradients(case.batch)
    gc.collect()
    assert sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()) <= before


def test_a_number_of_steps_below_one_is_refused():
    with pytest.raises(RequestError, match=r"^checkpoint_steps = 0: give at least 1, or None"):
        problem().learner(checkpoint_steps=0)


# The mechanism alone.


def test_a_piece_is_differentiated_in_its_inputs_and_its_parameters():
    x, y, scale = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def piece(inputs, graph):
        first, (second, number) = inputs
        (slope,) = torch.autograd.grad((first**3 * scale).sum(), first, create_graph=graph)
        return {"sum": slope + second * number, "text": "as it is", "whole": torch.tensor(3)}

    calls = [rematerialize(piece, (x, [y, 2.5]), [scale]), piece((x, [y, 2.5]), graph=True)]
    assert calls[0]["text"] == "as it is"
    assert torch.equal(calls[0]["sum"], calls[1]["sum"])
    gradients = [torch.autograd.grad(call["sum"].sin().sum(), [x, y, scale]) for call in calls]
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, rtol=1e-14, atol=1e-14)


def test_a_tensor_that_stands_in_two_places_stays_one():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def piece(inputs, graph):
        moved, start = inputs
        (slope,) = torch.autograd.grad(
            ((moved - start) ** 2).sum() + (moved**3).sum(), moved, create_graph=graph
        )
        return slope

    plain, again = piece((x, x), graph=True), rematerialize(piece, (x, x), [])
    assert torch.equal(plain, again)
    assert torch.equal(*(torch.autograd.grad(each.sum(), x)[0] for each in (plain, again)))


def test_what_does_not_adapt_stays_one_tensor_for_all_tasks():
    """Copied for every task, it would take the memory that steps made again are to save."""
    case = problem(steps=3)
    anil = plugins.make("partial-adaptation", adapts="head")
    outcome = found(case.learner(plugins=[anil], checkpoint_steps=1), case.batch).outcome
    ends, starts = outcome.adapted_parameters, outcome.initial_parameters
    assert ends["0.weight"] is starts["0.weight"]
    assert ends["2.weight"] is not starts["2.weight"]
