"""The members of the family against independent loops written from their equations, and against
each other: invariants 7, 8 and 9."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import plugins
from torch import nn
from torch.nn import functional as F

from metaplug import MetaLearner, PluginUse, Preset, TaskBatch, epoch_of
from metaplug.contract import registry
from metaplug.testing import (
    MODELS,
    Problem,
    Stream,
    adapted,
    assert_close,
    found,
    problem,
    reference,
)
from metaplug.testing.strategies import problems, seeds

LOOSE = {
    "rtol": 1e-8,
    "atol": 1e-9,
}  # over drawn models: a feature that hardly varies makes batch norm amplify rounding
EXACT = {"rtol": 1e-10, "atol": 1e-10}
WITH_NORM = ("batch-norm", "conv4")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def drawn(like, seed, scale=1.0):
    """A leaf of random numbers around `like`."""
    noise = torch.randn(like.shape, dtype=like.dtype, generator=generator(seed))
    return (like.detach() + scale * noise).requires_grad_()


def bits_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def set_values(learner, values):
    """Put values into the plugins' meta-parameters, by "PLUGIN.NAME"."""
    for name, value in values.items():
        learner.engine.meta_parameters[name].data.copy_(value.detach())


# 7. What a plugin adds is nothing, at the setting that adds nothing: bit for bit.

BEGINS = ("aruba", "meta-curvature", "meta-sgd", "per-step-learning-rates")
"""Those that learn away from MAML, where they begin."""
ALWAYS_ON = {
    *("cavia", "imaml", "lora", "partial-adaptation", "per-step-batch-norm", "proto-maml"),
    *("reptile", "warp-grad"),
}


def test_every_plugin_is_held_to_its_off_setting_or_has_none():
    off = {*plugins.OFF} - {"partial-adaptation"}  # which then adapts all
    assert sorted([*off, *BEGINS, *ALWAYS_ON]) == sorted(plugins.NAMES)


@pytest.mark.parametrize("name", BEGINS)
@given(problems(steps=(1, 3), lrs=(0.05, 0.5)))
def test_it_begins_as_maml_bit_for_bit(name, case):
    """LSLR with all rates equal, Meta-SGD with α constant, identity curvature, …"""
    plain, ours = case.learner(), case.learner(plugins=[name])
    assert bits_equal(adapted(ours, case.batch), adapted(plain, case.batch))
    found_here = {
        key: gradient
        for key, gradient in ours.meta_gradients(case.batch).items()
        if not key.startswith(name)
    }
    assert bits_equal(found_here, plain.meta_gradients(case.batch))


@given(problems(WITH_NORM, steps=(1, 3), lrs=(0.05, 0.5)))
def test_per_step_batch_norm_begins_as_maml_that_does_not_adapt_batch_norm(case):
    norms = [
        f"{name}.{part}"
        for name, layer in case.model.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        for part in ("weight", "bias")
    ]
    rest = [name for name, _ in case.model.named_parameters() if name not in norms]
    plain = case.learner(
        plugins=[plugins.make("partial-adaptation", adapts="body", head=tuple(norms))]
    )
    ours = case.learner(plugins=[plugins.make("per-step-batch-norm")])
    gradients, expected = ours.meta_gradients(case.batch), plain.meta_gradients(case.batch)
    assert_close(
        {name: gradients[name] for name in rest}, {name: expected[name] for name in rest}, **LOOSE
    )
    for name in norms:
        assert name not in gradients, "the model's own values are no longer used"
        key = f"per-step-batch-norm.values.{name.replace('.', '/')}"
        assert_close(gradients[key].sum(0), expected[name], **LOOSE)


# MAML++, part by part: per-step learning rates.


@given(problems(steps=(1, 3), lrs=(0.05, 0.5)), seeds, st.sampled_from([1, 2]))
def test_per_step_learning_rates_equal_a_plain_loop(case, seed, order):
    learner = case.learner(
        preset="maml" if order == 2 else "fomaml", plugins=["per-step-learning-rates"]
    )
    names = list(learner.engine.inner.adapted)
    rates = drawn(torch.full((case.steps, len(names)), 0.2, dtype=torch.float64), seed, 0.1)
    key = "per-step-learning-rates.rates"
    set_values(learner, {key: rates})
    assert learner.engine.meta_parameters[key].shape == (case.steps, len(names))
    expected = reference.loop(
        case.model,
        case.batch,
        steps=case.steps,
        rate=lambda k, name: rates[k, names.index(name)],
        order=order,
        extra={key: rates},
    )
    ours = found(learner, case.batch)
    assert_close(ours.gradients, expected.gradients, **LOOSE)
    for name, weight in ours.outcome.adapted_parameters.items():
        assert_close(
            weight.detach(), torch.stack([task[name] for task in expected.adapted]), **LOOSE
        )


