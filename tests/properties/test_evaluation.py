"""Evaluation changes nothing, depends on nothing around it, and keeps test tasks apart."""

import copy
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metaplug_plugins.gradient_sharing import GradientSharing
from torch import nn

from metaplug import MetaLearner, Plugin, PluginUse, RequestError, TaskBatch, hookimpl
from metaplug.contract import registry
from metaplug.contract.presets import find_preset
from metaplug.testing import FIRST_PARTY, Stream, assert_close, problem, reference
from metaplug.testing.strategies import problems

VECTORS = ("mlp", "softplus", "batch-norm", "layer-norm", "group-norm", "tied")
TEST = Stream(split="test")


def trained(case, **options):
    """A learner with gradient sharing whose running means, optimizer and meta-parameters have all
    moved."""
    learner = case.learner(plugins=[GradientSharing(**options)], meta_lr=1e-2)
    learner.fit(Stream(), iterations=2, tasks_per_batch=2)
    return learner


def snapshot(learner):
    """Everything that an evaluation must leave as it was, by value."""
    model = learner.model
    return {
        "state": copy.deepcopy(learner.state_dict()),
        "modes": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [
            None if parameter.grad is None else parameter.grad.clone()
            for parameter in model.parameters()
        ],
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "rng": torch.get_rng_state(),
    }


def assert_same(one, other, path=""):
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{path}.{index}")
    else:
        assert one == other, path


@given(problems(VECTORS, steps=(1, 3), lrs=(0.05, 0.3)), st.booleans(), st.booleans())
def test_evaluation_changes_no_state(case, training, shares):
    learner = trained(case, share_at_evaluation=shares)
    learner.model.train(training)
    for parameter in list(learner.model.parameters())[:2]:
        parameter.grad = torch.ones_like(parameter)
    before = snapshot(learner)
    learner.evaluate(TEST, num_tasks=3)
    learner.adapt(*(getattr(TEST.batch(0, [0]), field)[0] for field in ("support_x", "support_y")))
    learner.meta_gradients(Stream().batch(0, range(2)))
    assert_same(before, snapshot(learner))


def test_the_first_call_of_all_draws_no_random_number_of_the_caller():
    """Trying the model and choosing the batching run its dropout too."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    for batching in ("auto", "vectorized", "sequential"):
        learner = MetaLearner(copy.deepcopy(model), task_batching=batching)
        before = snapshot(learner)
        learner.evaluate(TEST, num_tasks=2)
        assert_same(before, snapshot(learner))


@given(
    problems(VECTORS, steps=(1, 3), lrs=(0.05, 0.3)), st.integers(1, 5), st.permutations(range(5))
)
def test_a_task_does_not_depend_on_its_batch_mates(case, together, order):
    learner = trained(case)
    learner.evaluate(TEST, num_tasks=1)
    alone = [
        learner.engine.evaluate(TEST.batch(0, [index]), case.steps).query_predictions[0]
        for index in range(5)
    ]
    for start in range(0, 5, together):
        indices = order[start : start + together]
        predictions = learner.engine.evaluate(TEST.batch(0, indices), case.steps).query_predictions
        # The same sums in another order, which batch norm amplifies.
        assert_close(
            predictions, torch.stack([alone[index] for index in indices]), rtol=1e-8, atol=1e-8
        )


def algorithms(but=()):
    """Every first-party plugin and preset; slow are presets of one plugin, which is there alone."""
    for name in registry.names("plugin"):
        if name not in but:
            yield f"plugin {name}"
    for name in registry.names("preset"):
        alone = len(find_preset(name).plugins) == 1
        yield pytest.param(f"preset {name}", marks=pytest.mark.slow if alone else ())


def algorithm(which, **settings):
    """A learner by a first-party plugin or preset, trained for two iterations, and test tasks for
    it."""
    what, name = which.split()
    norm = name == "per-step-batch-norm" or name.startswith("maml++")
    model = "batch-norm" if norm else "layer-norm"
    used = (
        {"preset": name}
        if what == "preset"
        else {"plugins": [PluginUse(plugin=name, settings=FIRST_PARTY[name])]}
    )
    learner = problem(model).learner(**used, meta_lr=1e-2, **settings)
    learner.fit(Stream(model), iterations=2, total=5, tasks_per_batch=2)
    return learner, Stream(model, split="test")


@lru_cache(maxsize=1)
def evaluated_alone(which, batching):
    """The learner and the test tasks of every example of the next test, each predicted alone."""
    learner, test = algorithm(which, task_batching=batching)
    assert learner.batching.batching == batching
    steps = learner.settings.inner_steps
    alone = [
        learner.engine.evaluate(test.batch(0, [index]), steps).query_predictions[0]
        for index in range(4)
    ]
    return learner, test, steps, alone


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
@pytest.mark.parametrize("which", [*algorithms()])
@given(together=st.integers(1, 4), order=st.permutations(range(4)), broken=st.integers(0, 3))
@settings(max_examples=3)
def test_a_task_of_any_algorithm_is_alone(which, batching, together, order, broken):
    """Alone, in any batch, in any order, and beside tasks whose inputs are NaN."""
    learner, test, steps, alone = evaluated_alone(which, batching)
    for start in range(0, 4, together):
        indices = order[start : start + together]
        batch = test.batch(0, indices)
        if broken in indices:
            batch.support_x[indices.index(broken)] = torch.nan
            batch.query_x[indices.index(broken)] = torch.nan
        predictions = learner.engine.evaluate(batch, steps).query_predictions
        for index, found in zip(indices, predictions, strict=True):
            if index == broken:
                assert found.isnan().all()
            else:
                assert_close(found, alone[index], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("which", [*algorithms()])
def test_an_evaluation_between_two_steps_changes_no_later_step(which):
    """Weights, plugins, optimizer, metrics and the caller's random stream, bit for bit; as a
    validation and as a call of one's own."""
    states = []
    for evaluates in (False, True):
        torch.manual_seed(0)
        learner, test = algorithm(which)
        records = []
        for record in learner.iterate(
            Stream(test.name),
            iterations=3,
            total=5,
            tasks_per_batch=2,
            validation=test if evaluates else None,
            validate_every=1,
            validation_tasks=3,
        ):
            records.append(record.step)
            if evaluates:
                with torch.inference_mode():
                    learner.evaluate(test, num_tasks=3, tasks_per_batch=2)
        states.append(
            (learner.state_dict(), torch.get_rng_state(), [vars(step) for step in records])
        )
    assert_same(*states)


