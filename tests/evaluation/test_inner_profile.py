"""The profile of the inner loop: its numbers against a plain loop, and that it changes nothing."""

import copy
import itertools
import json
import math

import pytest
import torch
from support.plain_loop import one
from support.ranks import on_ranks
from support.tiny_runs import assert_same, tiny
from torch import nn
from torch.nn import functional as F

from metaplug import MetaLearner, PluginUse, RequestError, RunError, TaskBatch
from metaplug import checkpoint as checkpoints
from metaplug.contract import registry
from metaplug.evaluation.inner_profile import InnerProfile
from metaplug.experiments.runs import read_metrics, train
from metaplug.experiments.runs.repeating import compare_runs
from metaplug.testing import FIRST_PARTY, Stream, problem

TEST = Stream(split="test")
FIELDS = ("support_losses", "query_losses", "cosines", "learning_rates")


def transform_learning_rates(learning_rates, step):
    """A plugin: the first parameter has a rate of each task's own."""
    first = next(iter(learning_rates))
    own = learning_rates[first] / (1 + step.losses.detach())
    return {**learning_rates, first: own.view(-1, *[1] * (step.parameters[first].ndim - 1))}


def plain(model, tasks, count, steps, lr):
    """The same means from one task after the other, whole gradients and every pair."""
    model = copy.deepcopy(model).train()
    first, *_ = names = [name for name, _ in model.named_parameters()]
    size = sum(each.numel() for each in model.parameters())
    losses, rates, gradients = [], [], [[] for _ in range(steps)]
    for index in range(count):
        x, y, query_x, query_y = one(tasks.batch(0, [index]))
        fast = dict(model.named_parameters())
        for k in range(steps + 1):
            fast = {name: each.detach().requires_grad_() for name, each in fast.items()}
            loss, query = (
                F.cross_entropy(torch.func.functional_call(model, fast, (inputs,)), targets)
                for inputs, targets in ((x, y), (query_x, query_y))
            )
            losses.append((k, loss.item(), query.item()))
            if k == steps:
                break
            taken = torch.autograd.grad(loss, [*fast.values()])
            gradients[k].append(torch.cat([each.flatten() for each in taken]))
            rate = {name: lr / (1 + loss.item()) if name == first else lr for name in names}
            rates.append((k, sum(rate[name] * fast[name].numel() for name in names) / size))
            fast = {
                name: fast[name] - rate[name] * each
                for name, each in zip(names, taken, strict=True)
            }
    pairs = [[*itertools.combinations(each, 2)] for each in gradients]
    return InnerProfile(
        *(by_step(losses, place, steps + 1) for place in (1, 2)),
        tuple(mean([float(F.cosine_similarity(*pair, dim=0)) for pair in each]) for each in pairs),
        by_step(rates, 1, steps),
    )


def by_step(rows, place, steps):
    return tuple(mean([row[place] for row in rows if row[0] == k]) for k in range(steps))


def mean(values):
    return sum(values) / len(values)


def profile(learner, tasks=TEST, count=5, of=6):
    return learner.evaluator.validate(tasks, of, skip=False, profiled=count).inner


def assert_close(ours, exact, error=1e-10):
    for field in FIELDS:
        found, expected = getattr(ours, field), getattr(exact, field)
        assert len(found) == len(expected), field
        assert found == pytest.approx(expected, rel=error, abs=error), field


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
@pytest.mark.parametrize(("model", "steps"), [("mlp", 3), ("conv4", 2), ("mlp", 0)])
def test_it_has_the_numbers_of_a_plain_loop(model, steps, batching):
    case, tasks = problem(model, steps=steps), Stream(model, split="test")
    learner = case.learner(plugins=[transform_learning_rates], task_batching=batching)
    exact = plain(case.model, tasks, 5, steps, case.lr)
    assert_close(profile(learner, tasks), exact)
    assert_close(profile(learner, tasks, 99, 5), exact)


def test_it_does_not_depend_on_what_is_computed_together():
    class Ragged:
        def batch(self, iteration, indices):
            tasks = [
                Stream(support=3 + index % 3, query=2 + index % 2).batch(iteration, [index])
                for index in indices
            ]
            return TaskBatch.from_tasks(tasks)

    case = problem("batch-norm")
    together, alone = (
        case.learner(plugins=[transform_learning_rates], **given)
        for given in ({}, {"chunk_size": 1, "task_batching": "sequential"})
    )
    assert_close(profile(together, Ragged()), profile(alone, Ragged()))


def test_two_ranks_find_what_one_finds():
    def act(world):
        found = [
            profile(problem().learner(chunk_size=size, world=world), count=count)
            for size, count in ((1, 5), (2, 3), (None, 5))
        ]
        return [{field: getattr(each, field) for field in FIELDS} for each in found]

    one_rank = [profile(problem().learner(), count=count) for count in (5, 3, 5)]
    for found in on_ranks(act):
        for ours, exact in zip(found, one_rank, strict=True):
            assert_close(InnerProfile(**ours), exact)