# Meta-SGD.


@given(problems(steps=(1, 3), lrs=(0.05, 0.5)), seeds, st.sampled_from([1, 2]))
def test_meta_sgd_equals_a_plain_loop_negative_rates_included(case, seed, order):
    learner = case.learner(preset="maml" if order == 2 else "fomaml", plugins=["meta-sgd"])
    rates = {
        name: drawn(torch.full_like(parameter, 0.1), seed + index, 0.2)
        for index, (name, parameter) in enumerate(case.model.named_parameters())
    }
    extra = {f"meta-sgd.rates.{name.replace('.', '/')}": rate for name, rate in rates.items()}
    set_values(learner, extra)
    expected = reference.loop(
        case.model,
        case.batch,
        steps=case.steps,
        rate=lambda k, name: rates[name],
        order=order,
        extra=extra,
    )
    assert_close(learner.meta_gradients(case.batch), expected.gradients, **LOOSE)


@given(problems(steps=(1, 3), lrs=(0.05, 0.5)), seeds)
def test_rates_of_two_plugins_multiply_in_either_order(case, seed):
    names = ("per-step-learning-rates", "meta-sgd")
    results = []
    for order in (names, names[::-1]):
        learner = case.learner(plugins=list(order))
        for index, name in enumerate(sorted(learner.engine.meta_parameters)):
            if "." in name and name.startswith(names):
                parameter = learner.engine.meta_parameters[name]
                parameter.data = drawn(parameter, seed + index, 0.1).detach()
        results.append(learner.meta_gradients(case.batch))
    assert_close(results[0], results[1], **LOOSE)


# Multi-step loss.


@pytest.mark.parametrize(
    ("steps", "annealing", "epoch", "weights"),
    [
        (5, 10, 0, [0.2] * 5),
        (5, 10, 5, [0.1, 0.1, 0.1, 0.1, 0.6]),
        (5, 10, 9, [0.02, 0.02, 0.02, 0.02, 0.92]),
        (5, 10, 10, [0, 0, 0, 0, 1]),
        (5, 10, 99, [0, 0, 0, 0, 1]),
        (5, 100, 99, [0.006, 0.006, 0.006, 0.006, 0.976]),
        (3, 15, 7, [8 / 45, 8 / 45, 29 / 45]),
        (1, 10, 3, [1]),
        (4, 0, 0, [0, 0, 0, 1]),
    ],
)
def test_weights_of_the_multi_step_loss_at_chosen_epochs(steps, annealing, epoch, weights):
    plugin = plugins.make("multi-step-loss", annealing_epochs=annealing, iterations_per_epoch=500)
    for iteration in (500 * epoch, 500 * epoch + 499):
        answered = plugin.outer_step_weights(iteration=iteration, inner_steps=steps, total=50_000)
        assert answered == pytest.approx(weights, abs=1e-12)
    by_hundredths = plugins.make("multi-step-loss", annealing_epochs=annealing)
    assert by_hundredths.outer_step_weights(
        iteration=4 * epoch, inner_steps=steps, total=400
    ) == pytest.approx(weights, abs=1e-12)


@given(st.integers(1, 20), st.integers(0, 30), st.integers(0, 60_000), st.floats(0, 1))
def test_weights_of_the_multi_step_loss_sum_to_one_and_are_not_negative(
    steps, annealing, iteration, floor
):
    plugin = plugins.make(
        "multi-step-loss", annealing_epochs=annealing, floor=floor, iterations_per_epoch=500
    )
    weights = plugin.outer_step_weights(iteration=iteration, inner_steps=steps, total=60_000)
    epoch = iteration // 500
    expected = (
        [max(1 / steps - epoch / (steps * annealing), floor / steps)] * (steps - 1)
        if epoch < annealing
        else [0] * (steps - 1)
    )
    assert weights == pytest.approx([*expected, 1 - sum(expected)], abs=1e-12)
    assert min(weights) >= -1e-15
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12)


