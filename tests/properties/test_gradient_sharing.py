"""Gradient sharing keeps the invariants that its equations imply."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metaplug_plugins.gradient_sharing import GradientSharing
from support.blends import BLENDS
from support.plugins import Spy

from metaplug import Plugin, TaskBatch, hookimpl
from metaplug.contract.task_batch import FIELDS
from metaplug.testing import SMOOTH, adapted, assert_close, found, problem, reference, regression
from metaplug.testing.strategies import problems, seeds, weights


def spied(case, **options):
    """By step, the gradients g before and the directions d after sharing, (T, P) each."""
    before, after = Spy(name="before"), Spy(name="after")
    learner = case.learner(plugins=[before, GradientSharing(**options), after])
    found(learner, case.batch)
    return [(before.seen[k], after.seen[k]) for k in range(case.steps)]


def repeated(batch, times):
    return TaskBatch(
        *(
            getattr(batch, field)[:1].expand(times, *[-1] * (getattr(batch, field).dim() - 1))
            for field in FIELDS
        )
    )


def rows(batch, indices):
    return TaskBatch(*(getattr(batch, field)[indices] for field in FIELDS))


# 1. The gate at exactly 0 is MAML, and near 0 it is near MAML.


@given(problems(), st.booleans())
def test_gate_zero_is_maml_bit_for_bit(case, vectorized):
    batching = "vectorized" if vectorized else "sequential"
    plain, shared = (
        case.learner(task_batching=batching),
        case.learner(plugins=[GradientSharing(gate=0.0)], task_batching=batching),
    )
    ours, theirs = (
        {"adapted": adapted(each, case.batch), "meta": each.meta_gradients(case.batch)}
        for each in (shared, plain)
    )
    for part in ours:
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part])


@given(problems(SMOOTH, tasks=(2, 5), steps=(1, 3), lrs=(0.05, 0.3)))
def test_difference_to_maml_falls_linearly_with_the_gate(case):
    plain = case.learner()
    start = {**adapted(plain, case.batch), **plain.meta_gradients(case.batch)}
    distance = []
    for gate in (1e-6, 1e-7):
        learner = case.learner(plugins=[GradientSharing(gate=gate, learn_gate=False)])
        end = {**adapted(learner, case.batch), **learner.meta_gradients(case.batch)}
        distance.append(
            sum(float((end[name] - start[name]).square().sum()) for name in start) ** 0.5
        )
    # The quadratic term is of the order of the gate, times a curvature that batch norm makes large.
    assert abs(distance[0] / distance[1] - 10) < 0.1


# 2. A task alone, or among its equals, shares with itself: nothing changes.


@given(
    problems(tasks=(1, 1)),
    weights,
    st.sampled_from(["unit", "none", "mean-unit"]),
    st.sampled_from(["all", "tensor"]),
    st.integers(1, 4),
)
def test_a_task_among_its_equals_is_maml(case, gate, normalisation, scope, copies):
    batch = repeated(case.batch, copies)
    plain = case.learner()
    learner = case.learner(
        plugins=[GradientSharing(gate=gate, momentum=0.0, normalisation=normalisation, scope=scope)]
    )
    # Batch norm amplifies rounding where a feature hardly varies.
    assert_close(adapted(learner, batch), adapted(plain, batch), rtol=1e-8, atol=1e-9)
    gradients = learner.meta_gradients(batch)
    to_gate = gradients.pop("gradient-sharing.gate", torch.zeros(1))
    assert_close(gradients, plain.meta_gradients(batch), rtol=1e-7, atol=1e-8)
    assert float(to_gate.abs().max()) < 1e-8


# 3. The gate at 1 moves all tasks one way.


@given(problems(tasks=(2, 6), steps=(1, 3)))
def test_gate_one_moves_all_tasks_along_the_mean_of_unit_gradients(case):
    for gradients, directions in spied(case, gate=1.0, momentum=0.0):
        lengths = gradients.norm(dim=1, keepdim=True)
        mean = (gradients / lengths).mean(0)
        assert float(mean.norm()) <= 1 + 1e-12
        assert_close(directions, lengths * mean)


@given(problems(tasks=(2, 6), steps=(1, 3)))
def test_gate_one_with_mean_unit_moves_each_task_by_the_length_of_its_own_gradient(case):
    for gradients, directions in spied(case, gate=1.0, momentum=0.0, normalisation="mean-unit"):
        assert_close(directions.norm(dim=1), gradients.norm(dim=1))
        assert_close(
            directions / directions.norm(dim=1, keepdim=True),
            (gradients.mean(0) / gradients.mean(0).norm()).expand_as(directions),
        )


@given(problems(tasks=(2, 6), steps=(1, 3)))
def test_gate_one_without_normalisation_moves_all_tasks_by_the_mean_gradient(case):
    for gradients, directions in spied(case, gate=1.0, momentum=0.0, normalisation="none"):
        assert_close(directions, gradients.mean(0).expand_as(directions))


# 4. The order of the tasks in a batch means nothing.


@given(problems(tasks=(2, 6)), st.randoms(use_true_random=False), weights)
def test_permuting_the_tasks_permutes_the_adapted_parameters(case, random, gate):
    order = list(range(case.batch.num_tasks))
    random.shuffle(order)
    learner = case.learner(plugins=[GradientSharing(gate=gate)])
    permuted = rows(case.batch, order)
    expected = {name: weight[order] for name, weight in adapted(learner, case.batch).items()}
    # The mean over tasks is summed in another order, which batch norm amplifies.
    assert_close(adapted(learner, permuted), expected, rtol=1e-8, atol=1e-9)
    assert_close(
        learner.meta_gradients(permuted), learner.meta_gradients(case.batch), rtol=1e-7, atol=1e-8
    )


# 5. Nothing grows, and no task shouts the others down.


@given(problems(tasks=(2, 6), steps=(1, 3)), st.floats(0, 1), st.floats(0, 1))
def test_directions_are_never_longer_than_the_gradients(case, gate, momentum):
    for gradients, directions in spied(case, gate=gate, momentum=momentum):
        assert bool((directions.norm(dim=1) <= gradients.norm(dim=1) * (1 + 1e-12)).all())


@given(problems(tasks=(2, 6), steps=(1, 3)), st.floats(0, 1))
def test_directions_are_never_longer_than_the_gradients_tensor_by_tensor(case, gate):
    sizes = [parameter.numel() for parameter in case.model.parameters()]
    for gradients, directions in spied(case, gate=gate, scope="tensor"):
        for own, moved in zip(gradients.split(sizes, 1), directions.split(sizes, 1), strict=True):
            assert bool((moved.norm(dim=1) <= own.norm(dim=1) * (1 + 1e-12) + 1e-12).all())


class LossScale(Plugin):
    """Multiplies every task's support loss by its own number."""

    @hookimpl
    def transform_inner_losses(self, losses):
        return losses * torch.arange(1, len(losses) + 1).to(losses) ** 3