COUPLING = ("gradient-sharing", "sharp-maml", "taml")
"""Those that couple training tasks, as configured here, and so are refused in chunks."""


@pytest.mark.parametrize("which", [*algorithms(COUPLING)])
def test_a_learner_in_chunks_evaluates_as_one_without(which):
    whole, test = algorithm(which)
    chunked, _ = algorithm(which, chunk_size=1)
    chunked.load_state_dict(whole.state_dict())
    expected, found = (
        learner.evaluate(test, num_tasks=5, tasks_per_batch=each)
        for learner, each in ((whole, 5), (chunked, None))
    )
    assert_close(found.per_task, expected.per_task, rtol=0, atol=1e-12)


def test_a_statistic_that_is_kept_at_evaluation_is_never_committed():
    class Keeper(Plugin):
        @hookimpl
        def setup(self):
            self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

        @hookimpl
        def transform_inner_losses(self, losses, step):
            step.keep("loss", losses.mean())

        @hookimpl
        def commit(self, kept):
            self.seen += kept["loss"]

    learner = problem().learner(plugins=[Keeper()])
    learner.fit(Stream(), iterations=1)
    seen = learner.chain.plugins[0].seen.clone()
    assert seen != 0
    first = learner.evaluate(TEST, num_tasks=4)
    again = learner.evaluate(TEST, num_tasks=4)
    assert torch.equal(learner.chain.plugins[0].seen, seen)
    assert torch.equal(first.per_task, again.per_task)


@given(problems(("mlp", "softplus"), steps=(1, 3), lrs=(0.05, 0.3)), st.integers(1, 7))
def test_the_result_does_not_depend_on_how_many_are_computed_together(case, together):
    learner = trained(case)
    expected = learner.evaluate(TEST, num_tasks=7, tasks_per_batch=7)
    result = learner.evaluate(TEST, num_tasks=7, tasks_per_batch=together)
    assert torch.equal(result.per_task, expected.per_task)
    assert result.per_task.dtype == torch.float64
    assert result.num_tasks == 7