@given(problems(steps=(1, 3), lrs=(0.05, 0.5)), st.integers(0, 12), st.sampled_from([1, 2]))
def test_the_multi_step_loss_equals_a_plain_loop(case, epoch, order):
    plugin = plugins.make("multi-step-loss", iterations_per_epoch=1)
    learner = case.learner(preset="maml" if order == 2 else "fomaml", plugins=[plugin])
    found(learner, case.batch)
    weights = plugin.outer_step_weights(iteration=epoch, inner_steps=case.steps, total=100)
    expected = reference.loop(
        case.model,
        case.batch,
        steps=case.steps,
        rate=lambda k, name: case.lr,
        outer_weights=weights,
        order=order,
    )
    ours = learner.engine.meta_gradients(case.batch, epoch, 100)
    assert_close(ours.gradients, expected.gradients, **LOOSE)
    assert_close(ours.outer_loss, expected.outer_loss, **LOOSE)
    assert set(ours.outcome.query_losses) == {
        after for after, weight in enumerate(weights, 1) if weight
    }, "no loss without weight is computed"


# Derivative-order annealing.


@given(problems(steps=(1, 3)), st.integers(0, 5), st.sampled_from([None, 1, 3]))
def test_second_order_begins_at_the_epoch_of_the_switch(case, switch, length):
    learner = case.learner(
        plugins=[plugins.make("derivative-order", switch=switch, iterations_per_epoch=length)]
    )
    orders = {
        1: case.learner(preset="fomaml").meta_gradients(case.batch),
        2: case.learner().meta_gradients(case.batch),
    }
    found(learner, case.batch)
    for iteration in range(0, 40, 7):
        epoch = 100 * iteration // 400 if length is None else iteration // length
        ours = learner.engine.meta_gradients(case.batch, iteration, 400).gradients
        assert bits_equal(dict(ours), orders[2 if epoch >= switch else 1])


# Per-step batch norm.


@given(problems(WITH_NORM, steps=(1, 3), lrs=(0.05, 0.5)), seeds)
def test_per_step_batch_norm_equals_a_plain_loop(case, seed):
    learner = case.learner(plugins=["per-step-batch-norm"])
    extra = {
        name: drawn(parameter, seed + index, 0.3)
        for index, (name, parameter) in enumerate(learner.engine.meta_parameters.items())
        if name.startswith("per-step-batch-norm")
    }
    set_values(learner, extra)
    by_name = {
        name.removeprefix("per-step-batch-norm.values.").replace("/", "."): value
        for name, value in extra.items()
    }
    assert all(
        value.shape == (case.steps, *dict(case.model.named_parameters())[name].shape)
        for name, value in by_name.items()
    )
    expected = reference.loop(
        case.model,
        case.batch,
        steps=case.steps,
        rate=lambda k, name: case.lr,
        adapted=[name for name, _ in case.model.named_parameters() if name not in by_name],
        values=lambda k: {name: value[k] for name, value in by_name.items()},
        extra=extra,
    )
    assert_close(learner.meta_gradients(case.batch), expected.gradients, **LOOSE)


# MAML++ as a whole.


@pytest.mark.parametrize("preset", ["maml++", "maml++-reference"])
@pytest.mark.parametrize("iteration", [0, 40, 49, 50, 99])
@pytest.mark.parametrize("name", WITH_NORM)
def test_the_whole_of_maml_plus_plus_equals_a_straight_line(preset, iteration, name):
    """All parts at once, with random rates, scales and shifts, from the equations; an epoch is one
    iteration here."""
    case = problem(name, steps=3, tasks=2)
    uses = [
        PluginUse(
            plugin=use.plugin,
            settings={
                **use.settings,
                **({"iterations_per_epoch": 1} if "iterations_per_epoch" in use.settings else {}),
            },
        )
        for use in registry.load("preset", preset).plugins
    ]
    learner = case.learner(preset=Preset(name="same", plugins=tuple(uses)))
    key, prefix = "per-step-learning-rates.rates", "per-step-batch-norm.values."
    names = list(learner.engine.inner.adapted)
    extra = {
        parameter_name: drawn(parameter, index, 0.1)
        for index, (parameter_name, parameter) in enumerate(learner.engine.meta_parameters.items())
        if parameter_name.startswith(("per-step",))
    }
    set_values(learner, extra)
    weights = [max(1 / 3 - iteration / 30, 0.01)] * 2 if iteration < 10 else [0.0, 0.0]
    expected = reference.loop(
        case.model,
        case.batch,
        steps=3,
        rate=lambda k, each: extra[key][k, names.index(each)],
        outer_weights=[*weights, 1 - sum(weights)],
        order=1 if preset == "maml++" and iteration < 50 else 2,
        adapted=names,
        values=lambda k: {
            each.removeprefix(prefix).replace("/", "."): value[k]
            for each, value in extra.items()
            if each.startswith(prefix)
        },
        extra=extra,
    )
    found(learner, case.batch)
    assert_close(
        learner.engine.meta_gradients(case.batch, iteration, 100).gradients,
        expected.gradients,
        **EXACT,
    )
    factor = learner.chain.fold("scale_meta_learning_rate", 1.0, iteration=iteration, total=100)
    assert 1e-3 * factor == pytest.approx(
        1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * iteration / 100)) / 2, rel=1e-12
    )