@given(problems(tasks=(2, 6), steps=(1, 1)))
def test_scales_of_losses_do_not_change_the_mean(case):
    means = []
    for plugins in ([GradientSharing()], [LossScale(), GradientSharing()]):
        learner = case.learner(plugins=plugins)
        means.append(found(learner, case.batch).outcome.statistics["gradient-sharing"]["0"])
    assert_close(means[0], means[1])


# 6. The running mean.


def stored(learner, batch, times=1):
    """The running means after `batch` was seen `times` times, the weights left as they are."""
    for _ in range(times):
        learner.chain.commit(found(learner, batch).outcome.statistics)
    return learner.chain.plugins[0].running.clone()


@given(problems(tasks=(1, 5), steps=(1, 1)), weights, st.integers(2, 5))
def test_running_mean_stays_under_constant_input(case, momentum, times):
    once, often = (
        stored(case.learner(plugins=[GradientSharing(momentum=momentum)]), case.batch, n)
        for n in (1, times)
    )
    assert_close(often, once)


@given(problems(tasks=(2, 4), steps=(1, 1)), weights)
def test_running_mean_weighs_the_past_by_the_momentum(case, momentum):
    first, second = rows(case.batch, [0]), rows(case.batch, [1])
    one, other = (
        stored(case.learner(plugins=[GradientSharing()]), batch) for batch in (first, second)
    )
    learner = case.learner(plugins=[GradientSharing(momentum=momentum)])
    stored(learner, first)
    assert_close(stored(learner, second), momentum * one + (1 - momentum) * other)