@given(problems(), st.sampled_from(["vectorized", "sequential"]))
def test_evaluation_adapts_as_a_plain_loop_does(case, batching):
    """Batch norm by the statistics of the task's own batch, in evaluation mode too."""
    expected = reference.maml(case.model, case.batch, steps=case.steps, lr=case.lr, order=1)
    predictions = [
        reference.predict(case.model, expected.adapted[task], x)
        for task, x in enumerate(case.batch.query_x)
    ]
    learner = case.learner(task_batching=batching)
    learner.meta_gradients(case.batch)
    outcome = learner.engine.evaluate(case.batch, case.steps)
    assert_close(outcome.query_predictions, torch.stack(predictions).detach(), rtol=1e-8, atol=1e-9)
    for name, weight in outcome.adapted_parameters.items():
        assert_close(
            weight, torch.stack([task[name] for task in expected.adapted]), rtol=1e-8, atol=1e-9
        )


def test_a_plugin_that_draws_at_evaluation_draws_the_same_every_time():
    class Noise(Plugin):
        @hookimpl
        def transform_gradients(self, gradients):
            return {
                name: gradient + torch.randn_like(gradient) for name, gradient in gradients.items()
            }

    learner = problem().learner(plugins=[Noise()])
    learner.evaluate(TEST, num_tasks=1)
    before = torch.get_rng_state()
    first, again = (
        learner.engine.evaluate(TEST.batch(0, [0]), 2).query_predictions for _ in range(2)
    )
    assert torch.equal(first, again)
    assert torch.equal(before, torch.get_rng_state())


def test_the_running_mean_is_used_as_stored():
    """θ[k+1] = θ[k] − α [(1 − σ(λ)) g + σ(λ) ‖g‖ r] with r from training, whatever the test tasks
    are."""
    case = problem(steps=1)
    learner = trained(case)
    plugin = learner.chain.plugins[0]
    batch = TEST.batch(0, range(3))
    adapted = learner.engine.evaluate(batch, 1).adapted_parameters
    gate = torch.sigmoid(plugin.gate.detach()[0, 0])
    for task in range(3):
        model = copy.deepcopy(learner.model)
        loss = nn.functional.cross_entropy(model(batch.support_x[task]), batch.support_y[task])
        flat = torch.cat(
            [gradient.flatten() for gradient in torch.autograd.grad(loss, list(model.parameters()))]
        )
        direction = (1 - gate) * flat + gate * flat.norm() * plugin.running[0]
        expected = nn.utils.parameters_to_vector(model.parameters()).detach() - case.lr * direction
        assert_close(torch.cat([weight[task].flatten() for weight in adapted.values()]), expected)


def test_sharing_before_training_is_the_identity_at_evaluation():
    case = problem("batch-norm")
    for steps in (1, 2, 5):
        plain, shared = (
            case.learner(inner_steps=5),
            case.learner(inner_steps=5, plugins=[GradientSharing(gate=1.0)]),
        )
        results = [
            learner.evaluate(TEST, num_tasks=4, inner_steps=steps).per_task
            for learner in (plain, shared)
        ]
        assert torch.equal(*results)


@pytest.mark.parametrize("batching", ["vectorized", "sequential", "auto"])
@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_surroundings_do_not_reach_in(surroundings, batching):
    """Not even on a learner's first call, and with tasks that were made inside."""
    case = problem("batch-norm")
    learner, other = (
        case.learner(plugins=[GradientSharing()], task_batching=batching) for _ in range(2)
    )
    expected = learner.evaluate(TEST, num_tasks=4), learner.meta_gradients(case.batch)
    with surroundings():
        result = (
            other.evaluate(Stream(split="test"), num_tasks=4),
            other.meta_gradients(problem("batch-norm").batch),
        )
    assert other.batching == learner.batching
    assert torch.equal(result[0].per_task, expected[0].per_task)
    assert_same(dict(result[1]), dict(expected[1]))
    mixed = problem("batch-norm").batch
    with torch.inference_mode():
        labels = mixed.support_y.clone()
    assert_same(
        other.meta_gradients(TaskBatch(mixed.support_x, labels, mixed.query_x, mixed.query_y)),
        dict(expected[1]),
    )


def test_training_inside_inference_mode_can_go_on_outside():
    one, other = problem().learner(), problem().learner()
    with torch.inference_mode():
        one.fit(Stream(), iterations=2)
    one.fit(Stream(), iterations=1)
    other.fit(Stream(), iterations=3)
    assert_same(one.state_dict(), other.state_dict())


def test_evaluation_takes_no_graph():
    learner = trained(problem())
    outcome = learner.engine.evaluate(TEST.batch(0, range(2)), 2)
    values = [
        *outcome.adapted_parameters.values(),
        *outcome.query_losses.values(),
        outcome.query_predictions,
    ]
    assert all(value.grad_fn is None for value in values)


