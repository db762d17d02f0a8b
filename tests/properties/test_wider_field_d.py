"""drop-grad, taml, mr-maml, aruba and meta-mix against loops written from their equations."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metaplug_plugins.aruba import Aruba
from metaplug_plugins.drop_grad import DropGrad
from metaplug_plugins.meta_mix import MetaMix
from metaplug_plugins.mr_maml import MrMaml
from metaplug_plugins.taml import Taml
from torch.nn import functional as F

from metaplug import Context, MetaLearner, Plugin, RequestError, TaskBatch, hookimpl
from metaplug.testing import Stream, assert_close, problem

MODELS = ("mlp", "conv4")


class Watch(Plugin):
    """Remembers the tasks and the outcome of the last meta-gradients."""

    @hookimpl
    def setup(self):
        self.batch = self.outcome = None

    @hookimpl
    def transform_tasks(self, batch):
        self.batch = batch

    @hookimpl
    def transform_outer_losses(self, losses, outcome):
        self.outcome, self.losses = outcome, losses.detach()


def watched(case, *chain, **settings):
    """Meta-gradients, and a plugin that has seen how they came about."""
    watch = Watch()
    learner = case.learner(plugins=[*chain, watch], **settings)
    return learner.meta_gradients(case.batch), watch


def run(model, weights, x):
    return torch.func.functional_call(model, weights, (x,))


def tasks_of(batch):
    return zip(batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True)


def adapted(model, start, task, *, steps, lr, change=None, loss=F.cross_entropy, moves=None):
    """Fast weights after plain inner steps on a support set, and the gradients on the way.

    `change`: (k, name, gradient) → what is descended; `lr`: a number, or one by name.
    """
    (x, y), taken = task, []
    weights = {name: value.view_as(value) for name, value in start.items()}
    for k in range(steps):
        names = [name for name in weights if moves is None or name in moves]
        objective = loss(run(model, weights, x), y)
        gradients = torch.autograd.grad(
            objective, [weights[name] for name in names], create_graph=True
        )
        taken.append(dict(zip(names, gradients, strict=True)))
        for name, gradient in taken[-1].items():
            used = gradient if change is None else change(k, name, gradient)
            rate = lr[name] if isinstance(lr, dict) else lr
            weights[name] = weights[name] - rate * used
    return weights, taken


def differentiated(outer, wanted):
    gradients = torch.autograd.grad(outer, list(wanted.values()), allow_unused=True)
    return {n: g for n, g in zip(wanted, gradients, strict=True) if g is not None}


def copied(case):
    model = copy.deepcopy(case.model)
    return model, dict(model.named_parameters())


def plain(case, batch=None, **options):
    """MAML's meta-gradients, task by task."""
    model, shared = copied(case)
    outer = []
    for x, y, query_x, query_y in tasks_of(batch or case.batch):
        weights, _ = adapted(model, shared, (x, y), steps=case.steps, lr=case.lr, **options)
        loss = options.get("loss", F.cross_entropy)
        outer.append(loss(run(model, weights, query_x), query_y))
    return differentiated(torch.stack(outer).mean(), shared)


# Drop-grad.


@pytest.mark.parametrize("noise", ["binary", "gaussian"])
@pytest.mark.parametrize("model", MODELS)
def test_drop_grad_is_its_equation(monkeypatch, model, noise):
    case, drawn = problem(model, tasks=3, steps=2), []
    make = DropGrad._noise

    def recorded(self, like, level):
        drawn.append(make(self, like, level))
        return drawn[-1]

    monkeypatch.setattr(DropGrad, "_noise", recorded)
    ours, watch = watched(case, DropGrad(noise=noise, rate=0.3))
    net, shared = copied(case)
    names, outer = [*shared], []
    for t, (x, y, query_x, query_y) in enumerate(tasks_of(case.batch)):
        weights, _ = adapted(
            net,
            shared,
            (x, y),
            steps=2,
            lr=case.lr,
            change=lambda k, n, g, t=t: drawn[k * len(names) + names.index(n)][t] * g,
        )
        outer.append(F.cross_entropy(run(net, weights, query_x), query_y))
        for name, value in weights.items():
            assert_close(watch.outcome.adapted_parameters[name][t], value, rtol=1e-10, atol=1e-12)
    assert_close(watch.losses, torch.stack(outer), rtol=1e-10, atol=1e-12)
    exact = differentiated(torch.stack(outer).mean(), shared)
    assert_close(ours, exact, rtol=1e-10, atol=1e-10)