@given(problems(tasks=(2, 4), steps=(1, 1)))
def test_momentum_zero_forgets_and_momentum_one_remembers_for_good(case):
    first, second = rows(case.batch, [0]), rows(case.batch, [1])
    for momentum, kept in ((0.0, second), (1.0, first)):
        learner = case.learner(plugins=[GradientSharing(momentum=momentum)])
        stored(learner, first)
        assert torch.equal(
            stored(learner, second), stored(case.learner(plugins=[GradientSharing()]), kept)
        )


@given(problems(tasks=(2, 4), steps=(1, 3)))
def test_a_stored_and_reloaded_state_continues_identically(case):
    one, other = (case.learner(plugins=[GradientSharing()]) for _ in range(2))
    stored(one, case.batch)
    other.load_state_dict(one.state_dict())
    ours, theirs = one.meta_gradients(case.batch), other.meta_gradients(case.batch)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# All of it at once.


@given(problems(tasks=(1, 4), steps=(1, 3)), weights, weights, st.booleans())
def test_everything_equals_a_plain_loop(case, gate, momentum, remembers):
    learner = case.learner(plugins=[GradientSharing(gate=gate, momentum=momentum)])
    running = None
    if remembers:
        running = list(
            torch.randn(
                case.steps,
                sum(p.numel() for p in case.model.parameters()),
                dtype=torch.float64,
                generator=generator(1),
            )
        )
        learner.chain.commit({"gradient-sharing": {str(k): mean for k, mean in enumerate(running)}})
    gate_logits, momentum_logits = (
        torch.full((case.steps,), reference.logit(weight), dtype=torch.float64, requires_grad=True)
        for weight in (gate, momentum)
    )
    expected = reference.gradient_sharing(
        case.model,
        case.batch,
        steps=case.steps,
        lr=case.lr,
        gate=gate_logits,
        momentum=momentum_logits,
        running=running,
    )
    ours = found(learner, case.batch)
    # Both run through three second-order steps; batch norm amplifies what rounding differs.
    for name, weight in ours.outcome.adapted_parameters.items():
        assert_close(
            weight.detach(),
            torch.stack([task[name] for task in expected.adapted]),
            rtol=1e-8,
            atol=1e-9,
        )
    gradients = {
        name: gradient.flatten() if "sharing" in name else gradient
        for name, gradient in ours.gradients.items()
    }
    if not remembers:
        # Without a past, the momentum weighs nothing.
        assert float(gradients.pop("gradient-sharing.momentum").abs().max()) == 0
    assert_close(gradients, expected.gradients, rtol=1e-8, atol=1e-9)
    kept = ours.outcome.statistics["gradient-sharing"]
    assert_close(
        {str(k): mean for k, mean in enumerate(expected.extra["running"])},
        dict(kept),
        rtol=1e-8,
        atol=1e-9,
    )


def generator(seed):
    return torch.Generator().manual_seed(seed)


@given(seeds, weights)
def test_regression_equals_a_plain_loop(seed, gate):
    case = regression(seed=seed)
    learner = case.learner(plugins=[GradientSharing(gate=gate)], kind="regression")
    logits = [
        torch.full((case.steps,), reference.logit(weight), dtype=torch.float64, requires_grad=True)
        for weight in (gate, 0.5)
    ]
    expected = reference.gradient_sharing(
        case.model,
        case.batch,
        steps=case.steps,
        lr=case.lr,
        gate=logits[0],
        momentum=logits[1],
        loss=torch.nn.functional.mse_loss,
    )
    gradients = {
        name: gradient.flatten() if "sharing" in name else gradient
        for name, gradient in learner.meta_gradients(case.batch).items()
    }
    gradients.pop("gradient-sharing.momentum")
    assert_close(gradients, expected.gradients)


def test_a_gate_learns_within_every_granularity():
    case = problem(steps=3)
    for granularity, shape in (("step", (3, 1)), ("step-and-tensor", (3, 4)), ("one", (1, 1))):
        gradients = case.learner(plugins=[GradientSharing(granularity=granularity)]).meta_gradients(
            case.batch
        )
        assert gradients["gradient-sharing.gate"].shape == shape
        assert bool((gradients["gradient-sharing.gate"] != 0).all())


