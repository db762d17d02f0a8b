"""Gradient sharing beyond its paper: conditioned, streaming, learned or reused statistics."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from metaplug_plugins.gradient_sharing import GradientSharing
from support.plugins import Spy

from metaplug import MetaLearner, RequestError, RunError, TaskBatch
from metaplug.testing import Stream, assert_close, found, problem, reference
from metaplug.testing.problems import WITH_BATCH_NORM
from metaplug.testing.strategies import problems, seeds, weights

LOOSE = {"rtol": 1e-8, "atol": 1e-9}


def spied(learner, batch):
    """By step, the gradients g before and the directions d after sharing; and what was kept."""
    before, _, after = learner.chain.plugins
    kept = found(learner, batch).outcome.statistics.get("gradient-sharing", {})
    return [(before.seen[k], after.seen[k]) for k in sorted(before.seen)], kept


def sharing_between_spies(case, **options):
    return case.learner(plugins=[Spy(name="before"), GradientSharing(**options), Spy(name="after")])


def remember(learner, seed):
    """Give gradient sharing a random past, of the length that a mean of unit vectors may have."""
    plugin = next(plugin for plugin in learner.chain.plugins if isinstance(plugin, GradientSharing))
    past = torch.randn(
        plugin.running.shape,
        dtype=plugin.running.dtype,
        generator=torch.Generator().manual_seed(seed),
    )
    past = past / past.norm(dim=1, keepdim=True) * 0.7
    plugin.commit(kept={str(k): row for k, row in enumerate(past)})
    return past


def one(batch, task):
    return TaskBatch(
        *(
            getattr(batch, field)[task : task + 1]
            for field in ("support_x", "support_y", "query_x", "query_y")
        )
    )


# Conditioned on the task.


@given(
    problems(tasks=(1, 4), steps=(1, 3)),
    weights,
    weights,
    st.sampled_from(["step", "tensor", "step-and-tensor", "one"]),
)
def test_conditioning_begins_as_no_conditioning(case, gate, momentum, granularity):
    """The weights of a task's traits start at 0, with a gradient to learn from."""
    options = {"gate": gate, "momentum": momentum, "granularity": granularity}
    plain, ours = (
        case.learner(plugins=[GradientSharing(**options, conditioning=each)])
        for each in ("none", "task")
    )
    for learner in (plain, ours):
        remember(learner, 1)
    gradients = ours.meta_gradients(case.batch)
    by_task = {
        name: gradients.pop(f"gradient-sharing.{name}_by_task") for name in ("gate", "momentum")
    }
    assert_close(gradients, plain.meta_gradients(case.batch), **LOOSE)
    shape = ours.engine.meta_parameters["gradient-sharing.gate"].shape
    assert all(gradient.shape == (*shape, 2) for gradient in by_task.values())
    assert bool((by_task["gate"] != 0).any()) or case.lr < 1e-6  # below, it is lost in rounding


