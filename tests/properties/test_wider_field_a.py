"""What is differentiated other than through the loop, against loops written from the papers."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import plugins
from support.counting import live_graph, operations
from torch import nn
from torch.nn import functional as F

from metaplug import RequestError, RunError, TaskBatch
from metaplug.testing import adapted, assert_close, found, problem
from metaplug.testing.problems import Problem
from metaplug.testing.reference import predict
from metaplug.testing.strategies import problems

SAME = {"rtol": 1e-10, "atol": 1e-10}
BATCHINGS = [{"task_batching": "sequential"}, {"checkpoint_steps": 1}, {"chunk_size": 1}]


def refused(make, error):
    with pytest.raises(error) as told:
        make()
    return str(told.value)


def tasks_of(batch):
    return zip(batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True)


def own(weights):
    """The same values as variables of their own."""
    return {name: each.detach().clone().requires_grad_() for name, each in weights.items()}


def inner(weights, lr, gradients):
    """One step of gradient descent, of which nothing is differentiated."""
    pairs = zip(weights.items(), gradients, strict=True)
    return own({name: each - lr * gradient for (name, each), gradient in pairs})


def mean_of(by_task):
    """The mean over tasks, by name."""
    return {name: torch.stack([task[name] for task in by_task]).mean(0) for name in by_task[0]}


def assert_same(learner, case, gradients, outer, weights):
    """Meta-gradients, outer loss and adapted weights are those of a loop."""
    taken = found(learner, case.batch)
    assert_close(dict(taken.gradients), gradients, **SAME)
    assert_close(taken.outer_loss, outer.detach(), **SAME)
    ends = adapted(learner, case.batch)
    for name in weights[0]:
        assert_close(ends[name], torch.stack([each[name] for each in weights]).detach(), **SAME)


# Order 0, and Reptile.


def reptile(order, *between):
    return [plugins.make("derivative-order", order=order), *between, plugins.make("reptile")]


@pytest.mark.parametrize("name", ["mlp", "conv4"])
@pytest.mark.parametrize("beside", [(), ("head",), ("body",)])
def test_reptile_of_order_0_has_the_meta_gradients_of_order_1_bit_for_bit(name, beside):
    for steps in (0, 2):
        case = problem(name, steps=steps)
        first, none = (
            case.learner(
                plugins=reptile(
                    order, *(plugins.make("partial-adaptation", adapts=a) for a in beside)
                )
            ).meta_gradients(case.batch)
            for order in (1, 0)
        )
        assert_close(none, first, rtol=0, atol=0)


def test_what_order_0_would_never_teach_is_refused_by_name():
    case = problem()
    given_up = reptile(0, plugins.make("meta-sgd"))
    assert refused(lambda: case.learner(plugins=given_up).meta_gradients(case.batch), RunError) == (
        "plugin 'reptile' in compute_meta_gradients (link 1 of 1, iteration 1) left out a plugin's "
        "parameters ('meta-sgd.rates.0/bias', 'meta-sgd.rates.0/weight', 'meta-sgd.rates.2/bias', "
        "'meta-sgd.rates.2/weight'), which would then never learn: answer for them too or, where "
        "nothing leads to them, leave their plugin out"
    )
    alone = [plugins.make("derivative-order", order=0)]
    assert refused(lambda: case.learner(plugins=alone).meta_gradients(case.batch), RunError) == (
        "derivative order 0 leaves no way from the outer loss to what tasks start from, so it "
        "would never learn: add a plugin that makes meta-gradients itself, such as reptile or "
        "imaml, or use order 1 or 2"
    )


def test_order_0_anneals_to_second_order_as_order_1_does():
    case = problem()
    switched = case.learner(plugins=[plugins.make("derivative-order", order=0, switch=0)])
    assert_close(
        switched.meta_gradients(case.batch),
        case.learner().meta_gradients(case.batch),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("name", ["mlp", "conv4"])
def test_order_0_costs_the_forward_and_backward_passes_alone(name):
    case = problem(name, tasks=1, steps=4)
    learner = case.learner(plugins=reptile(0), task_batching="sequential")
    learner.meta_gradients(case.batch)  # what is found out about a model once

    def plain():
        ((x, y, query_x, query_y),) = tasks_of(case.batch)
        weights = own(dict(case.model.named_parameters()))
        for _ in range(case.steps):
            loss = F.cross_entropy(predict(case.model, weights, x), y)
            weights = inner(weights, case.lr, torch.autograd.grad(loss, list(weights.values())))
        F.cross_entropy(predict(case.model, weights, query_x), query_y)

    assert operations(lambda: learner.meta_gradients(case.batch)) == operations(plain)


# iMAML.


def implicit(case, *, strength, iterations, damping=0.0, moved=None):
    """Rajeswaran et al., algorithms 1 and 2, task by task; v by textbook conjugate gradient."""
    model, start = case.model, dict(case.model.named_parameters())
    moved = list(start) if moved is None else moved
    loss = F.cross_entropy if case.kind == "classification" else F.mse_loss
    gradients, outers, ends = [], [], []
    for x, y, query_x, query_y in tasks_of(case.batch):
        fast = own({name: start[name] for name in moved})

        def slopes(fast, x=x, y=y, **options):
            pull = sum((fast[name] - start[name]).square().sum() for name in moved)
            objective = loss(predict(model, {**start, **fast}, x), y) + strength / 2 * pull
            return torch.autograd.grad(objective, list(fast.values()), **options)

        for _ in range(case.steps):
            fast = inner(fast, case.lr, slopes(fast))
        outer, at = loss(predict(model, {**start, **fast}, query_x), query_y), list(fast.values())
        slope = slopes(fast, create_graph=True)

        def dot(one, other):
            return sum((a * b).sum() for a, b in zip(one, other, strict=True))

        def plus(one, factor, other):
            return [a + factor * b for a, b in zip(one, other, strict=True)]

        residual = direction = list(torch.autograd.grad(outer, at, retain_graph=True))
        v = [torch.zeros_like(each) for each in at]
        for _ in range(iterations):
            image = torch.autograd.grad(slope, at, direction, retain_graph=True)
            image = plus(image, damping, direction)
            square = dot(residual, residual)
            length = square / dot(direction, image)
            v, residual = plus(v, length, direction), plus(residual, -length, image)
            direction = plus(residual, dot(residual, residual) / square, direction)
        wanted, through = list(start.values()), [-each for each in v]
        given = {"allow_unused": True, "materialize_grads": True}
        direct = torch.autograd.grad(outer, wanted, **given)
        indirect = torch.autograd.grad(slope, wanted, through, **given)
        gradients.append(dict(zip(start, plus(direct, 1, indirect), strict=True)))
        outers.append(outer)
        ends.append(fast)
    return mean_of(gradients), torch.stack(outers).mean(), ends


@pytest.mark.parametrize("name", ["mlp", "conv4", "tied", "regression"])
@pytest.mark.parametrize("part", [None, "head"])
def test_imaml_is_its_plain_loop(name, part):
    case = problem(name, steps=3, lr=0.1)
    settings = {"strength": 20.0, "iterations": 3, "damping": 0.5}

    def learner(**options):
        partial = [] if part is None else [plugins.make("partial-adaptation", adapts=part)]
        return case.learner(plugins=[plugins.make("imaml", **settings), *partial], **options)

    exact = implicit(case, moved=learner().engine.inner.adapted, **settings)
    assert_same(learner(), case, *exact)
    assert_same(learner(task_batching="sequential"), case, *exact)


def line(steps, lr):
    """Linear regression in three weights, of which everything is known in closed form."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    model = nn.Linear(3, 1, bias=False).double()
    model.weight.data.copy_(draw(1, 3))
    batch = TaskBatch(draw(2, 6, 3), draw(2, 6, 1), draw(2, 4, 3), draw(2, 4, 1))
    return Problem(model, batch, lr, steps, "regression")