@pytest.mark.parametrize("granularity", ["step", "tensor", "step-and-tensor", "one"])
def test_figures_are_the_means_of_the_weights_of_every_step(granularity):
    plugin = GradientSharing(granularity=granularity, momentum=0)
    case = problem(steps=30)  # more steps than weights
    case.learner(plugins=[plugin]).meta_gradients(case.batch)
    with torch.no_grad():
        plugin.gate += torch.arange(plugin.gate.numel()).view_as(plugin.gate)
        means = plugin.weight("gate", slice(None)).mean(-1).expand(30).tolist()
    figures = plugin.end_meta_step()
    assert figures == pytest.approx(
        {f"gate/{k}": mean for k, mean in enumerate(means)}
        | {f"momentum/{k}": 0 for k in range(30)}
    )


# The derivative by hand.


@pytest.mark.parametrize("form", BLENDS)
def test_the_blend_is_differentiable_twice_however_its_gradients_lie_in_memory(form):
    torch.manual_seed(0)
    rows, columns = (torch.randn(3, *shape, dtype=torch.float64) for shape in ((2,), (4, 2)))
    rows[0], columns[0] = 0, 0  # a task without a gradient
    weights = torch.randn(2, 1, dtype=torch.float64)
    begun = torch.tensor(True)
    r_old = torch.randn(10, dtype=torch.float64)

    def directions(rows, columns, s, m, *, turned=True):
        matrices = columns.mT if turned else columns.mT.contiguous()
        given = [rows, matrices], s, m, begun, r_old, lambda mean: mean
        r, (row, matrix) = BLENDS[form](*given)
        assert r.shape == r_old.shape and not r.requires_grad
        return row, matrix, r

    given = [each.requires_grad_() for each in (rows, columns, *weights)]
    for one, other in zip(directions(*given), directions(*given, turned=False), strict=True):
        assert_close(one, other)
    # Near 0 the norm is no smooth function, so finite differences look at the other tasks.
    kept = [each[1:].detach().requires_grad_() for each in given[:2]] + given[2:]
    assert torch.autograd.gradcheck(lambda *x: directions(*x)[:2], kept)
    assert torch.autograd.gradgradcheck(lambda *x: directions(*x)[:2], kept)
    second = torch.autograd.grad(directions(*given)[1].sum(), given, create_graph=True)
    ends = torch.autograd.grad(sum(each.square().sum() for each in second), given)
    assert all(bool(torch.isfinite(each).all()) for each in (*second, *ends))


def test_ranks_exchange_the_same_whichever_way_a_derivative_takes():
    torch.manual_seed(0)
    rows, matrices = (torch.randn(3, *form, dtype=torch.float64) for form in ((2,), (4, 2)))
    weights = torch.tensor([[0.3], [-0.7]], dtype=torch.float64)
    r_old, sent = torch.randn(10, dtype=torch.float64), []

    def mean(x):
        sent.append(x.detach().clone())
        return x

    for blend in BLENDS.values():
        leaves = [each.clone().requires_grad_() for each in (rows, matrices, *weights)]
        given = torch.tensor(True), r_old, mean
        row, matrix = blend(leaves[:2], *leaves[2:], *given)[1]
        for total in (row.sum(), row.sum() + 0 * matrix.sum()):
            for graph in (False, True):
                torch.autograd.grad(total, leaves, retain_graph=True, create_graph=graph)
    forward, backward = sent[::5], [each for k, each in enumerate(sent) if k % 5]
    assert (len(forward), len(backward)) == (2, 8)
    for messages in (forward, backward):
        for each in messages:
            torch.testing.assert_close(each, messages[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    "given", [(0.3, -0.7), (40.0, 40.0), (-40.0, -800.0), (math.inf, math.inf)]
)
def test_weights_read_as_numbers_blend_as_tensors_do(given, begun):
    torch.manual_seed(0)
    rows, matrices = (torch.randn(3, *form, dtype=torch.float64) for form in ((2,), (4, 2)))
    rows[0], matrices[0] = 1e-13, 0  # a task with next to no gradient
    weights = torch.tensor(given, dtype=torch.float64).unsqueeze(1)
    r_old, ends = torch.randn(10, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
    answers = []
    for blend in BLENDS.values():
        leaves = [each.clone().requires_grad_() for each in (rows, matrices, *weights)]
        state = torch.tensor(begun), r_old
        r, found = blend(leaves[:2], *leaves[2:], *state, lambda mean: mean)
        total = (torch.cat([each.flatten(1) for each in found], 1) * ends).sum()
        answers.append((r, total, *torch.autograd.grad(total, leaves)))
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