def test_a_mean_over_test_tasks_is_refused():
    class Leaky(Plugin):
        couples_tasks = True

        @hookimpl
        def transform_gradients(self, gradients, step):
            return {
                name: step.task_mean(gradient).expand_as(gradient)
                for name, gradient in gradients.items()
            }

    learner = problem().learner(plugins=[Leaky()])
    learner.fit(Stream(), iterations=1)
    with pytest.raises(RequestError) as error:
        learner.evaluate(TEST, num_tasks=2)
    assert str(error.value) == (
        "plugin 'leaky' takes a mean over test tasks, which must not see each other: use what was "
        "stored in training "
        "when step.training is False"
    )


def test_what_lets_test_examples_see_each_other_is_named():
    def reasons(name, **options):
        return (
            problem(name)
            .learner(plugins=[GradientSharing(**options)])
            .evaluate(TEST, num_tasks=2)
            .transductive
        )

    sharing = "plugin gradient-sharing sees more than a task's support set"
    batch_norm = "batch norm uses the statistics of each task's own batch"
    assert reasons("mlp") == ()
    assert reasons("mlp", share_at_evaluation=True) == (sharing,)
    assert reasons("mlp", share_at_evaluation=True, gate=0.0) == ()
    assert reasons("batch-norm") == (batch_norm,)
    assert reasons("batch-norm", share_at_evaluation=True) == (sharing, batch_norm)
    frozen = problem("batch-norm").learner(batch_norm="frozen")
    assert frozen.evaluate(TEST, num_tasks=2).transductive == ()


def test_a_plugin_of_others_is_named_where_it_lets_test_tasks_share():
    class Centred(Plugin):
        couples_tasks = True

        @property
        def transductive(self):
            return True

        @hookimpl
        def transform_gradients(self, gradients, step):
            return {
                name: gradient - step.task_mean(gradient) for name, gradient in gradients.items()
            }

    class Apart(Plugin):
        @hookimpl
        def transform_gradients(self, gradients):
            return {name: gradient.clamp(-1, 1) for name, gradient in gradients.items()}

    result = problem().learner(plugins=[Apart(), Centred()]).evaluate(TEST, num_tasks=3)
    assert result.transductive == ("plugin centred sees more than a task's support set",)
    assert str(result).endswith(
        "(95 % interval over 3 tasks; transductive: plugin centred sees more than a task's "
        "support set)"
    )
    assert str(problem().learner(plugins=[Apart()]).evaluate(TEST, num_tasks=3)).endswith(
        "transductive: no)"
    )


def test_batch_norm_without_stored_statistics_is_transductive_even_when_frozen():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)
    ).double()
    learner = MetaLearner(model, batch_norm="batch")
    assert learner.transductive == ("batch norm uses the statistics of each task's own batch",)
    assert MetaLearner(nn.Linear(4, 3)).transductive == ()


def test_sharing_at_evaluation_does_couple_the_test_tasks():
    learner = trained(problem(), share_at_evaluation=True, gate=0.9)
    alone, together = (
        learner.engine.evaluate(TEST.batch(0, range(count)), 2).query_predictions[0]
        for count in (1, 4)
    )
    assert not torch.allclose(alone, together, rtol=1e-3)


def test_dropout_is_off_at_evaluation_and_after_adapting():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    plain = nn.Sequential(model[0], nn.Identity(), model[2])
    learners = [MetaLearner(copy.deepcopy(each)) for each in (model, plain)]
    outcomes = []
    for learner in learners:
        learner.evaluate(TEST, num_tasks=1)
        outcomes.append(learner.engine.evaluate(TEST.batch(0, range(3)), 4).query_predictions)
    assert torch.equal(*outcomes)
    task = TEST.batch(0, [0])
    adapted = learners[0].adapt(task.support_x[0], task.support_y[0])
    assert not any(module.training for module in adapted.modules())
    assert torch.equal(adapted(task.query_x[0]), adapted(task.query_x[0]))


@pytest.mark.parametrize("counts", [{"num_tasks": 0}, {"tasks_per_batch": 0}, {"num_tasks": -1}])
def test_counts_below_one_are_refused(counts):
    name, value = next(iter(counts.items()))
    with pytest.raises(RequestError, match=f"^{name} = {value}: give at least 1$"):
        problem().learner().evaluate(TEST, **counts)