@given(problems(tasks=(2, 4), steps=(1, 2)), weights, weights, seeds)
def test_conditioned_gates_and_momenta_are_their_equation(case, gate, momentum, seed):
    """λ[t,k] = λ[k] + w[k] · (log ‖g‖, cos(g, r_old)), m alike; stores the mean over tasks."""
    learner = sharing_between_spies(case, gate=gate, momentum=momentum, conditioning="task")
    plugin, past = learner.chain.plugins[1], remember(learner, seed)
    by_task = torch.randn(
        2, case.steps, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    plugin.gate_by_task.data, plugin.momentum_by_task.data = by_task.unbind(0)
    passed, kept = spied(learner, case.batch)
    for k, (gradients, directions) in enumerate(passed):
        length = gradients.norm(dim=1, keepdim=True)
        traits = torch.cat(
            [
                length.log(),
                (gradients @ past[k] / (gradients.norm(dim=1) * past[k].norm())).unsqueeze(1),
            ],
            1,
        )
        own_gate, own_momentum = (
            torch.sigmoid(reference.logit(start) + traits @ w[k, 0]).unsqueeze(1)
            for start, w in zip((gate, momentum), by_task, strict=True)
        )
        shared = own_momentum * past[k] + (1 - own_momentum) * (gradients / length).mean(0)
        assert_close(directions, (1 - own_gate) * gradients + own_gate * length * shared, **LOOSE)
        assert_close(kept[str(k)], shared.mean(0), **LOOSE)


@given(problems(("mlp", "batch-norm"), tasks=(1, 1), steps=(1, 2)), st.integers(1, 4))
def test_a_conditioned_task_does_not_depend_on_its_batch_at_evaluation(case, size):
    learner = case.learner(plugins=[GradientSharing(conditioning="task")])
    remember(learner, 3)
    learner.chain.plugins[0].gate_by_task.data.fill_(0.7)
    stream = Stream(split="test")
    together, apart = (
        learner.evaluate(stream, num_tasks=4, tasks_per_batch=each).per_task for each in (4, size)
    )
    assert torch.equal(together, apart)


# Streaming.


@given(
    problems(tasks=(1, 4), steps=(1, 3)),
    st.fixed_dictionaries(
        {
            "gate": weights,
            "momentum": weights,
            "normalisation": st.sampled_from(["unit", "none", "mean-unit"]),
            "scope": st.sampled_from(["all", "tensor"]),
            "granularity": st.sampled_from(["step", "step-and-tensor"]),
            "conditioning": st.sampled_from(["none", "task"]),
        }
    ),
    st.booleans(),
)
def test_a_streamed_batch_is_as_many_batches_of_one(case, options, remembers):
    """Directions, statistics and meta-gradients are those of tasks that arrive one by one."""
    # The gradient of a bias before batch norm is rounding alone, which a norm of its own makes 1.
    assume(options["scope"] == "all" or case.name not in ("batch-norm", "conv4"))
    streamed, single = (
        sharing_between_spies(case, **options, streaming=True),
        sharing_between_spies(case, **options),
    )
    if remembers:
        remember(streamed, 5)
        remember(single, 5)
    # A bias before batch norm has a gradient of 0 up to rounding: its unit is one CPU's digits.
    assume(options["scope"] == "all" or case.name not in WITH_BATCH_NORM)
    passed, kept = spied(streamed, case.batch)
    meta_gradients, directions = [], []
    for task in range(case.batch.num_tasks):
        each, statistics = spied(single, one(case.batch, task))
        directions.append([direction for _, direction in each])
        meta_gradients.append(single.meta_gradients(one(case.batch, task)))
        single.chain.plugins[1].commit(kept=statistics)
    for k, (_, direction) in enumerate(passed):
        assert_close(direction, torch.cat([each[k] for each in directions]), **LOOSE)
        assert_close(kept[str(k)], single.chain.plugins[1].running[k], **LOOSE)
    mean = {
        name: torch.stack([each[name] for each in meta_gradients]).mean(0)
        for name in meta_gradients[0]
    }
    assert_close(streamed.meta_gradients(case.batch), mean, **LOOSE)


def test_streaming_depends_on_the_order_of_the_tasks():
    case = problem(tasks=3)
    learner = sharing_between_spies(case, streaming=True)
    reverse = TaskBatch(
        *(
            getattr(case.batch, field).flip(0)
            for field in ("support_x", "support_y", "query_x", "query_y")
        )
    )
    forward, backward = (spied(learner, batch)[0][0][1] for batch in (case.batch, reverse))
    assert not torch.allclose(forward, backward.flip(0))


# Learned statistics.


@given(problems(tasks=(1, 4), steps=(1, 3)), weights, seeds)
def test_learned_statistics_are_a_meta_parameter_like_any_other(case, gate, seed):
    """d = (1 − σ) g + σ ‖g‖ ρ[k], ρ of shape (K, P), with the meta-gradients of a plain loop."""
    learner = case.learner(plugins=[GradientSharing(gate=gate, statistics="learned")])
    parameters = {
        name: parameter
        for name, parameter in learner.engine.meta_parameters.items()
        if name.startswith("gradient-sharing")
    }
    assert set(parameters) == {"gradient-sharing.running", "gradient-sharing.gate"}
    assert not bool(parameters["gradient-sharing.running"].any()), "it begins at 0"
    size = sum(parameter.numel() for parameter in case.model.parameters())
    assert parameters["gradient-sharing.running"].shape == (case.steps, size)
    drawn = (
        torch.randn(
            case.steps, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        / size**0.5
    )
    parameters["gradient-sharing.running"].data = drawn
    logits = torch.full(
        (case.steps,), reference.logit(gate), dtype=torch.float64, requires_grad=True
    )
    rows = drawn.clone().requires_grad_()
    expected = _learned(case, logits, rows)
    ours = learner.meta_gradients(case.batch)
    ours["gradient-sharing.gate"] = ours["gradient-sharing.gate"].flatten()
    assert_close(ours, expected, **LOOSE)
    assert found(learner, case.batch).outcome.statistics == {}, "there is nothing to accumulate"


def _learned(case, gate, rows):
    parameters = dict(case.model.named_parameters())
    losses = []
    for task in range(case.batch.num_tasks):
        weights_of_task = dict(parameters)
        for k in range(case.steps):
            prediction = reference.predict(case.model, weights_of_task, case.batch.support_x[task])
            objective = torch.nn.functional.cross_entropy(prediction, case.batch.support_y[task])
            flat = torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        objective, list(weights_of_task.values()), create_graph=True
                    )
                ]
            )
            weight = torch.sigmoid(gate[k])
            direction = (1 - weight) * flat + weight * flat.norm() * rows[k]
            pieces = direction.split([parameter.numel() for parameter in parameters.values()])
            weights_of_task = {
                name: old - case.lr * piece.view_as(old)
                for (name, old), piece in zip(weights_of_task.items(), pieces, strict=True)
            }
        prediction = reference.predict(case.model, weights_of_task, case.batch.query_x[task])
        losses.append(torch.nn.functional.cross_entropy(prediction, case.batch.query_y[task]))
    wanted = {**parameters, "gradient-sharing.running": rows, "gradient-sharing.gate": gate}
    return dict(
        zip(
            wanted,
            torch.autograd.grad(torch.stack(losses).mean(), list(wanted.values())),
            strict=True,
        )
    )