ALGORITHMS = [("plugin", name) for name in registry.names("plugin")] + [
    ("preset", name) for name in registry.names("preset")
]


@pytest.mark.parametrize(("what", "name"), ALGORITHMS)
def test_it_changes_nothing_with_any_algorithm(what, name):
    norm = name == "per-step-batch-norm" or name.startswith("maml++")
    used = {"preset": name}
    if what == "plugin":
        used = {"plugins": [PluginUse(plugin=name, settings=FIRST_PARTY[name])]}
    model = "batch-norm" if norm else "layer-norm"
    learner = problem(model).learner(**used)
    tasks = Stream(model)
    learner.fit(tasks, iterations=1, tasks_per_batch=2)
    before, random = copy.deepcopy(learner.state_dict()), torch.get_rng_state()
    validate = learner.evaluator.validate
    without, found = (validate(tasks, 4, skip=False, profiled=count) for count in (0, 3))
    assert_same(before, learner.state_dict())
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(without.per_task, found.per_task)
    assert without.support_losses == found.support_losses
    assert without.inner is None
    assert len(found.inner.cosines) == found.inner_steps
    assert all(map(math.isfinite, [*found.inner.query_losses, *found.inner.cosines]))


def test_what_draws_at_evaluation_draws_the_same():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, x):
            return self.layer(F.dropout(x, 0.3, training=True))

    def transform_parameters(parameters, step):
        name = "layer.weight"
        return {**parameters, name: parameters[name] + 0.1 * torch.randn(parameters[name].shape)}

    found = []
    for count in (0, 4):
        learner = MetaLearner(Noisy(), plugins=[transform_parameters], seed=3)
        nn.init.eye_(learner.model.layer.weight), nn.init.zeros_(learner.model.layer.bias)
        found.append(learner.evaluator.validate(TEST, 20, skip=False, profiled=count))
    assert torch.equal(found[0].per_task, found[1].per_task)
    assert found[0].support_losses == found[1].support_losses


def test_a_run_without_it_is_the_same_run(tmp_path):
    for count in (0, 3):
        train(tiny(training__profile_tasks=count), tmp_path / f"{count}")
    without, found = (read_metrics(tmp_path / f"{count}") for count in (0, 3))
    inner = [line["validation"].pop("inner") for line in found if "validation" in line]
    assert without == found
    assert [{field: len(each[field]) for field in each} for each in inner] == [
        {"support_losses": 2, "query_losses": 2, "cosines": 1, "learning_rates": 1}
    ] * 3
    for name in ("last.safetensors", "best.safetensors"):
        one, other = (checkpoints.read(tmp_path / f"{count}" / name) for count in (0, 3))
        assert_same({**one, "config": ""}, {**other, "config": ""})
    assert compare_runs(tmp_path / "0", tmp_path / "3").fault is None


def test_numbers_of_two_runs_are_compared_one_by_one(tmp_path):
    train(tiny(), tmp_path / "one")
    train(tiny(), tmp_path / "other")
    metrics = tmp_path / "other" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    inner = next(line["validation"]["inner"] for line in lines if "validation" in line)
    inner["cosines"][0] *= 1 + 1e-6
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fault = compare_runs(tmp_path / "one", tmp_path / "other").fault
    assert fault.startswith("iteration 4 is the first to differ (validation.inner.cosines.0 ")
    assert fault.endswith("largest relative difference 1.0e-06)")


def test_a_damaged_profile_is_not_read(tmp_path):
    train(tiny(training__iterations=1), tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"cosines": [', '"cosines": ["high", '))
    with pytest.raises(RunError) as error:
        read_metrics(tmp_path / "run")
    assert str(error.value) == (
        f"{metrics}, line 1, is not what a run writes (validation.inner.cosines.0: input should be "
        "a valid number): take it from a backup, or train the run anew"
    )


def test_one_task_and_gradients_of_zero_have_no_cosine():
    assert all(map(math.isnan, profile(problem().learner(), count=1).cosines))
    model = nn.Linear(4, 3).double()

    def transform_inner_losses(losses, step):
        return 0 * losses

    learner = MetaLearner(model, plugins=[transform_inner_losses], inner_steps=1)
    found = profile(learner)
    assert all(map(math.isnan, found.cosines))
    assert found.support_losses[0] == found.support_losses[1]


def test_tasks_that_are_lost_make_its_means_nan():
    class Broken(Stream):
        def batch(self, iteration, indices):
            batch = super().batch(iteration, indices)
            rows = [place for place, index in enumerate(indices) if index == 1]
            batch.support_x[rows] = torch.nan
            return batch

    learner = problem().learner()
    with pytest.warns(UserWarning, match="counts for nothing"):
        result = learner.evaluator.validate(Broken(), 4, skip=True, profiled=3)
    assert math.isnan(result.inner.query_losses[-1])
    assert all(map(math.isnan, result.inner.cosines))


def test_a_wrong_number_is_refused():
    with pytest.raises(RequestError) as error:
        problem().learner().fit(Stream(), iterations=1, validation=TEST, profile_tasks=-1)
    assert str(error.value) == "profile_tasks = -1: give at least 0"