@given(st.sampled_from(["binary", "gaussian"]), st.floats(0.05, 0.6), st.integers(0, 99))
def test_drop_grad_s_noise_has_mean_1_and_one_variance(noise, rate, seed):
    plugin = DropGrad(noise=noise, rate=rate)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        level = plugin._level(0, 1)
        drawn = plugin._noise(torch.zeros(100, 100, dtype=torch.float64), level)
    variance = rate / (1 - rate)
    assert abs(float(drawn.mean()) - 1) < 6 * (variance / drawn.numel()) ** 0.5
    assert abs(float(drawn.var()) / variance - 1) < 0.3
    if noise == "binary":
        assert set(drawn.unique().tolist()) == {0.0, 1 / (1 - rate)}


def test_drop_grad_grows_from_none_to_its_rate():
    rising = DropGrad(noise="binary", rate=0.4, schedule="linear")
    rates = [rising.end_meta_step(i, 5)["rate"] for i in range(5)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    gaussian = DropGrad(rate=0.2, schedule="linear")
    assert gaussian.end_meta_step(2, 3) == {"deviation": 0.5}
    assert DropGrad(rate=0.2).end_meta_step(0, 3) == {"deviation": 0.5}
    case = problem()
    first = case.learner(plugins=[rising]).meta_gradients(case.batch)
    assert_close(first, case.learner().meta_gradients(case.batch), rtol=0, atol=0)


# TAML.

MEASURES = (
    "theil",
    "generalized-entropy",
    "atkinson",
    "gini",
    "variance-of-logarithms",
)


def textbook(measure, losses):
    """Measures of inequality, as their definitions have them: sums over people, incomes x."""
    x = [losses[i] for i in range(len(losses))]
    n, mean, alpha, epsilon = len(x), sum(losses) / len(losses), 2, 0.5
    if measure == "gini":
        return sum((a - b).abs() for a in x for b in x) / (2 * n * sum(x))
    if measure == "variance-of-logarithms":
        geometric = math.prod(x) ** (1 / n)
        return sum((each.log() - geometric.log()) ** 2 for each in x) / n
    if measure == "atkinson":
        return 1 - (sum(each ** (1 - epsilon) for each in x) / n) ** (1 / (1 - epsilon)) / mean
    if measure == "theil":
        return sum(each / mean * (each / mean).log() for each in x) / n
    return sum((each / mean) ** alpha - 1 for each in x) / (n * alpha * (alpha - 1))


class Mean:
    task_mean = staticmethod(lambda x: x.mean(0))


@given(
    st.sampled_from(MEASURES),
    st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    st.floats(0.1, 10),
)
def test_a_measure_is_its_textbook_formula(measure, losses, scale):
    plugin = Taml(measure=measure)
    given = torch.tensor(losses, dtype=torch.float64)
    found = plugin._inequality(given, Mean)
    expected = textbook(measure, given)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert found > -1e-9
    assert_close(plugin._inequality(given * scale, Mean), found, rtol=1e-8, atol=1e-9)
    equal = plugin._inequality(torch.full_like(given, losses[0]), Mean)
    assert abs(float(equal)) < 1e-12
    assert abs(float(plugin._inequality(torch.zeros_like(given), Mean))) < 1e-12


def entropy(logits):
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1).mean()