def test_the_cosine_steps_by_epoch_and_ends_at_its_final_factor():
    plugin = plugins.make("cosine-meta-lr", final_factor=0.2, iterations_per_epoch=10)
    factors = [
        plugin.scale_meta_learning_rate(factor=2.0, iteration=iteration, total=100)
        for iteration in range(101)
    ]
    assert factors[0] == 2.0
    assert factors[:10] == [2.0] * 10
    assert factors[50:60] == [pytest.approx(2 * 0.6)] * 10
    assert factors[100] == pytest.approx(0.4)
    learner = problem().learner(
        plugins=[plugins.make("cosine-meta-lr", final_factor=0.0)], meta_lr=0.5
    )
    rates = [record.step.meta_lr for record in learner.iterate(Stream(), iterations=4)]
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)])


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 1000))
def test_epochs_are_counted_in_iterations_or_hundredths_of_the_run(iteration, total, length):
    assert epoch_of(iteration, total, length) == iteration // length
    assert epoch_of(iteration, total, None) == (math.floor(100 * iteration / total) if total else 0)


# 9. ANIL and BOIL share the parameters between them.


@given(problems(steps=(1, 3), lrs=(0.1, 0.5)))
def test_anil_and_boil_partition_the_parameters_and_equal_a_plain_loop(case):
    parts = {}
    for preset in ("anil", "boil"):
        learner = case.learner(preset=preset)
        ours = found(learner, case.batch)
        parts[preset] = set(learner.engine.inner.adapted)
        for name, weight in ours.outcome.adapted_parameters.items():
            moved = not torch.equal(weight, ours.outcome.initial_parameters[name])
            assert not moved or name in parts[preset]
        expected = reference.loop(
            case.model,
            case.batch,
            steps=case.steps,
            rate=lambda k, name: case.lr,
            adapted=parts[preset],
        )
        assert_close(ours.gradients, expected.gradients, **LOOSE)
    names = [name for name, _ in case.model.named_parameters()]
    last = names[-1].rpartition(".")[0]
    assert parts["anil"] == {name for name in names if name.startswith(f"{last}.")}
    assert parts["anil"] | parts["boil"] == set(names)
    assert not parts["anil"] & parts["boil"]


@given(
    problems(("softplus",)),
    st.lists(
        st.sampled_from(["0.*", "*.bias", "2.weight", "4.?eight"]),
        min_size=1,
        max_size=3,
        unique=True,
    ),
)
def test_patterns_choose_and_their_complement_is_the_body(case, patterns):
    parts = [
        set(
            case.learner(
                plugins=[plugins.make("partial-adaptation", adapts=adapts, head=tuple(patterns))]
            ).engine.inner.adapted
        )
        for adapts in ("head", "body")
    ]
    matching = {
        "0.*": {"0.weight", "0.bias"},
        "*.bias": {"0.bias", "2.bias", "4.bias"},
        "2.weight": {"2.weight"},
        "4.?eight": {"4.weight"},
    }
    assert parts[0] == set.union(*(matching[pattern] for pattern in patterns))
    assert parts[0] | parts[1] == {name for name, _ in case.model.named_parameters()}
    assert not parts[0] & parts[1]


# Reptile.