def test_learned_statistics_learn_and_are_used_at_evaluation():
    learner = problem().learner(plugins=[GradientSharing(statistics="learned")])
    learner.fit(Stream(), iterations=3, tasks_per_batch=2)
    plugin = learner.chain.plugins[0]
    assert bool((plugin.running != 0).all())
    assert learner.evaluate(Stream(split="test"), num_tasks=3).transductive == ()
    before, after = [], []
    for weights_now in (before, after):
        outcome = learner.engine.evaluate(Stream(split="test").batch(0, range(2)), 2)
        weights_now.append(outcome.adapted_parameters["0.weight"])
        plugin.running.data.zero_()
    assert not torch.allclose(before[0], after[0])


# Reuse on another distribution: load, freeze, forget.


@pytest.fixture
def earlier(tmp_path):
    """A checkpoint of a learner that was trained with gradient sharing, and its running mean."""
    learner = problem().learner(plugins=[GradientSharing()])
    learner.fit(Stream(), iterations=3, tasks_per_batch=2)
    learner.save(tmp_path / "earlier.pt")
    return tmp_path / "earlier.pt", learner.chain.plugins[0].running.clone()


def test_a_loaded_mean_goes_on_accumulating(earlier):
    path, past = earlier
    case = problem(seed=7, tasks=3)
    loaded = sharing_between_spies(case, start=path, momentum=0.25)
    assert torch.equal(loaded.chain.plugins[1].running, past)
    passed, kept = spied(loaded, case.batch)
    for k, (gradients, directions) in enumerate(passed):
        length = gradients.norm(dim=1, keepdim=True)
        shared = 0.25 * past[k] + 0.75 * (gradients / length).mean(0)
        assert_close(kept[str(k)], shared)
        assert_close(directions, 0.5 * gradients + 0.5 * length * shared)


def test_a_frozen_mean_is_used_and_never_changes(earlier):
    path, past = earlier
    case = problem(seed=7, tasks=3)
    learner = sharing_between_spies(case, start=path, statistics="frozen")
    passed, kept = spied(learner, case.batch)
    for k, (gradients, directions) in enumerate(passed):
        assert_close(
            directions, 0.5 * gradients + 0.5 * gradients.norm(dim=1, keepdim=True) * past[k]
        )
    assert kept == {}
    learner.fit(Stream("mlp", split="other"), iterations=3, tasks_per_batch=2)
    assert torch.equal(learner.chain.plugins[1].running, past)
    figures = learner.chain.figures()
    assert set(figures) == {"gradient-sharing.gate/0", "gradient-sharing.gate/1"}
    assert figures["gradient-sharing.gate/0"] != 0.5, "the gate learns how far to trust it"


def test_without_a_start_the_past_is_forgotten():
    plugin = problem().learner(plugins=[GradientSharing()]).chain.plugins[0]
    assert not bool(plugin.started.any())
    assert not bool(plugin.running.any())