@given(st.floats(1, 5), st.floats(0, 2))
def test_imaml_is_the_closed_form_on_a_quadratic(strength, damping):
    case = line(150, 0.15)
    start, eye = case.model.weight.detach().flatten(), torch.eye(3, dtype=torch.float64)
    expected = []
    for x, y, query_x, query_y in tasks_of(case.batch):
        hessian = 2 * x.T @ x / len(x)
        end = torch.linalg.solve(hessian + strength * eye, 2 * x.T @ y[:, 0] / 6 + strength * start)
        slope = 2 * query_x.T @ (query_x @ end - query_y[:, 0]) / 4
        matrix = eye + (hessian + damping * eye) / strength
        expected.append(torch.linalg.solve(matrix, slope))
    learner = case.learner(
        plugins=[plugins.make("imaml", strength=strength, damping=damping, iterations=3)]
    )
    taken = learner.meta_gradients(case.batch)["weight"]
    assert_close(taken[0], torch.stack(expected).mean(0), rtol=1e-8, atol=1e-8)


def test_imaml_tends_to_the_unrolled_loop_as_its_steps_grow():
    apart = []
    for steps in (2, 8, 32):
        case = problem("softplus", steps=steps, lr=0.1)
        pull = plugins.make("weight-decay-to-init", strength=4.0)
        unrolled = case.learner(plugins=[pull]).meta_gradients(case.batch)
        solved = case.learner(plugins=[plugins.make("imaml", strength=4.0, iterations=30)])
        taken = solved.meta_gradients(case.batch)
        apart.append(max(float((taken[name] - unrolled[name]).abs().max()) for name in unrolled))
    assert apart[0] > 10 * apart[1] > 100 * apart[2]
    assert apart[2] < 1e-6