@given(
    problems(steps=(1, 3), lrs=(0.05, 0.5)),
    st.floats(0.1, 1),
    st.sampled_from([[], ["derivative-order"]]),
)
def test_reptile_moves_the_weights_towards_the_tasks(case, epsilon, beside):
    """θ ← θ + ε · mean(θ[t,K] − θ), whatever the query examples."""
    plain = reference.loop(case.model, case.batch, steps=case.steps, rate=lambda k, name: case.lr)
    learner = case.learner(plugins=[*beside, "reptile"], meta_optimizer="sgd", meta_lr=epsilon)

    class Once:
        split = "train"

        def batch(self, iteration, indices):
            return case.batch

    learner.fit(Once(), iterations=1)
    for name, start in case.model.named_parameters():
        end = torch.stack([task[name] for task in plain.adapted]).mean(0)
        assert_close(
            dict(learner.model.named_parameters())[name].detach(),
            (start + epsilon * (end - start)).detach(),
            **LOOSE,
        )


@given(problems(steps=(1, 3), lrs=(0.05, 0.5)))
def test_reptile_leaves_to_the_outer_loss_what_the_inner_loop_does_not_move(case):
    for plugin in ("per-step-learning-rates", "partial-adaptation"):
        learner = case.learner(plugins=[plugin, "reptile"])
        usual = case.learner(plugins=[plugin]).meta_gradients(case.batch)
        gradients = learner.meta_gradients(case.batch)
        moved = set(learner.engine.inner.adapted)
        assert_close(
            {name: gradient for name, gradient in gradients.items() if name not in moved},
            {name: gradient for name, gradient in usual.items() if name not in moved},
            **LOOSE,
        )


# Regularisers of the inner loop.


@given(problems(steps=(1, 3), lrs=(0.05, 0.3)), st.floats(0, 2))
def test_weight_decay_to_init_equals_a_plain_loop(case, strength):
    def inner(objective, weights, start, prediction, target):
        return objective + strength / 2 * sum(
            (weights[name] - start[name]).square().sum() for name in start
        )

    expected = reference.loop(
        case.model, case.batch, steps=case.steps, rate=lambda k, name: case.lr, inner=inner
    )
    learner = case.learner(plugins=[plugins.make("weight-decay-to-init", strength=strength)])
    assert_close(learner.meta_gradients(case.batch), expected.gradients, **LOOSE)


@given(problems(steps=(1, 3), lrs=(0.05, 0.5)), st.floats(0, 1), st.sampled_from([1, 2]))
def test_label_smoothing_is_cross_entropy_against_the_smoothed_label(case, smoothing, order):
    def inner(objective, weights, start, prediction, target):
        return F.cross_entropy(prediction, target, label_smoothing=smoothing)

    expected = reference.loop(
        case.model,
        case.batch,
        steps=case.steps,
        rate=lambda k, name: case.lr,
        inner=inner,
        order=order,
    )
    learner = case.learner(
        preset="maml" if order == 2 else "fomaml",
        plugins=[plugins.make("label-smoothing", smoothing=smoothing)],
    )
    assert_close(learner.meta_gradients(case.batch), expected.gradients, **LOOSE)


def test_label_smoothing_leaves_out_ignored_targets():
    case = problem(tasks=3)
    case.batch.support_y[0, 0] = case.batch.support_y[2, 1] = -100

    def inner(objective, weights, start, prediction, target):
        return F.cross_entropy(prediction, target, label_smoothing=0.3)

    expected = reference.loop(
        case.model, case.batch, steps=case.steps, rate=lambda k, name: case.lr, inner=inner
    )
    learner = case.learner(plugins=[plugins.make("label-smoothing", smoothing=0.3)])
    assert_close(learner.meta_gradients(case.batch), expected.gradients, **LOOSE)


# Meta-curvature.