@pytest.mark.parametrize("model", MODELS)
def test_taml_with_entropy_is_its_equation(model):
    case = problem(model, tasks=3, steps=2)
    ours, watch = watched(case, Taml(strength=0.7))
    net, shared = copied(case)
    outer = []
    for t, (x, y, query_x, query_y) in enumerate(tasks_of(case.batch)):
        weights, _ = adapted(net, shared, (x, y), steps=2, lr=case.lr)
        bias = entropy(run(net, weights, query_x)) - entropy(run(net, shared, query_x))
        outer.append(F.cross_entropy(run(net, weights, query_x), query_y) + 0.7 * bias)
        for name, value in weights.items():
            assert_close(watch.outcome.adapted_parameters[name][t], value, rtol=1e-10, atol=1e-12)
    assert_close(watch.losses, torch.stack(outer), rtol=1e-10, atol=1e-12)
    exact = differentiated(torch.stack(outer).mean(), shared)
    assert_close(ours, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("model", MODELS)
def test_taml_with_an_inequality_is_its_equation(model, measure):
    case = problem(model, tasks=3, steps=2)
    ours, watch = watched(case, Taml(measure=measure, strength=0.7))
    net, shared = copied(case)
    outer, initial = [], []
    for x, y, query_x, query_y in tasks_of(case.batch):
        weights, _ = adapted(net, shared, (x, y), steps=2, lr=case.lr)
        outer.append(F.cross_entropy(run(net, weights, query_x), query_y))
        initial.append(F.cross_entropy(run(net, shared, x), y))
    outer = torch.stack(outer) + 0.7 * textbook(measure, torch.stack(initial))
    assert_close(watch.losses, outer, rtol=1e-10, atol=1e-12)
    assert_close(ours, differentiated(outer.mean(), shared), rtol=1e-10, atol=1e-10)


def test_entropy_of_tasks_of_other_sizes_is_that_of_each_alone():
    case = problem("layer-norm", tasks=2)
    one, two = (case.batch.tasks(slice(t, t + 1)) for t in range(2))
    small = TaskBatch(one.support_x[:, :2], one.support_y[:, :2] % 2, one.query_x, one.query_y % 2)
    small = replace(small, query_x=small.query_x[:, :3], query_y=small.query_y[:, :3])
    batch = TaskBatch.from_tasks([small, two], ways=[2, 3])
    learner = case.learner(plugins=[Taml(strength=0.7)])
    alone = [
        learner.meta_gradients(TaskBatch.from_tasks([each], ways=[ways]))
        for each, ways in ((small, 2), (two, 3))
    ]
    means = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
    assert_close(learner.meta_gradients(batch), means, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        (
            {},
            "regression",
            "plugin 'taml' takes the entropy of class probabilities, and regression has none: "
            "choose another measure, such as theil",
        ),
    ],
)
def test_taml_says_what_it_cannot_do(settings, kind, text):
    with pytest.raises(RequestError) as error:
        problem(kind).learner(plugins=[Taml(**settings)])
    assert str(error.value) == text


def test_chunks_are_taken_with_entropy_and_refused_with_inequality():
    case = problem(tasks=3)
    whole, parts = (
        case.learner(plugins=[Taml()], chunk_size=size).meta_gradients(case.batch)
        for size in (None, 2)
    )
    assert_close(parts, whole, rtol=1e-10, atol=1e-12)
    case.learner(plugins=[Taml(measure="theil", strength=0.0)], chunk_size=2)
    with pytest.raises(RequestError, match=r"plugin 'taml' couples all tasks of a batch"):
        case.learner(plugins=[Taml(measure="theil")], chunk_size=2).meta_gradients(case.batch)


# MR-MAML.


@pytest.mark.parametrize("weights", [None, ("*",)])
@pytest.mark.parametrize("model", MODELS)
def test_mr_maml_is_its_equation(model, weights):
    case = problem(model, tasks=3, steps=2)
    body = MrMaml(beta=0.3, deviation=0.1, prior=0.5, weights=weights)
    ours, watch = watched(case, "partial-adaptation", body)
    net, shared = copied(case)
    last = [*shared][-1].rpartition(".")[0]
    moves = [name for name in shared if name.startswith(last)]
    drawn = [
        name for name, value in shared.items() if weights or (name not in moves and value.dim() > 1)
    ]
    log_deviations = {
        f"mr-maml.log_deviations.{name.replace('.', '/')}": torch.full_like(
            shared[name], math.log(0.1)
        ).requires_grad_()
        for name in drawn
    }
    seen, outer = watch.outcome.initial_parameters, []
    for t, (x, y, query_x, query_y) in enumerate(tasks_of(case.batch)):
        start = dict(shared)
        for name, log_deviation in zip(drawn, log_deviations.values(), strict=True):
            noise = ((seen[name][t] - shared[name]) / 0.1).detach()
            start[name] = shared[name] + log_deviation.exp() * noise
        fast, _ = adapted(net, start, (x, y), steps=2, lr=case.lr, moves=moves)
        outer.append(F.cross_entropy(run(net, fast, query_x), query_y))
        for name in moves:
            assert_close(
                watch.outcome.adapted_parameters[name][t], fast[name], rtol=1e-10, atol=1e-10
            )
    normal = torch.distributions.Normal
    divergence = sum(
        torch.distributions.kl_divergence(
            normal(shared[name], log_deviation.exp()), normal(torch.zeros_like(log_deviation), 0.5)
        ).sum()
        for name, log_deviation in zip(drawn, log_deviations.values(), strict=True)
    )
    outer = torch.stack(outer) + 0.3 * divergence
    assert_close(watch.losses, outer, rtol=1e-10, atol=1e-10)
    exact = differentiated(outer.mean(), {**shared, **log_deviations})
    assert_close(ours, exact, rtol=1e-9, atol=1e-10)
    first, second = seen[drawn[0]][:2]
    assert torch.equal(first, second)  # one draw for all tasks of a batch