@given(problems(steps=(0, 0)))
def test_imaml_without_inner_steps_is_the_multi_task_gradient_bit_for_bit(case):
    solved = case.learner(plugins=[plugins.make("imaml")]).meta_gradients(case.batch)
    assert_close(solved, case.learner().meta_gradients(case.batch), rtol=0, atol=0)


@pytest.mark.parametrize("options", BATCHINGS, ids=str)
@pytest.mark.parametrize("name", ["mlp", "batch-norm", "layer-norm"])
def test_imaml_in_every_batching(name, options):
    case = problem(name, steps=2, lr=0.1)
    make = lambda **more: case.learner(plugins=[plugins.make("imaml", strength=5.0)], **more)  # noqa: E731
    whole, other = make(), make(**options)
    assert_close(other.meta_gradients(case.batch), whole.meta_gradients(case.batch), **SAME)


@pytest.mark.parametrize("options", BATCHINGS, ids=str)
@pytest.mark.parametrize("drawn", [False, True])
def test_imaml_differentiates_twice_what_does_not_adapt(drawn, options):
    """The body, which here is drawn with a deviation of nothing, is in both of its losses."""
    case = problem(steps=3, lr=0.1)

    def taken(*more, **options):
        chain = [plugins.make("partial-adaptation", adapts="head"), *more]
        learner = case.learner(plugins=[*chain, plugins.make("imaml", strength=9.0)], **options)
        ours = learner.meta_gradients(case.batch)
        return {name: each for name, each in ours.items() if not name.startswith("mr-maml")}

    draws = [plugins.make("mr-maml", weights=None, deviation=1e-16, beta=0.0)] * drawn
    assert_close(taken(*draws, **options), taken(), **SAME)


@pytest.mark.parametrize(
    "chain", [["imaml"], ["sharp-maml"], ["l2f", "sharp-maml", "alfa", "aruba"]]
)
def test_a_parameter_that_is_one_number_adapts_too(chain):
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale, self.body = nn.Parameter(scale), copy.deepcopy(case.model)

        def forward(self, x):
            return self.body(x) * self.scale

    case = problem(tasks=2, lr=0.1)
    alone, one = (
        Problem(Scaled(scale), case.batch, 0.1).learner(plugins=chain).meta_gradients(case.batch)
        for scale in (torch.tensor(1.5).double(), torch.tensor([1.5]).double())
    )
    assert_close({**alone, "scale": alone["scale"].view(1)}, one, **SAME)


def test_the_graph_of_imaml_does_not_grow_with_inner_steps():
    saved = {}
    for steps in (2, 20):
        case = problem("mlp", steps=steps)
        for name, chain in {"maml": [], "imaml": [plugins.make("imaml")]}.items():
            learner = case.learner(plugins=chain)
            learner.meta_gradients(case.batch)
            saved[name, steps] = live_graph(
                lambda it=learner, case=case: it.meta_gradients(case.batch)
            )
    assert saved["imaml", 20] == saved["imaml", 2]
    assert saved["maml", 20] > 5 * saved["maml", 2]