@given(problems(steps=(1, 2), lrs=(0.05, 0.3)), seeds)
def test_meta_curvature_is_a_kronecker_product(case, seed):
    learner = case.learner(plugins=["meta-curvature"])
    extra = {
        name: drawn(parameter, seed + index, 0.2)
        for index, (name, parameter) in enumerate(learner.engine.meta_parameters.items())
        if name.startswith("meta-curvature")
    }
    set_values(learner, extra)

    def transform(k, name, gradient):
        keys = [
            f"meta-curvature.matrices.{name.replace('.', '/')}/{axis}"
            for axis in ("out", "in", "place")
        ]
        product = torch.ones(1, 1, dtype=gradient.dtype)
        for key in keys:
            product = torch.kron(product, extra[key]) if key in extra else product
        return (product @ gradient.flatten()).view_as(gradient)

    expected = reference.loop(
        case.model,
        case.batch,
        steps=case.steps,
        rate=lambda k, name: case.lr,
        transform=transform,
        extra=extra,
    )
    assert_close(learner.meta_gradients(case.batch), expected.gradients, **LOOSE)


# Gradient noise.


@given(
    problems(("mlp", "conv4"), steps=(1, 1)),
    st.integers(0, 50),
    st.floats(0.01, 4),
    st.floats(0, 2),
)
def test_gradient_noise_follows_from_the_iteration_and_has_its_deviation(
    case, iteration, scale, decay
):
    learner = case.learner(
        plugins=[plugins.make("gradient-noise", scale=scale, decay=decay)], inner_lr=1.0
    )
    found(learner, case.batch)
    clean, one, again, other = (
        torch.cat(
            [
                weight.detach().flatten()
                for weight in each.engine.meta_gradients(
                    case.batch, i, 0
                ).outcome.adapted_parameters.values()
            ]
        )
        for each, i in (
            (case.learner(inner_lr=1.0), 0),
            (learner, iteration),
            (learner, iteration),
            (learner, iteration + 1),
        )
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    deviation = (scale / (1 + iteration) ** decay) ** 0.5
    # Of n normal numbers the standard deviation scatters by about 1 / √(2n): five of these.
    assert float((one - clean).std()) == pytest.approx(deviation, rel=5 / (2 * len(one)) ** 0.5)


def test_gradient_noise_leaves_evaluation_alone():
    case = problem()
    results = [
        case.learner(plugins=chain).evaluate(Stream(split="test"), num_tasks=3).per_task
        for chain in ([], ["gradient-noise"])
    ]
    assert torch.equal(*results)


# Every preset has a meaning that finite differences can check.


@pytest.mark.parametrize("preset", ["maml", "meta-sgd", "maml++-reference", "anil", "boil"])
def test_second_order_presets_equal_finite_differences(preset):
    case = problem("batch-norm", steps=2)
    learner = case.learner(preset=preset)
    gradients = learner.meta_gradients(case.batch)
    parameters = {
        name: parameter
        for name, parameter in learner.engine.meta_parameters.items()
        if name in gradients
    }
    direction = {
        name: torch.randn(parameter.shape, dtype=torch.float64, generator=generator(1))
        for name, parameter in parameters.items()
    }
    slope = sum(float((gradients[name] * direction[name]).sum()) for name in parameters)
    start, losses, h = (
        {name: parameter.detach().clone() for name, parameter in parameters.items()},
        [],
        1e-5,
    )
    for sign in (1, -1):
        for name, parameter in parameters.items():
            parameter.data = start[name] + sign * h * direction[name]
        losses.append(float(found(learner, case.batch).outer_loss))
    assert (losses[0] - losses[1]) / (2 * h) == pytest.approx(slope, rel=1e-6)


def test_defaults_of_a_preset_reach_a_learner_in_python_under_what_is_given():
    learner = problem().learner(preset="reptile")
    assert isinstance(learner.engine.optimizer, torch.optim.SGD)
    assert learner.settings.meta_optimizer == "sgd"
    reference_settings = MetaLearner(MODELS["conv4"](), preset="maml++-reference").settings
    assert (
        reference_settings.inner_lr,
        reference_settings.inner_steps,
        reference_settings.meta_lr,
    ) == (0.1, 5, 1e-3)
    given = MetaLearner(MODELS["conv4"](), preset="maml++-reference", inner_steps=2).settings
    assert (given.inner_lr, given.inner_steps) == (0.1, 2)


def test_a_regression_problem_goes_through_reptile_and_meta_sgd():
    batch = TaskBatch(
        *(
            torch.randn(2, 4, 1, generator=generator(index), dtype=torch.float64)
            for index in range(4)
        )
    )
    model = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    for preset in ("reptile", "meta-sgd"):
        gradients = (
            Problem(model, batch, 0.1, 2)
            .learner(preset=preset, kind="regression")
            .meta_gradients(batch)
        )
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