def test_mr_maml_draws_nothing_at_evaluation_and_anew_in_every_iteration():
    case = problem()
    plugin = MrMaml(weights=["*.weight"], deviation=0.5)
    learner, plain_learner = case.learner(plugins=[plugin]), case.learner()
    scores = [
        each.evaluate(Stream("mlp", split="test"), num_tasks=3).mean
        for each in (learner, plain_learner)
    ]
    assert scores[0] == scores[1]
    watch = Watch()
    learner = case.learner(plugins=[MrMaml(weights=["*.weight"]), watch])
    found = []
    for iteration in (0, 0, 1):
        learner.engine.meta_gradients(case.batch, iteration, 2)
        found.append(watch.outcome.initial_parameters["0.weight"][0].detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


MR_NOTHING = (
    "plugin 'mr-maml' has no weights to draw: put partial-adaptation before it or name some by "
    "weights, and give a deviation above 0"
)
MR_REFUSED = {
    "nothing": ({}, MR_NOTHING),
    "deviation": ({"weights": ["*"], "deviation": 0.0}, MR_NOTHING),
    "pattern": (
        {"weights": ["conv*", "fc"]},
        "plugin 'mr-maml': the pattern 'conv*' matches none of the parameters (0.weight, 0.bias, "
        "2.weight, 2.bias): correct weights",
    ),
}


@pytest.mark.parametrize("fault", MR_REFUSED)
def test_mr_maml_says_what_it_cannot_draw(fault):
    settings, text = MR_REFUSED[fault]
    with pytest.raises(RequestError) as error:
        problem().learner(plugins=[MrMaml(**settings)])
    assert str(error.value) == text


# ARUBA.


@pytest.mark.parametrize("model", MODELS)
def test_aruba_is_its_equations_over_three_updates(model):
    case, zeta, power = problem(model, tasks=3, steps=2, lr=0.2), 0.3, 0.5
    watch = Watch()
    learner = case.learner(plugins=[Aruba(zeta=zeta, power=power), watch])
    epsilon = zeta * case.lr
    _, shared = copied(case)
    b = {name: torch.full_like(value, epsilon**2) for name, value in shared.items()}
    G = {name: torch.full_like(value, zeta**2) for name, value in shared.items()}
    for i in range(3):
        net = copy.deepcopy(learner.model)
        shared = dict(net.named_parameters())
        rates = {name: (b[name] / G[name]).sqrt().detach() for name in shared}
        ours = learner.meta_gradients(case.batch)
        outer, moved, squares = [], [], []
        for x, y, query_x, query_y in tasks_of(case.batch):
            weights, taken = adapted(net, shared, (x, y), steps=2, lr=rates)
            outer.append(F.cross_entropy(run(net, weights, query_x), query_y))
            moved.append({n: (weights[n] - shared[n]).square() / 2 for n in shared})
            squares.append({n: sum(each[n].square() for each in taken) for n in shared})
        assert_close(watch.losses, torch.stack(outer), rtol=1e-10, atol=1e-12)
        exact = differentiated(torch.stack(outer).mean(), shared)
        assert_close(ours, exact, rtol=1e-9, atol=1e-10)
        learner.engine.meta_step(case.batch, 3)
        for sums, first, seen in ((b, epsilon, moved), (G, zeta, squares)):
            for name in shared:
                mean = sum(each[name] for each in seen).detach() / 3
                sums[name] = sums[name] + first**2 / (i + 2) ** power + mean


def test_aruba_starts_as_maml_bit_for_bit_and_is_frozen_at_evaluation():
    case = problem("conv4")
    learner = case.learner(plugins=[Aruba(zeta=0.1)])
    assert_close(
        learner.meta_gradients(case.batch),
        case.learner().meta_gradients(case.batch),
        rtol=0,
        atol=0,
    )
    learner.fit(Stream("conv4"), iterations=2, tasks_per_batch=2)
    before = {name: each.clone() for name, each in learner.chain.plugins[0].state_dict().items()}
    learner.evaluate(Stream("conv4", split="test"), num_tasks=2)
    assert_close(dict(learner.chain.plugins[0].state_dict()), before, rtol=0, atol=0)
    assert learner.chain.plugins[0].updates == 2


def test_aruba_without_inner_steps_or_rate():
    for without in ({"steps": 0}, {"lr": 0.0}):
        case = problem(**without)
        learner = case.learner(plugins=[Aruba()])
        learner.fit(Stream("mlp"), iterations=2, tasks_per_batch=2)
        assert all(torch.isfinite(each).all() for each in learner.chain.plugins[0].buffers())


@given(st.integers(1, 3), st.integers(0, 50))
def test_aruba_raises_no_rate_of_what_does_not_move(updates, seed):
    """A coordinate without gradient keeps its rate: b and G fade alike."""
    case = problem(seed=seed)
    learner = case.learner(plugins=[Aruba(zeta=0.1)])
    batch = case.batch
    batch = replace(batch, support_x=batch.support_x.index_fill(3 - 1, torch.tensor([0]), 0.0))
    for _ in range(updates):
        learner.engine.meta_step(batch, updates)
    factor = learner.chain.plugins[0]._factor("0.weight")
    assert_close(factor[:, 0], torch.ones_like(factor[:, 0]), rtol=1e-12, atol=0)


# MetaMix.


def mixed_by_hand(batch, mixed, outputs):
    """For each task the λ and partners that explain its query examples, and soft labels."""
    found = []
    for t in range(batch.num_tasks):
        s, q, m = batch.support_x[t], batch.query_x[t], mixed.query_x[t]
        labels = [F.one_hot(y[t], outputs).double() for y in (batch.support_y, batch.query_y)]
        best = []
        for j in range(len(q)):
            fits = []
            for i in range(len(s)):
                way = (s[i] - q[j]).flatten()
                share = float((m[j] - q[j]).flatten() @ way / (way @ way))
                error = float((q[j] + share * (s[i] - q[j]) - m[j]).abs().max())
                fits.append((error, share, i))
            error, share, i = min(fits)
            assert error < 1e-12
            soft = share * labels[0][i] + (1 - share) * labels[1][j]
            assert_close(mixed.query_y[t][j], soft, rtol=1e-9, atol=1e-12)
            best.append((share, i))
        shares, partners = zip(*best, strict=True)
        assert max(shares) - min(shares) < 1e-9
        assert 0 < shares[0] < 1
        found.append((shares[0], partners))
    return found


@pytest.mark.parametrize("model", MODELS)
def test_meta_mix_is_its_equation(model):
    case = problem(model, tasks=3, steps=2)
    ours, watch = watched(case, MetaMix())
    found = mixed_by_hand(case.batch, watch.batch, 3)
    assert len({share for share, _ in found}) == 3
    assert all(len({*partners}) == 4 for _, partners in found)
    assert torch.equal(watch.batch.support_x, case.batch.support_x)
    exact = plain(case, replace(watch.batch, support_y=F.one_hot(case.batch.support_y, 3).double()))
    assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_every_support_example_takes_part_before_one_does_twice(tasks, support, query, seed):
    x = torch.arange(float(tasks * support)).view(tasks, support, 1)
    batch = TaskBatch(x, x, torch.zeros(tasks, query, 1), torch.zeros(tasks, query, 1))
    mixed = MetaMix().transform_tasks(batch, generator(seed), None)
    assert_close(mixed.query_x, mixed.query_y, rtol=0, atol=0)
    share = (
        MetaMix()
        .transform_tasks(replace(batch, support_x=torch.ones_like(x)), generator(seed), None)
        .query_x[:, :1]
    )
    partners = (mixed.query_x / share).round().squeeze(2) - x[:, :1, 0]
    for row in partners.tolist():
        counts = [row.count(place) for place in range(support)]
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == query


@given(st.integers(0, 99), st.floats(0.2, 5))
def test_a_cut_box_s_area_is_the_label_s_share(seed, alpha):
    batch = TaskBatch(
        torch.ones(3, 2, 1, 6, 5),
        torch.ones(3, 2, 1),
        torch.zeros(3, 4, 1, 6, 5),
        torch.zeros(3, 4, 1),
    )
    mixed = MetaMix(method="cutmix", alpha=alpha).transform_tasks(batch, generator(seed), None)
    assert set(mixed.query_x.unique().tolist()) <= {0.0, 1.0}
    assert_close(mixed.query_x.mean((2, 3, 4)), mixed.query_y.squeeze(2), rtol=1e-6, atol=1e-7)
    for image in mixed.query_x[:, 0, 0]:
        rows, columns = image.amax(1), image.amax(0)
        assert torch.equal(image, rows[:, None] * columns)


def test_inputs_by_name_and_tasks_of_other_sizes_are_mixed():
    one = TaskBatch(
        {"a": torch.ones(1, 2, 3), "b": torch.ones(1, 2, 1, dtype=torch.float64)},
        torch.tensor([[0, 1]]),
        {"a": torch.zeros(1, 3, 3), "b": torch.zeros(1, 3, 1, dtype=torch.float64)},
        torch.tensor([[2, 2, 2]]),
    )
    two = one.map(lambda each: each[:, :1])
    batch = TaskBatch.from_tasks([one, two], ways=[4, 4])
    mixed = MetaMix().transform_tasks(batch, generator(), 4)
    assert mixed.sizes == batch.sizes
    for t, size in enumerate(mixed.sizes):
        a, b = (mixed.query_x[name][t, : size.query] for name in "ab")
        y = mixed.query_y[t, : size.query]
        assert y.dtype == torch.float32
        assert_close(a[:, :1].double(), b, rtol=1e-6, atol=0)
        assert_close(y[:, :2].sum(1), a[:, 0], rtol=1e-6, atol=0)
        assert_close(y.sum(1), torch.ones(size.query), rtol=1e-6, atol=0)


def test_regression_targets_are_mixed_too():
    case = problem("regression")
    ours, watch = watched(case, MetaMix())
    assert not torch.equal(watch.batch.query_y, case.batch.query_y)
    exact = plain(case, watch.batch, loss=F.mse_loss)
    assert_close(ours, exact, rtol=1e-10, atol=1e-10)


INTEGERS = torch.zeros(1, 2, 3, dtype=torch.int64)
MIX_REFUSED = {
    "tokens": (
        TaskBatch(*[INTEGERS, INTEGERS[..., 0]] * 2),
        "mixup",
        "inputs of a floating dtype",
    ),
    "boxes": (
        TaskBatch(*[INTEGERS.float(), INTEGERS[..., 0]] * 2),
        "cutmix",
        "images, for method cutmix",
    ),
    "labels": (
        TaskBatch(*[INTEGERS.float(), INTEGERS] * 2),
        "mixup",
        "one class label, or numbers, for each example",
    ),
    "ignored": (
        TaskBatch(
            *[INTEGERS.float(), INTEGERS[..., 0]] * 1, INTEGERS.float(), INTEGERS[..., 0] - 100
        ),
        "mixup",
        "labels other than -100",
    ),
}


@pytest.mark.parametrize("fault", MIX_REFUSED)
def test_meta_mix_says_what_it_cannot_mix(fault):
    batch, method, what = MIX_REFUSED[fault]
    with pytest.raises(RequestError) as error:
        MetaMix(method=method).transform_tasks(batch, generator(), 4)
    assert str(error.value) == (
        f"plugin 'meta-mix' needs {what} to mix: give such tasks, or leave it out"
    )


# All of them.

CHAINS = {
    "drop-grad": lambda: [DropGrad(rate=0.3)],
    "taml": lambda: [Taml()],
    "theil": lambda: [Taml(measure="theil")],
    "mr-maml": lambda: [MrMaml(weights=["*"])],
    "aruba": lambda: [Aruba(zeta=0.1)],
    "meta-mix": lambda: [MetaMix()],
}


@pytest.mark.parametrize("name", CHAINS)
def test_every_way_of_computing_gives_the_same(name):
    case = problem("batch-norm", tasks=3, steps=2)
    found = []
    for settings in (
        {"task_batching": "vectorized"},
        {"task_batching": "sequential"},
        {"checkpoint_steps": 1},
    ):
        learner = case.learner(plugins=CHAINS[name](), **settings)
        learner.fit(Stream("batch-norm"), iterations=2, tasks_per_batch=2)
        found.append(learner.meta_gradients(case.batch))
    for other in found[1:]:
        assert_close(other, found[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["mr-maml", "taml", "aruba"])
@pytest.mark.parametrize("beside", ["gradient-sharing", "meta-sgd", "reptile"])
def test_they_stand_beside_others(name, beside):
    case = problem("conv4", tasks=2)
    for chain in ([*CHAINS[name](), beside], [beside, *CHAINS[name]()]):
        learner = case.learner(plugins=chain)
        learner.fit(Stream("conv4"), iterations=2, tasks_per_batch=2)
        gradients = learner.meta_gradients(case.batch)
        assert all(bool(torch.isfinite(each).all()) for each in gradients.values())
        learner.evaluate(Stream("conv4", split="test"), num_tasks=2)


@pytest.mark.parametrize("name", CHAINS)
def test_without_steps_and_with_one_task_it_trains(name):
    for less in ({"steps": 0}, {"tasks": 1}):
        case = problem("layer-norm", **less)
        learner = MetaLearner(
            copy.deepcopy(case.model), plugins=CHAINS[name](), inner_lr=0.1, inner_steps=case.steps
        )
        learner.fit(Stream("layer-norm"), iterations=2, tasks_per_batch=1)
        assert all(
            bool(torch.isfinite(each).all()) for each in learner.meta_gradients(case.batch).values()
        )


def test_gini_is_refused_where_tasks_of_ranks_do_not_meet():
    form = torch.float64, torch.device("cpu")
    context = Context({}, {}, {}, (), *form, 2, 0.1, "classification", ranks=2)
    Taml(measure="gini", strength=0.0).setup(context)
    with pytest.raises(RequestError) as error:
        Taml(measure="gini").setup(context)
    assert str(error.value) == (
        "plugin 'taml' compares every pair of tasks for the Gini coefficient, and those of 2 ranks "
        "do not meet: choose another measure, such as theil"
    )


@pytest.mark.parametrize("name", CHAINS)
def test_a_saved_run_goes_on_as_it_was(name, tmp_path):
    case = problem("conv4")
    learner = case.learner(plugins=CHAINS[name]())
    learner.fit(Stream("conv4"), iterations=2, tasks_per_batch=2)
    learner.save(tmp_path / "learner")
    loaded = MetaLearner.load(
        tmp_path / "learner", model=copy.deepcopy(case.model), plugins=CHAINS[name]()
    )
    assert_close(
        loaded.meta_gradients(case.batch), learner.meta_gradients(case.batch), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("model", ["tied", "max-pool", "group-norm"])
def test_other_models_and_regression_train(name, model):
    kind = "regression" if name in ("theil", "aruba", "meta-mix") else model
    for each in {kind, model}:
        learner = problem(each).learner(plugins=["gradient-sharing", *CHAINS[name]()])
        learner.fit(Stream(each), iterations=2, tasks_per_batch=2)
        found = learner.meta_gradients(problem(each).batch)
        assert all(bool(torch.isfinite(gradient).all()) for gradient in found.values())


@pytest.mark.parametrize("preset", ["mr-maml", "taml"])
def test_a_preset_is_its_plugins(preset):
    case = problem("conv4")
    listed = {"mr-maml": ["partial-adaptation", "mr-maml"], "taml": ["taml"]}[preset]
    ours, theirs = (
        case.learner(**given).meta_gradients(case.batch)
        for given in ({"preset": preset}, {"plugins": listed})
    )
    assert_close(ours, theirs, rtol=0, atol=0)