def test_imaml_logs_how_far_both_problems_are_from_solved():
    case = line(150, 0.15)
    learner = case.learner(plugins=[plugins.make("imaml", iterations=3)])
    learner.engine.meta_step(learner.prepare_batch(case.batch), 1)
    figures = learner.chain.figures()
    assert figures.keys() == {"imaml.slope", "imaml.residual"}
    assert 0 <= figures["imaml.slope"] < 1e-8 > figures["imaml.residual"] >= 0


def test_imaml_stays_where_a_task_is_solved_or_curvature_is_negative():
    """Neither more iterations nor a singular target makes anything else of it."""
    case = line(5, 0.1)
    taken = [
        case.learner(
            plugins=[plugins.make("imaml", iterations=count, tolerance=1e-6)]
        ).meta_gradients(case.batch)
        for count in (4, 50)
    ]
    assert_close(*taken, rtol=0, atol=0)
    wild = problem("conv4", steps=3, lr=2.0)
    learner = wild.learner(plugins=[plugins.make("imaml", strength=1e-3, iterations=40)])
    assert all(torch.isfinite(each).all() for each in learner.meta_gradients(wild.batch).values())


@pytest.mark.parametrize("name", ["mlp", "conv4"])
def test_imaml_teaches_what_steers_the_steps_by_the_last_one(name):
    """∂L/∂α = −mean of ∂L/∂θ[t,K] ⊙ ∇G(θ[t,K−1]); all else is as without it, bit for bit."""
    case = problem(name, steps=3, lr=0.1)
    imaml = {"strength": 20.0, "iterations": 3}
    alone = case.learner(plugins=[plugins.make("imaml", **imaml)]).meta_gradients(case.batch)
    learner = case.learner(plugins=[plugins.make("meta-sgd"), plugins.make("imaml", **imaml)])
    taken = learner.meta_gradients(case.batch)
    assert_close({key: taken[key] for key in alone}, alone, rtol=0, atol=0)
    _, _, ends = implicit(case, **imaml)
    case.steps -= 1
    _, _, before = implicit(case, **imaml)
    rates = []
    for (_, _, x, y), end, start in zip(tasks_of(case.batch), ends, before, strict=True):
        outer = F.cross_entropy(predict(case.model, end, x), y)
        slopes = torch.autograd.grad(outer, list(end.values()))
        moved = {key: (end[key] - start[key]).detach() / case.lr for key in end}
        rates.append({key: moved[key] * each for key, each in zip(end, slopes, strict=True)})
    for key, value in mean_of(rates).items():
        assert_close(taken[f"meta-sgd.rates.{key.replace('.', '/')}"], value, **SAME)


@pytest.mark.parametrize("other", ["multi-step-loss", "derivative-order", "reptile"])
def test_imaml_refuses_what_answers_for_it(other):
    text = refused(lambda: problem().learner(plugins=["imaml", other]), RequestError)
    assert text == f"plugin 'imaml' conflicts with '{other}': leave one of them out"


def test_imaml_of_one_step_refuses_by_name_what_it_would_never_teach():
    case = problem(steps=1)
    learner = case.learner(plugins=["gradient-sharing", "imaml"])
    assert refused(lambda: learner.meta_gradients(case.batch), RunError) == (
        "plugin 'imaml' in compute_meta_gradients (link 1 of 1, iteration 1) left out a plugin's "
        "parameters ('gradient-sharing.gate', 'gradient-sharing.momentum'), which would then never "
        "learn: answer for them too or, where nothing leads to them, leave their plugin out"
    )


# Sharp-MAML.


def length_of(tensors):
    return torch.cat([each.flatten() for each in tensors]).norm()


def climbed(weights, slopes, rho):
    """θ + ρ g / ‖g‖."""
    scale = rho / length_of(slopes)
    pairs = zip(weights.items(), slopes, strict=True)
    return {name: each + scale * slope for (name, each), slope in pairs}


