"""Starts, task parameters, other updates, extra passes and order 0: a plain loop's own numbers,
in every way of computing a step."""

import copy
import dataclasses
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.hook_plugins import ALL, ZERO, QueryReader, chain, plain
from support.plain_loop import OPTIMIZERS, RULES
from support.ranks import on_ranks, shard

from metaplug import MetaLearner, TaskBatch
from metaplug.execution.ranks import ALONE
from metaplug.execution.traced import CompiledDerivation
from metaplug.testing import Stream, assert_close, found, problem
from metaplug.testing.strategies import seeds

SETS = {
    "a start": ("start",),
    "task parameters": ("variables",),
    "a second gradient": ("ahead",),
    "an update": ("update",),
    "outer passes": ("outer",),
    "all of them": ALL,
    "order 0": ZERO,
}
OF_SECOND_ORDER = {name: parts for name, parts in SETS.items() if name != "order 0"}
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


@pytest.mark.parametrize(
    ("model", "way"),
    [
        *(("mlp", way) for way in WAYS),
        ("conv4", "vectorized"),
        ("batch-norm", "sequential"),
        ("batch-norm", "recomputed"),
    ],
)
@pytest.mark.parametrize("parts", SETS.values(), ids=SETS)
def test_meta_gradients_are_those_of_a_plain_loop(parts, model, way):
    case = problem(model, tasks=3, steps=2)
    learner = case.learner(plugins=chain(parts), **WAYS[way])
    assert_is_the_plain_loop(learner, case, parts)


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
@pytest.mark.parametrize("parts", OF_SECOND_ORDER.values(), ids=OF_SECOND_ORDER)
def test_first_order_leaves_the_second_derivatives_out(parts, batching):
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


# Traced, captured, in windows, on ranks.


@pytest.mark.parametrize("parts", SETS.values(), ids=SETS)
def test_a_traced_step_is_the_plain_loop(parts):
    case = problem("batch-norm" if parts is ALL else "mlp", tasks=2)
    learner = case.learner(plugins=chain(parts), task_batching="vectorized")
    trace = learner.engine.derivation = CompiledDerivation(learner.engine, lambda graph, _: graph)
    assert_is_the_plain_loop(learner, case, parts)
    found(learner, case.batch)  # the second is compared with the untraced step
    assert trace.refusal is None


@pytest.mark.parametrize("parts", [ALL, SETS["order 0"]], ids=["all of them", "order 0"])
def test_traced_and_rarely_fetched_runs_are_the_run_that_is_not(parts):
    """Starts that change, and statistics that are kept, go into a trace anew in every step."""
    states = []
    for traced, options in ((False, {}), (True, {}), (False, {"metrics_every": 3})):
        learner = problem().learner(plugins=chain(parts), task_batching="vectorized", **options)
        if traced:
            learner.engine.derivation = CompiledDerivation(learner.engine, lambda graph, _: graph)
        history = learner.fit(Stream(), iterations=4, tasks_per_batch=2)
        figures = history.records[-1].step.figures
        states.append({**learner.engine.meta_parameters, **figures})
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        for name, value in states[0].items():
            # Four steps of Adam, which divides by the size of a gradient.
            torch.testing.assert_close(other[name], value, rtol=1e-7, atol=1e-9)


def test_two_ranks_find_what_one_does():
    case = problem("batch-norm", tasks=5)

    def run(world):
        batch, answers = case.batch if world is ALONE else shard(case.batch, world), []
        for parts in SETS.values():
            ours = found(case.learner(plugins=chain(parts), world=world), batch)
            answers.append(dict(ours.gradients))
            answers += [dict(kept) for kept in ours.statistics.values()]
        return answers

    alone = run(ALONE)
    for rank in on_ranks(run):
        if isinstance(rank, BaseException):
            raise rank
        for ours, theirs in zip(rank, alone, strict=True):
            assert_close(ours, theirs)


# Saved, loaded and resumed.


@pytest.mark.parametrize("parts", [ALL, SETS["order 0"]], ids=["all of them", "order 0"])
def test_a_learner_that_is_loaded_goes_on_bit_for_bit(parts, tmp_path):
    case = problem("batch-norm")
    learner = case.learner(plugins=chain(parts))
    learner.fit(Stream("batch-norm"), iterations=2, total=4, tasks_per_batch=2)
    learner.save(tmp_path / "saved.safetensors")
    loaded = MetaLearner.load(
        tmp_path / "saved.safetensors", model=copy.deepcopy(case.model), plugins=chain(parts)
    )
    for each in (learner, loaded):
        each.fit(Stream("batch-norm"), iterations=2, total=4, tasks_per_batch=2)
    one, other = learner.engine.meta_parameters, loaded.engine.meta_parameters
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    tested = [each.engine.evaluate(case.batch, 2).query_predictions for each in (learner, loaded)]
    assert torch.equal(*tested)


# Features that are kept.


def test_kept_features_change_no_number():
    case, found_by = problem("mlp", tasks=2), []
    for cached in (False, True):
        plugins = ["partial-adaptation", *chain(ALL)]
        learner = case.learner(plugins=plugins, cache_frozen=cached)
        found_by.append(found(learner, case.batch).gradients)
        assert (learner.engine.inner.features is not None) is cached
    assert_close(dict(found_by[1]), dict(found_by[0]), rtol=1e-9, atol=1e-11)


# Query labels.


@settings(max_examples=5)
@given(seeds, st.sampled_from(["vectorized", "sequential"]))
def test_query_labels_change_no_inner_value(seed, batching):
    case = problem("batch-norm", seed=seed)
    labels = torch.randint(
        3, case.batch.query_y.shape, generator=torch.Generator().manual_seed(seed)
    )
    learner = case.learner(plugins=[*chain(ALL), QueryReader()], task_batching=batching)
    batches = case.batch, dataclasses.replace(case.batch, query_y=labels)
    trained = [found(learner, batch).outcome for batch in batches]
    tested = [learner.engine.evaluate(batch, 2) for batch in batches]
    for one, other in (trained, tested):
        assert_close(dict(other.adapted_parameters), dict(one.adapted_parameters), rtol=0, atol=0)
        assert_close(other.query_predictions, one.query_predictions, rtol=0, atol=0)