def test_what_cannot_be_taken_over_is_refused(earlier, tmp_path):
    path, _ = earlier
    case = problem()
    case.learner(plugins=["meta-sgd"]).save(tmp_path / "other.pt")
    for options, learner, text in (
        (
            {"start": tmp_path / "other.pt"},
            case.learner,
            f"plugin 'gradient-sharing': start = {tmp_path / 'other.pt'} has no running mean: "
            "give a checkpoint of a run with gradient-sharing",
        ),
        (
            {"start": path},
            problem(steps=3).learner,
            f"plugin 'gradient-sharing': the running mean of start = {path} has (inner steps, "
            "adapted weights) = (2, 51), and this run "
            "(3, 51): use the same model and inner_steps",
        ),
    ):
        with pytest.raises(RequestError) as error:
            learner(plugins=[GradientSharing(**options)])
        assert str(error.value) == text
    with pytest.raises(RunError, match="there is no checkpoint"):
        case.learner(plugins=[GradientSharing(start=tmp_path / "none.pt")])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"statistics": "frozen"},
            "plugin 'gradient-sharing': statistics = 'frozen' needs a running mean to freeze: "
            "give start, a checkpoint that has one",
        ),
        (
            {"statistics": "learned", "streaming": True},
            "plugin 'gradient-sharing': streaming changes how statistics accumulate, and "
            "statistics = 'learned': choose one",
        ),
        (
            {"statistics": "learned", "share_at_evaluation": True},
            "plugin 'gradient-sharing': share_at_evaluation changes how statistics accumulate, "
            "and statistics = 'learned': choose one",
        ),
        (
            {"statistics": "learned", "momentum": 0.9},
            "plugin 'gradient-sharing': momentum changes how statistics accumulate, and "
            "statistics = 'learned': choose one",
        ),
        (
            {"statistics": "frozen", "start": "some.safetensors", "learn_momentum": False},
            "plugin 'gradient-sharing': learn_momentum changes how statistics accumulate, and "
            "statistics = 'frozen': choose one",
        ),
    ],
)
def test_options_without_a_meaning_together_are_refused(options, text):
    with pytest.raises(RequestError) as error:
        GradientSharing(**options)
    assert str(error.value) == text


def test_a_saved_learner_with_every_option_is_read_back(tmp_path, earlier):
    path, _ = earlier
    for options in (
        {"conditioning": "task"},
        {"streaming": True},
        {"statistics": "learned"},
        {"start": path, "statistics": "frozen"},
    ):
        learner = problem().learner(plugins=[GradientSharing(**options)])
        learner.fit(Stream(), iterations=2, tasks_per_batch=2)
        learner.save(tmp_path / "whole.pt")
        loaded = MetaLearner.load(tmp_path / "whole.pt", model=problem().model)
        ours, theirs = (each.meta_gradients(problem().batch) for each in (learner, loaded))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# Granularity by tensor, and first order.


def test_a_gate_by_tensor_is_the_same_in_every_step():
    case = problem(steps=3)
    learner = sharing_between_spies(case, granularity="tensor", momentum=0.0)
    plugin = learner.chain.plugins[1]
    assert plugin.gate.shape == (1, 4)
    plugin.gate.data = torch.tensor([[-1.0, 0.5, 2.0, -3.0]], dtype=torch.float64)
    columns = torch.repeat_interleave(
        torch.arange(4), torch.tensor([parameter.numel() for parameter in case.model.parameters()])
    )
    gate = torch.sigmoid(plugin.gate.data[0])[columns]
    for gradients, directions in spied(learner, case.batch)[0]:
        length = gradients.norm(dim=1, keepdim=True)
        assert_close(
            directions, (1 - gate) * gradients + gate * length * (gradients / length).mean(0)
        )


@given(problems(tasks=(1, 4), steps=(1, 3)), weights, weights)
def test_first_order_sharing_equals_a_plain_loop(case, gate, momentum):
    """Gradients are constants, and gates and momenta still learn."""
    learner = case.learner(preset="fomaml", plugins=[GradientSharing(gate=gate, momentum=momentum)])
    past = remember(learner, 2)
    logits = [
        torch.full((case.steps,), reference.logit(each), dtype=torch.float64, requires_grad=True)
        for each in (gate, momentum)
    ]
    expected = reference.gradient_sharing(
        case.model,
        case.batch,
        steps=case.steps,
        lr=case.lr,
        gate=logits[0],
        momentum=logits[1],
        running=list(past),
        order=1,
    )
    ours = {
        name: gradient.flatten() if "sharing" in name else gradient
        for name, gradient in learner.meta_gradients(case.batch).items()
    }
    assert_close(ours, expected.gradients, **LOOSE)