def sharp_loop(case, start, *, rho, through):
    """The outer loss of tasks that start from `start` and take sharpness-aware inner steps."""
    outers, ends = [], []
    for x, y, query_x, query_y in tasks_of(case.batch):
        fast = {name: each.view_as(each) for name, each in start.items()}

        def slopes(weights, x=x, y=y):
            loss = F.cross_entropy(predict(case.model, weights, x), y)
            return torch.autograd.grad(loss, list(weights.values()), create_graph=True)

        for _ in range(case.steps):
            taken = slopes(fast)
            if rho:
                away = taken if through else [each.detach() for each in taken]
                taken = slopes(climbed(fast, away, rho))
            pairs = zip(fast.items(), taken, strict=True)
            fast = {name: each - case.lr * slope for (name, each), slope in pairs}
        outers.append(F.cross_entropy(predict(case.model, fast, query_x), query_y))
        ends.append(fast)
    return torch.stack(outers).mean(), ends


def sharp(case, *, lower, upper, through=True):
    """Abbas et al., algorithm 1."""
    start = dict(case.model.named_parameters())
    outer, ends = sharp_loop(case, start, rho=lower, through=through)
    slopes = torch.autograd.grad(outer, list(start.values()))
    if upper:
        there = own(climbed(start, slopes, upper))
        perturbed, _ = sharp_loop(case, there, rho=lower, through=through)
        slopes = torch.autograd.grad(perturbed, list(there.values()))
    return dict(zip(start, slopes, strict=True)), outer, ends


@pytest.mark.parametrize("name", ["mlp", "conv4"])
@pytest.mark.parametrize(
    ("level", "through"), [("lower", True), ("lower", False), ("upper", True), ("both", True)]
)
def test_sharp_maml_is_its_plain_loop(name, level, through):
    case = problem(name, steps=2, lr=0.1)
    lower, upper = 0.07 * (level != "upper"), 0.2 * (level != "lower")
    exact = sharp(case, lower=lower, upper=upper, through=through)
    settings = {"lower_rho": 0.07, "upper_rho": 0.2, "through_perturbation": through}
    for options in ({}, {"task_batching": "sequential"}, {"checkpoint_steps": 1}):
        plugin = plugins.make("sharp-maml", level=level, **settings)
        assert_same(case.learner(plugins=[plugin], **options), case, *exact)


@given(problems(["softplus", "layer-norm"], tasks=(1, 1), steps=(0, 0)), st.floats(0.01, 1))
def test_sharp_maml_of_one_task_and_no_step_is_sam(case, rho):
    plugin = plugins.make("sharp-maml", level="upper", upper_rho=rho)
    x, y = case.batch.query_x[0], case.batch.query_y[0]
    start = own(dict(case.model.named_parameters()))
    slopes = torch.autograd.grad(F.cross_entropy(case.model(x), y), list(case.model.parameters()))
    there = own(climbed(start, slopes, rho))
    loss = F.cross_entropy(predict(case.model, there, x), y)
    exact = dict(zip(there, torch.autograd.grad(loss, list(there.values())), strict=True))
    assert_close(case.learner(plugins=[plugin]).meta_gradients(case.batch), exact, **SAME)


@given(problems(["mlp", "batch-norm"], steps=(0, 2)))
def test_sharp_maml_of_no_distance_is_maml_bit_for_bit(case):
    off = plugins.make("sharp-maml", lower_rho=0, upper_rho=0)
    taken = case.learner(plugins=[off]).meta_gradients(case.batch)
    assert_close(taken, case.learner().meta_gradients(case.batch), rtol=0, atol=0)


def test_sharp_maml_takes_chunks_only_where_its_distance_is_each_tasks_own():
    case = problem()
    lower = [plugins.make("sharp-maml", level="lower") for _ in range(2)]
    whole = case.learner(plugins=lower[:1]).meta_gradients(case.batch)
    parts = case.learner(plugins=lower[1:], chunk_size=1).meta_gradients(case.batch)
    assert_close(parts, whole, **SAME)
    assert refused(lambda: case.learner(plugins=["sharp-maml"], chunk_size=1), RequestError) == (
        "chunk_size = 1 takes a few tasks at a time, but plugin 'sharp-maml' couples all tasks of "
        "a batch: leave one of the two out, or use checkpoint_steps, which saves memory with every "
        "plugin"
    )


# WarpGrad.


def warped(case, moved, *, through_step):
    """Flennerhag et al., section 2: each step of each task by itself, from a constant point."""
    start = dict(case.model.named_parameters())
    outers, ends = [], []
    for x, y, query_x, query_y in tasks_of(case.batch):
        fast = own({name: start[name] for name in moved})
        for _ in range(case.steps):
            loss = F.cross_entropy(predict(case.model, {**start, **fast}, x), y)
            slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            slopes = slopes if through_step else [each.detach() for each in slopes]
            pairs = zip(fast.items(), slopes, strict=True)
            there = {name: each.detach() - case.lr * slope for (name, each), slope in pairs}
            outers.append(
                F.cross_entropy(predict(case.model, {**start, **there}, query_x), query_y)
            )
            fast = own(there)
        ends.append(fast)
    outer = torch.stack(outers).mean()
    fixed = [name for name in start if name not in moved]
    taken = torch.autograd.grad(outer, [start[name] for name in fixed])
    directions = [{name: (start[name] - end[name]).detach() for name in moved} for end in ends]
    return {**dict(zip(fixed, taken, strict=True)), **mean_of(directions)}, outer, ends


@pytest.mark.parametrize("name", ["mlp", "conv4"])
@pytest.mark.parametrize("through_step", [True, False])
def test_warp_grad_is_its_plain_loop(name, through_step):
    case = problem(name, steps=3, lr=0.1)

    def learner(**options):
        return case.learner(
            plugins=[plugins.make("warp-grad", through_step=through_step)], **options
        )

    exact = warped(case, learner().engine.inner.adapted, through_step=through_step)
    for options in ({}, *BATCHINGS):
        if options == {"chunk_size": 1}:
            assert_close(learner(**options).meta_gradients(case.batch), exact[0], **SAME)
        else:
            assert_same(learner(**options), case, *exact)


def test_warp_grad_through_the_loop_is_partial_adaptation_bit_for_bit():
    case = problem(steps=2)
    warp = plugins.make("warp-grad", warp=["0.*"], objective="through-loop")
    partial = plugins.make("partial-adaptation", adapts="body", head=["0.*"])
    taken = [case.learner(plugins=[it]).meta_gradients(case.batch) for it in (warp, partial)]
    assert_close(*taken, rtol=0, atol=0)


def test_warp_grad_says_where_nothing_or_everything_would_warp():
    texts = {
        "head.*": "plugin 'warp-grad': the pattern 'head.*' matches none of the parameters that "
        "may adapt (0.weight, 0.bias, 2.weight, 2.bias): correct warp",
        "*": "plugin 'warp-grad' needs layers that warp beside layers that adapt, but of 4 "
        "parameters 4 would warp: correct warp",
    }
    for pattern, text in texts.items():
        make = lambda pattern=pattern: problem().learner(  # noqa: E731
            plugins=[plugins.make("warp-grad", warp=[pattern])]
        )
        assert refused(make, RequestError) == text


@pytest.mark.parametrize(
    ("name", "free", "bound"),
    [
        ("warp-grad", {"objective": "through-loop"}, {}),
        ("sharp-maml", {"level": "lower"}, {"level": "upper"}),
    ],
)
def test_it_conflicts_with_reptile_only_where_it_makes_the_meta_gradient_itself(name, free, bound):
    case = problem("mlp", tasks=2)
    beside = lambda **settings: [plugins.make(name, **settings), *reptile(1)]  # noqa: E731
    assert case.learner(plugins=beside(**free)).meta_gradients(case.batch)
    text = refused(lambda: case.learner(plugins=beside(**bound)), RequestError)
    assert text.startswith(f"plugin '{name}' conflicts with ")


def test_warp_grad_logs_how_far_tasks_move():
    case = problem(steps=2)
    learner = case.learner(plugins=["warp-grad"])
    _, _, ends = warped(case, learner.engine.inner.adapted, through_step=True)
    start = dict(case.model.named_parameters())
    moved = [length_of([end[name] - start[name] for name in end]) for end in ends]
    expected = torch.stack(moved).mean().item()
    learner.engine.meta_step(learner.prepare_batch(case.batch), 1)
    assert learner.chain.figures() == {"warp-grad.distance": pytest.approx(expected, rel=1e-10)}
