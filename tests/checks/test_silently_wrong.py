"""What would be wrong in silence: how wrong it is without a guard, against plain loops in float64,
and what metaplug does about it.

Errors are |ours − exact| / |exact|, over all meta-gradients as one vector. docs/reliability.md has
the table of them.
"""

import copy
import warnings
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import higher
import pytest
import torch
import torch.distributed as dist
from metaplug_plugins.gradient_clipping import GradientClipping
from metaplug_plugins.gradient_sharing import GradientSharing
from support.ranks import on_ranks, shard
from test_guards import body
from test_inner_loop import Lstm
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from metaplug import MetaLearner, Plugin, RequestError, RunError, hookimpl
from metaplug.checks.model_changes import ModelChanges
from metaplug.checks.probe_model import CHECKPOINTED, Probed
from metaplug.checks.refuse_memory import REMEMBERS
from metaplug.checks.refuse_other_weights import OTHER_WEIGHTS
from metaplug.core import vmap_rules
from metaplug.core.functional_model import FunctionalModel
from metaplug.core.optimizers import DifferentiableOptimizer
from metaplug.core.outer_loop import OuterLoop
from metaplug.execution.ranks import Share, World
from metaplug.execution.traced import CompiledDerivation
from metaplug.testing import Stream, adapted, problem, reference

CASE = problem()
BATCH = CASE.batch


def off(ours, exact):
    """The relative error of meta-gradients; one that is missing counts as zero."""
    wrong = sum(
        float((ours[name] - value).square().sum() if name in ours else value.square().sum())
        for name, value in exact.items()
    )
    return (wrong / sum(float(value.square().sum()) for value in exact.values())) ** 0.5


def exactly(model, batch=BATCH, **settings):
    """Meta-gradients of MAML by a plain loop over tasks."""
    return reference.maml(model, batch, **{"steps": 2, "lr": 0.3, **settings}).gradients


def learner_of(model, **settings):
    return MetaLearner(model, **{"inner_lr": 0.3, "inner_steps": 2, **settings})


def double(make=body, *arguments):
    torch.manual_seed(0)
    return make(*arguments).double()


def by_hand(model, inner_gradient, batch=BATCH):
    """Meta-gradients of a loop over tasks stacked by vmap, two steps; `inner_gradient(loss)` is
    what takes the gradient of a loss."""
    weights = {
        name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()
    }
    buffers = {name: None for name, _ in model.named_buffers()}

    def loss(given, x, y):
        return F.cross_entropy(functional_call(model, {**given, **buffers}, (x,)), y)

    def task(x, y, query_x, query_y):
        fast = weights
        for _ in range(2):
            gradients = inner_gradient(loss)(fast, x, y)
            fast = {name: weight - 0.3 * gradients[name] for name, weight in fast.items()}
        return loss(fast, query_x, query_y)

    losses = vmap(task)(batch.support_x, batch.support_y, batch.query_x, batch.query_y)
    return dict(
        zip(weights, torch.autograd.grad(losses.mean(), list(weights.values())), strict=True)
    )


@pytest.fixture
def unguarded(monkeypatch):
    """Without what refuses a model or a change of it, and without what follows its buffers."""

    def unprobed(inner, batch, kind):
        return Probed(3, frozenset())

    monkeypatch.setattr("metaplug.checks.prepare_batch.probe_model", unprobed)
    monkeypatch.setattr("metaplug.checks.prepare_batch.difference", lambda inner, batch: None)
    monkeypatch.setattr("metaplug.learner.check_model", lambda model, batch_norm: None)
    monkeypatch.setattr("metaplug.learner.check_loss", lambda loss: None)
    monkeypatch.setattr(ModelChanges, "check", lambda self: False)
    monkeypatch.setattr(OuterLoop, "_refuse_unregistered", lambda self, outer_loss: None)
    begin = FunctionalModel.begin

    def begin_with_old_buffers(self, training):
        self._buffers = []
        begin(self, training)

    monkeypatch.setattr(FunctionalModel, "begin", begin_with_old_buffers)


def about(error):
    return pytest.approx(error, rel=0.1)


# vmap(grad) through normalisations.


@pytest.mark.parametrize(("name", "error"), [("batch-norm", 0.0115), ("layer-norm", 0.0194)])
def test_vmap_of_grad_is_wrong_through_normalisations(name, error):
    case = problem(name)
    exact, untracked = exactly(case.model), copy.deepcopy(case.model)
    for layer in untracked.modules():
        if isinstance(layer, nn.BatchNorm1d):
            (
                layer.track_running_stats,
                layer.running_mean,
                layer.running_var,
                layer.num_batches_tracked,
            ) = False, None, None, None
    wrong = by_hand(untracked, grad)
    assert off(wrong, exact) == about(error)
    if name == "batch-norm":  # the gradient of a bias in front of it is zero, but for rounding
        assert float(exact["0.bias"].norm()) < 1e-15
        assert float(wrong["0.bias"].norm()) > 1e-4
    for batching in ("vectorized", "sequential"):
        assert (
            off(learner_of(case.model, task_batching=batching).meta_gradients(BATCH), exact) < 1e-13
        )


def test_vmap_of_grad_is_exact_where_nothing_is_normalised_over_examples():
    case = problem("group-norm")
    assert off(by_hand(case.model, grad), exactly(case.model)) < 1e-13


# The norm of a gradient that is exactly zero.


class Unit(Plugin):
    """Divides by a root that has no derivative at zero."""

    @hookimpl
    def transform_gradients(self, gradients):
        return {
            name: gradient / (gradient.square().sum((1, 2), keepdim=True).sqrt() + 1)
            for name, gradient in gradients.items()
        }


def test_the_norm_of_a_zero_gradient_has_no_derivative():
    model, batch = double(lambda: nn.Sequential(nn.Linear(4, 3, bias=False))), problem().batch
    batch.support_x[0] = 0
    assert bool(learner_of(model, plugins=[Unit()]).meta_gradients(batch)["0.weight"].isnan().all())

    class Tasks:
        def batch(self, iteration, indices):
            return batch

    with pytest.raises(RunError, match=r"nothing was updated: .*NaN"):
        learner_of(model, plugins=[Unit()]).fit(Tasks(), iterations=1, tasks_per_batch=3)
    for plugin in (
        GradientSharing(gate=0.5),
        GradientSharing(gate=0.5, scope="tensor"),
        GradientClipping(max_norm=0.1),
    ):
        found = learner_of(copy.deepcopy(model), plugins=[plugin]).meta_gradients(batch)
        assert all(bool(gradient.isfinite().all()) for gradient in found.values())


# Sums over ranks inside the differentiated loop.


def without_adjoint(share, x):
    """The right value, summed by torch.distributed as it stands: what other ranks do with it is not
    differentiated."""
    total = x * share.weight
    dist.all_reduce(total)
    return total


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("tasks", "error"), [(4, 0.0572), (3, 0.123)])
def test_a_plain_sum_over_ranks_has_a_wrong_gradient(tasks, error):
    # By the clamp, whose weight is the same, autograd differentiates the mean.
    plugin = GradientSharing(gate=0.5, momentum=0.0, gate_function="clamp")
    case, sharing = problem(tasks=tasks), {"plugins": [plugin]}

    def find(world, mean=None):
        warnings.simplefilter("ignore")  # newer versions of torch warn of it
        if mean is not None:  # in a process of its own
            Share.mean = mean
        return case.learner(world=world, **sharing).meta_gradients(shard(case.batch, world))

    gate, momentum = (
        torch.full((2,), reference.logit(0.5), dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    exact = reference.gradient_sharing(
        case.model, case.batch, steps=2, lr=0.3, gate=gate, momentum=momentum
    ).gradients
    exact = {
        name: value for name, value in exact.items() if name in dict(case.model.named_parameters())
    }
    for found, expected in (
        (on_ranks(find), pytest.approx(0, abs=1e-13)),
        (on_ranks(partial(find, mean=without_adjoint)), about(error)),
    ):
        assert [off(each, exact) for each in found] == [expected, expected]


def test_the_mean_of_unequal_shards_is_not_the_mean_over_tasks():
    exact, parts = (
        exactly(CASE.model),
        [exactly(CASE.model, shard(BATCH, rank)) for rank in (World(0, 2), World(1, 2))],
    )
    assert off({name: (parts[0][name] + parts[1][name]) / 2 for name in exact}, exact) == about(
        0.772
    )
    found = on_ranks(
        lambda world: learner_of(CASE.model, world=world).meta_gradients(shard(BATCH, world))
    )
    assert all(off(each, exact) < 1e-13 for each in found)


# What higher does when it is used as it stands.


def by_higher(model, optimizer, *, steps=2, override=lambda step: {}, **options):
    """The meta-loss of a loop as higher's documentation has it."""
    total = torch.zeros((), dtype=torch.float64)
    for task in range(BATCH.num_tasks):
        with higher.innerloop_ctx(model, optimizer, **options) as (patched, inner):
            for step in range(steps):
                inner.step(
                    F.cross_entropy(patched(BATCH.support_x[task]), BATCH.support_y[task]),
                    override=override(step),
                )
            total = (
                total
                + F.cross_entropy(patched(BATCH.query_x[task]), BATCH.query_y[task])
                / BATCH.num_tasks
            )
    return total


def gradients_by_higher(model, optimizer, **options):
    weights = dict(model.named_parameters())
    taken = torch.autograd.grad(
        by_higher(model, optimizer, **options), list(weights.values()), allow_unused=True
    )
    return {
        name: gradient
        for name, gradient in zip(weights, taken, strict=True)
        if gradient is not None
    }


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), lr=0.3, **settings)


def test_copied_initial_weights_cut_the_meta_gradient():
    model = double()
    exact = exactly(model)
    assert gradients_by_higher(model, sgd(model)) == {}
    assert off(gradients_by_higher(model, sgd(model), copy_initial_weights=False), exact) < 1e-13
    assert off(learner_of(model).meta_gradients(BATCH), exact) < 1e-13


def test_untracked_higher_grads_are_not_first_order():
    model = double()
    first = exactly(model, order=1)
    assert (
        gradients_by_higher(model, sgd(model), copy_initial_weights=False, track_higher_grads=False)
        == {}
    )
    assert off(first, exactly(model)) == about(0.511)
    assert off(learner_of(model, preset="fomaml").meta_gradients(BATCH), first) < 1e-13


def test_overridden_settings_stay_for_later_steps():
    class Slow(Plugin):
        @hookimpl
        def transform_learning_rates(self, learning_rates, step):
            return (
                {name: rate / 10 for name, rate in learning_rates.items()}
                if step.index == 0
                else None
            )

    model = double()
    exact = reference.loop(
        model, BATCH, steps=2, rate=lambda step, name: 0.03 if step == 0 else 0.3
    ).gradients
    slow = gradients_by_higher(
        model,
        sgd(model),
        override=lambda step: {"lr": [torch.tensor(0.03)]} if step == 0 else {},
        copy_initial_weights=False,
    )
    assert off(slow, exact) == about(0.396)
    assert off(learner_of(model, plugins=[Slow()]).meta_gradients(BATCH), exact) < 1e-13


def test_maximize_is_ignored_by_higher():
    model = double()
    ignored = gradients_by_higher(model, sgd(model, maximize=True), copy_initial_weights=False)
    assert off(ignored, exactly(model, lr=-0.3)) == about(0.826)
    with pytest.raises(
        RequestError,
        match=r"^inner optimizer 'sgd' does not take the setting 'maximize': higher would "
        r"ignore it",
    ):
        learner_of(model, inner_optimizer_settings={"maximize": True})


def test_learned_betas_get_a_wrong_meta_gradient():
    model, betas = (
        double(),
        [torch.tensor(beta, dtype=torch.float64, requires_grad=True) for beta in (0.9, 0.99)],
    )
    adam = torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # of torch, for the root that is not differentiated
        loss = by_higher(
            model,
            adam,
            steps=3,
            override=lambda step: {"betas": [tuple(betas)]},
            copy_initial_weights=False,
        )
    wrong = torch.autograd.grad(loss, betas)
    total = torch.zeros((), dtype=torch.float64)
    for task in range(BATCH.num_tasks):
        weights = dict(model.named_parameters())
        rules = {name: reference.Adam(tuple(betas), 1e-4) for name in weights}
        for _ in range(3):
            loss = F.cross_entropy(
                reference.predict(model, weights, BATCH.support_x[task]), BATCH.support_y[task]
            )
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {
                name: rules[name](weights[name], each, 0.05)
                for name, each in zip(weights, gradients, strict=True)
            }
        total = (
            total
            + F.cross_entropy(
                reference.predict(model, weights, BATCH.query_x[task]), BATCH.query_y[task]
            )
            / BATCH.num_tasks
        )
    exact = torch.autograd.grad(total, betas)
    assert [float(each) for each in exact] == [about(0.0206), about(-0.0042)]
    assert [float(each) for each in wrong] == [about(0.0194), about(5.44)]
    with pytest.raises(RequestError) as error:
        learner_of(model, inner_optimizer="adam", inner_optimizer_settings={"betas": betas})
    assert str(error.value) == (
        "inner optimizer 'adam' is given a tensor as 'betas', whose meta-gradient higher gets "
        "wrong: give plain numbers"
    )


@pytest.mark.parametrize(("eps", "error"), [(1e-8, 0.0625), (1e-4, 0.924), (1e-2, 0.981)])
def test_adams_eps_stands_behind_the_bias_correction(monkeypatch, eps, error):
    model, settings = (
        double(),
        {
            "inner_lr": 0.05,
            "inner_steps": 3,
            "inner_optimizer": "adam",
            "inner_optimizer_settings": {"eps": eps},
        },
    )
    exact = exactly(model, steps=3, lr=0.05, rule=lambda: reference.Adam(eps=eps))
    assert off(learner_of(model, **settings).meta_gradients(BATCH), exact) < 1e-12
    monkeypatch.setattr(DifferentiableOptimizer, "_corrected", lambda self: {})
    assert off(learner_of(model, **settings).meta_gradients(BATCH), exact) == about(error)


def test_steps_made_again_need_the_optimizers_state(monkeypatch):
    model = double()
    settings = {
        "inner_lr": 0.05,
        "inner_steps": 3,
        "inner_optimizer": "adam",
        "inner_optimizer_settings": {"eps": 1e-4},
    }
    exact = exactly(model, steps=3, lr=0.05, rule=lambda: reference.Adam(eps=1e-4))
    assert (
        off(learner_of(model, checkpoint_steps=1, **settings).meta_gradients(BATCH), exact) < 1e-12
    )
    monkeypatch.setattr(DifferentiableOptimizer, "restore", lambda self, snapshot: None)
    assert off(
        learner_of(model, checkpoint_steps=1, **settings).meta_gradients(BATCH), exact
    ) == about(0.198)


# Hooks, and weights from elsewhere.


def hooked(kind, hook):
    model = double()
    getattr(model[1], f"register_{kind}_hook")(hook)
    return model


HOOKED = {
    "forward hook": partial(hooked, "forward", lambda module, given, output: 2 * output),
    "forward pre-hook": partial(hooked, "forward_pre", lambda module, given: (2 * given[0],)),
    "backward hook": partial(hooked, "full_backward", lambda module, given, taken: (2 * given[0],)),
}


@pytest.mark.parametrize(("preset", "order"), [("maml", 2), ("fomaml", 1)])
@pytest.mark.parametrize("batching", ["auto", "sequential"])
@pytest.mark.parametrize("name", HOOKED)
def test_hooks_are_exact(name, batching, preset, order):
    """vmap does not call backward hooks: "auto" finds that out."""
    exact = exactly(HOOKED[name](), order=order)
    learner = learner_of(HOOKED[name](), preset=preset, task_batching=batching)
    assert off(learner.meta_gradients(BATCH), exact) < 1e-10
    alone = name == "backward hook" or batching == "sequential"
    assert learner.batching.batching == ("sequential" if alone else "vectorized")
    assert off(exact, exactly(double(), order=order)) > 0.1


class ByHand(nn.Module):
    """A linear layer whose weight is g · v / ‖v‖, with norms over all axes but one, or over all."""

    def __init__(self, layer, dim):
        super().__init__()
        self.axes = [axis for axis in range(2) if axis != dim]
        self.bias, self.weight_v = layer.bias, layer.weight
        self.weight_g = nn.Parameter(self.norm().detach())

    def norm(self):
        return self.weight_v.square().sum(self.axes, keepdim=True).sqrt()

    def forward(self, x):
        return F.linear(x, self.weight_v * (self.weight_g / self.norm()), self.bias)


def weight_norm_by_hand(dim):
    model = double()
    model[0] = ByHand(model[0], dim)
    return model


def weight_norm(kind, dim):
    """A model with torch's weight norm, and the names of its parameters as ByHand has them."""
    model = double()
    if kind == "new":
        nn.utils.parametrizations.weight_norm(model[0], dim=dim)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(model[0], dim=dim)
    end = "parametrizations.weight.original"
    names = {f"0.{end}0": "0.weight_g", f"0.{end}1": "0.weight_v"}
    return model, {name: names.get(name, name) for name, _ in model.named_parameters()}


def as_by_hand(found, names):
    """Meta-gradients, or weights, by the names of ByHand."""
    own = {name: found[theirs].detach() for theirs, name in names.items()}
    return {n: each.view(1, 1) if each.dim() == 0 else each for n, each in own.items()}


WEIGHT_NORMS = [("old", 0), ("new", 0), ("new", 1), ("new", None)]


@pytest.mark.parametrize(("preset", "order"), [("maml", 2), ("fomaml", 1)])
@pytest.mark.parametrize("batching", ["vectorized", "sequential", "traced"])
@pytest.mark.parametrize(("kind", "dim"), WEIGHT_NORMS)
def test_weight_norm_is_exact(kind, dim, batching, preset, order):
    model, names = weight_norm(kind, dim)
    exact = reference.maml(weight_norm_by_hand(dim), BATCH, steps=2, lr=0.3, order=order)
    wanted = "auto" if batching == "traced" else batching
    learner = learner_of(model, preset=preset, task_batching=wanted)
    if batching == "traced":
        learner.engine.derivation = CompiledDerivation(learner.engine, lambda graph, inputs: graph)
    found = as_by_hand(learner.meta_gradients(BATCH), names)
    assert off(found, exact.gradients) < 1e-10
    assert learner.batching.batching == ("sequential" if batching == "sequential" else "vectorized")
    own = learner.adapt(BATCH.support_x[0], BATCH.support_y[0])
    fast = {name: weight.detach() for name, weight in exact.adapted[0].items()}
    assert off(as_by_hand(dict(own.named_parameters()), names), fast) < 1e-10


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of torch's own
@pytest.mark.parametrize(("kind", "dim", "error"), [("old", 0, 0.0554), ("new", 1, 0.0526)])
def test_torchs_weight_norm_has_a_wrong_second_derivative(kind, dim, error, monkeypatch):
    monkeypatch.delitem(vmap_rules._RULES, torch._weight_norm)
    model, names = weight_norm(kind, dim)
    exact = exactly(weight_norm_by_hand(dim))
    for batching in ("vectorized", "sequential"):
        wrong = learner_of(model, task_batching=batching).meta_gradients(BATCH)
        assert off(as_by_hand(wrong, names), exact) == about(error)


class HookedByMethod(nn.Module):
    """A hook that is a method of the model: it reads a weight and the mode, and writes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.scale, self.kept = nn.Parameter(torch.ones(6)), None
        self.first.register_forward_hook(self.hook())

    def hook(self):
        return self.keep

    def keep(self, module, given, output):
        self.kept = self.scale * output if self.training else output / 2
        return self.kept

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class HookedByPartial(HookedByMethod):
    def hook(self):
        return partial(self.keep_of, self)

    def keep_of(self, owner, module, given, output):
        owner.keep(module, given, output)

    def forward(self, x):
        self.first(x)
        return self.second(torch.tanh(self.kept))


class HookedByClosure(HookedByMethod):
    def hook(self):
        return lambda *given: self.keep(*given) + 0


class WithoutHook(HookedByMethod):
    def forward(self, x):
        return self.second(torch.tanh(self.scale * F.linear(x, self.first.weight, self.first.bias)))


@pytest.mark.parametrize("make", [HookedByMethod, HookedByPartial])
@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
def test_hooks_that_are_methods_of_the_model_are_exact(batching, make):
    exact = exactly(double(WithoutHook))
    model = double(make).eval()
    learner = learner_of(model, task_batching=batching)
    assert off(learner.meta_gradients(BATCH), exact) < 1e-10
    score = learner.evaluate([BATCH]).mean
    model.train()
    assert off(learner.meta_gradients(BATCH), exact) < 1e-10
    assert learner.evaluate([BATCH]).mean == score
    x, own = BATCH.query_x[0], learner.adapt(BATCH.support_x[0], BATCH.support_y[0])
    hidden = F.linear(x, own.first.weight, own.first.bias) / 2  # in evaluation mode
    torch.testing.assert_close(
        own(x), F.linear(torch.tanh(hidden), own.second.weight, own.second.bias)
    )
    assert model.kept is None


def test_a_hook_of_a_copy_is_wrong_where_it_is_bound_to_the_users_model(unguarded, monkeypatch):
    monkeypatch.setattr("metaplug.core.hooks._rebound", lambda hook, copies: hook)
    exact = exactly(double(WithoutHook))
    for mode, error in ((True, 0.0302), (False, 0.489)):
        for batching in ("vectorized", "sequential"):
            model = double(HookedByMethod).train(mode)
            wrong = learner_of(model, task_batching=batching).meta_gradients(BATCH)
            assert off(wrong, exact) == about(error)


def test_hooks_that_close_over_the_model_are_refused():
    text = (
        "a forward {} of the module 'first' is a function that closes over the model, and would "
        "read and write yours where a copy of it runs: make it a method of the module, or "
        "override forward"
    )
    with pytest.raises(RequestError) as refusal:
        learner_of(double(HookedByClosure))
    assert str(refusal.value) == text.format("hook")
    model = double(HookedByMethod)
    learner = learner_of(model)
    learner.meta_gradients(BATCH)

    def later(module, given, model=model):
        return (2 * given[0],) if model.training else None

    def wrapped(module, given):
        return later(module, given)

    for hook in (later, wrapped, partial(later), lambda module, given, by=model.keep: None):
        handle = model.first.register_forward_pre_hook(hook)
        with pytest.raises(RequestError) as refusal:
            learner.meta_gradients(BATCH)
        assert str(refusal.value) == text.format("pre-hook")
        handle.remove()
    seen = []
    model.first.register_forward_pre_hook(lambda module, given: seen.append(len(given)))
    assert off(learner.meta_gradients(BATCH), exactly(double(WithoutHook))) < 1e-10
    assert seen


GRADIENT_HOOKS = {
    "register_hook": lambda gradient: gradient * torch.tensor([[1.0], [0.0], [0.0]]),
    "register_post_accumulate_grad_hook": lambda parameter: parameter.grad.zero_(),
}


@pytest.mark.parametrize("kind", GRADIENT_HOOKS)
def test_hooks_on_parameters_are_refused(kind):
    text = (
        "the model's parameter '2.weight' has a hook on its gradient, which no gradient of a "
        "task's own weights would reach: remove it, and change gradients in a plugin's "
        "transform_gradients, and meta-gradients in its transform_meta_gradients"
    )
    model = double()
    later = learner_of(model)
    later.meta_gradients(BATCH)
    handle = getattr(model[2].weight, kind)(GRADIENT_HOOKS[kind])
    calls = (
        partial(learner_of, model),
        partial(later.meta_gradients, BATCH),
        partial(later.adapt, BATCH.support_x[0], BATCH.support_y[0]),
    )
    for call in calls:
        with pytest.raises(RequestError) as refusal:
            call()
        assert str(refusal.value) == text
    handle.remove()
    for learner in (later, learner_of(model)):
        assert off(learner.meta_gradients(BATCH), exactly(double())) < 1e-10


def test_hooks_on_parameters_would_reach_the_meta_gradient_alone(unguarded):
    """One that leaves a row as it is would have to do so in the inner loop, too."""
    model, free = double(), double()
    mask = torch.tensor([[1.0], [0.0], [0.0]]).double()
    model[2].weight.register_hook(lambda gradient: gradient * mask)
    exact = reference.loop(
        free,
        BATCH,
        steps=2,
        rate=lambda k, name: 0.3 * mask if name == "2.weight" else 0.3,
    ).gradients
    exact["2.weight"] = mask * exact["2.weight"]
    for batching in ("vectorized", "sequential"):
        wrong = learner_of(model, task_batching=batching).meta_gradients(BATCH)
        assert off(wrong, exact) == about(0.353)


class Router(nn.Module):
    """Calls a function that is stored on its module and closes over it."""

    def __init__(self):
        super().__init__()
        self.inside = inside = body()
        self.inside.route = lambda x: inside[0](x).clone()

    def forward(self, x):
        return self.inside[2](torch.tanh(self.inside.route(x)))


def test_stored_closures_run_the_users_weights(unguarded, monkeypatch):
    exact = exactly(double(Router))
    for batching, error in (("vectorized", 0.3), ("sequential", 0.3)):
        wrong = learner_of(double(Router), task_batching=batching).meta_gradients(BATCH)
        assert off(wrong, exact) == about(error)
    monkeypatch.undo()
    with pytest.raises(RequestError) as refusal:
        learner_of(double(Router)).meta_gradients(BATCH)
    assert str(refusal.value) == OTHER_WEIGHTS.format("'inside.0.weight', 'inside.0.bias'")


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x):
        return checkpoint(self.second, self.first(x), use_reentrant=False)


class Plain(Checkpointed):
    def forward(self, x):
        return self.second(self.first(x))


def test_activation_checkpointing_runs_later_weights(unguarded, monkeypatch):
    exact = exactly(double(Plain))
    learner = learner_of(double(Checkpointed), task_batching="sequential")
    assert off(learner.meta_gradients(BATCH), exact) == about(0.365)
    monkeypatch.undo()
    with pytest.raises(RequestError) as refusal:
        learner_of(double(Checkpointed)).meta_gradients(BATCH)
    assert str(refusal.value) == CHECKPOINTED


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
def test_layers_that_compile_themselves_run_as_they_are(batching):
    """What Module.compile() leaves on a module is not copied with it."""
    model = double()
    model[0]._compiled_call_impl = lambda x: 1 / 0
    model.compile(backend="eager")
    found = learner_of(model, task_batching=batching).meta_gradients(BATCH)
    assert off(found, exactly(double())) < 1e-13


# What is changed after the learner was made.


class Scaled(nn.Module):
    """Reads a buffer and a number."""

    def __init__(self):
        super().__init__()
        self.layers, self.power = body(), 1.0
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return self.layers(x) * self.scale * self.power


def write(model):
    model.scale.fill_(3)


def load(model):
    model.load_state_dict({**model.state_dict(), "scale": torch.tensor(3.0)})


def register(model):
    model.scale = torch.tensor(3.0, dtype=torch.float64)


@pytest.mark.parametrize("change", [write, load, register])
@pytest.mark.parametrize("batching", ["vectorized", "sequential", "traced"])
def test_buffers_are_followed(change, batching, unguarded, monkeypatch):
    def change_between():
        model = double(Scaled)
        learner = learner_of(model, task_batching="auto" if batching == "traced" else batching)
        if batching == "traced":
            learner.engine.derivation = CompiledDerivation(
                learner.engine, lambda graph, inputs: graph
            )
        learner.meta_gradients(BATCH)
        change(model)
        return off(learner.meta_gradients(BATCH), exactly(model))

    if change is register:  # what is written in place, the clone shares
        assert change_between() == about(1.01)
    monkeypatch.undo()
    assert change_between() < 1e-13


def test_stored_statistics_that_are_loaded_are_used(tmp_path):
    """As a resumed run does, or a learner that is loaded into a model of other statistics."""

    def both(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
        ).double()
        model[1].running_mean.fill_(0.5 * (1 - seed))
        model[1].running_var.fill_(3 - 2 * seed)
        return model, learner_of(model, batch_norm="frozen")

    def resumed():
        model, learner = both(0)
        _, other = both(1)
        other.load_state_dict(learner.state_dict())
        return off(other.meta_gradients(BATCH), exactly(copy.deepcopy(model).eval()))

    assert resumed() < 1e-13
    model, learner = both(0)
    learner.save(tmp_path / "learner.pt")
    found = MetaLearner.load(tmp_path / "learner.pt", model=both(1)[0]).meta_gradients(BATCH)
    assert off(found, exactly(model.eval())) < 1e-13


def replace_layer(model):
    model.layers[2] = nn.Linear(6, 3).double()


def replace_weight(model):
    model.layers[0].weight = nn.Parameter(model.layers[0].weight.detach() * 2)


def set_number(model):
    model.power = 3.0


def unfreeze(model):
    model.layers[0].requires_grad_(True)


AFTER = (
    " after the learner was made, which goes on as it was: make a new learner of the changed model"
)
CHANGES = {
    "layer": (
        replace_layer,
        1.45,
        "the model's 'layers.2' was replaced, added or taken away" + AFTER,
    ),
    "weight": (
        replace_weight,
        0.424,
        "the model's 'layers.0.weight' was replaced, added or taken away" + AFTER,
    ),
    "number": (set_number, 1.01, "the model's 'power' was changed from 1.0 to 3.0" + AFTER),
    "unfrozen": (
        unfreeze,
        0.703,
        "requires_grad of the model's 'layers.0.weight' was changed from False to True" + AFTER,
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_the_model_are_not_ignored(name, unguarded, monkeypatch):
    change, error, text = CHANGES[name]

    def begun():
        model = double(Scaled)
        model.layers[0].requires_grad_(name != "unfrozen")
        learner = learner_of(model)
        learner.fit(Stream(), iterations=1, tasks_per_batch=2)
        change(model)
        return model, learner

    model, learner = begun()
    assert off(learner.meta_gradients(BATCH), exactly(model)) == about(error)
    monkeypatch.undo()
    _, learner = begun()
    for call in (
        lambda: learner.meta_gradients(BATCH),
        lambda: learner.fit(Stream(), iterations=1, tasks_per_batch=2),
        lambda: learner.evaluate(Stream(split="test"), num_tasks=2),
        lambda: learner.adapt(BATCH.support_x[0], BATCH.support_y[0]),
    ):
        with pytest.raises(RequestError) as refusal:
            call()
        assert str(refusal.value) == text


def test_other_changes_are_named():
    for change, text in (
        (
            lambda model: model.float(),
            "dtype of the model's 'layers.0.weight' was changed from torch.float64 to "
            "torch.float32",
        ),
        (lambda model: delattr(model, "power"), "the model's 'power' was changed"),
        (lambda model: setattr(model, "power", torch.ones(2)), "the model's 'power' was changed"),
        (
            lambda model: model.add_module("more", nn.ReLU()),
            "the model's 'more' was replaced, added or taken away",
        ),
        (
            lambda model: model.layers[0].requires_grad_(False),
            "requires_grad of the model's 'layers.0.weight' was changed from True to False",
        ),
    ):
        model = double(Scaled)
        learner = learner_of(model)
        change(model)
        with pytest.raises(RequestError) as refusal:
            learner.meta_gradients(BATCH)
        assert str(refusal.value) == text + AFTER


class Shifted(nn.Module):
    """Adds a buffer that may be None."""

    def __init__(self):
        super().__init__()
        self.layers = body()
        self.register_buffer("shift", torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        return self.layers(x) if self.shift is None else self.layers(x) * self.shift * 2


def test_a_buffer_that_becomes_none_is_followed_and_one_taken_away_is_named():
    model = double(Shifted)
    learner = learner_of(model)
    learner.meta_gradients(BATCH)
    model.shift = None
    assert off(learner.meta_gradients(BATCH), exactly(model)) < 1e-13
    del model.shift
    with pytest.raises(RequestError) as refusal:
        learner.meta_gradients(BATCH)
    assert str(refusal.value) == "the model's 'shift' was added or taken away" + AFTER


def test_what_changes_nothing_of_a_forward_pass_is_no_hindrance():
    model = double(Scaled)
    learner, exact = learner_of(model), exactly(model)
    learner.meta_gradients(BATCH)
    model.eval()
    model.power = float("1.0")
    model.layers[1].register_forward_hook(lambda module, given, output: None)
    assert off(learner.meta_gradients(BATCH), exact) < 1e-13


# A module at two places.


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.second = self.first

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Spelt(Twice):
    """The same with the module at one place."""

    def __init__(self):
        super().__init__()
        del self.second

    def forward(self, x):
        return self.head(torch.tanh(self.first(torch.tanh(self.first(x)))))


def test_a_module_at_two_places_keeps_its_parameters():
    model = double(Twice)
    functional_call(
        model,
        {name: weight.detach() * 2 for name, weight in model.named_parameters()},
        (BATCH.support_x[0],),
    )
    assert not isinstance(model.first.weight, nn.Parameter), (
        "torch itself leaves other tensors there"
    )
    model = double(Twice)
    weight, exact = model.first.weight, exactly(double(Spelt))
    assert off(exactly(model), exact) < 1e-13
    for batching in ("vectorized", "sequential"):
        assert off(learner_of(model, task_batching=batching).meta_gradients(BATCH), exact) < 1e-13
    learner_of(model).fit(Stream(), iterations=1)
    assert model.first.weight is model.second.weight is weight


# What a model or a loss remembers, and weights that nobody trains.


class Warming(nn.Module):
    """Answers otherwise from its third call on."""

    def __init__(self):
        super().__init__()
        self.layers, self.calls = body(), 0

    def forward(self, x):
        self.calls += 1
        return self.layers(x) * (1 if self.calls < 3 else 2)


class Recalling(nn.Module):
    """Adds what it had before: of another task."""

    def __init__(self):
        super().__init__()
        self.layers, self.last = body(), None

    def forward(self, x):
        hidden = self.layers(x)
        before, self.last = self.last, hidden.detach()
        return hidden if before is None or before.shape != hidden.shape else hidden + before


class Listed(nn.Module):
    """Keeps a layer in a list of Python's, where nobody finds its weights."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.rest = [nn.Linear(6, 3).double()]

    def forward(self, x):
        return self.rest[0](torch.tanh(self.first(x)))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = body()

    def forward(self, x):
        return self.layers(x.mul_(1.5))


class OutOfPlace(InPlace):
    def forward(self, x):
        return self.layers(x * 1.5)


class Bare(InPlace):
    def forward(self, x):
        return self.layers(x)


class Scaling(nn.Module):
    """A loss with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, prediction, target):
        return self.weight * F.cross_entropy(prediction, target)


def counting():
    """A loss that grows with every call: the tasks' losses depend on their order."""
    calls = [0]

    def loss(prediction, target):
        calls[0] += 1
        return calls[0] * F.cross_entropy(prediction, target)

    return loss


def half_asleep():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 60), nn.Dropout(0.5), nn.Tanh(), nn.Linear(60, 3)).double()
    model[1].eval()
    return model


STRANGERS = (
    "the {} uses tensors that require a gradient and are no parameters of the model (of shape {}), "
    "so that nothing would train them: "
    "register them with the model, as by nn.Parameter and nn.ModuleList, or call "
    "requires_grad_(False) on them"
)
STATES = {
    "a number": (
        partial(double, Warming),
        partial(double, Bare),
        0,  # what forward writes is put back after every pass, but a user's own loop would go on
        REMEMBERS,
    ),
    "a tensor": (
        partial(double, Recalling),
        partial(double, Bare),
        0,
        REMEMBERS,
    ),
    "a layer asleep": (
        half_asleep,
        half_asleep,
        1.86,
        "the layer '1' is in evaluation mode in a model in training mode, but meta-training is in "
        "training mode throughout: "
        "call model.train(), and set what the layer is to do (dropout p = 0, batch_norm "
        "= 'frozen')",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_what_a_model_remembers_is_refused(name, unguarded, monkeypatch):
    make, without, error, text = STATES[name]
    exact = exactly(without())
    assert off(
        learner_of(make(), task_batching="sequential").meta_gradients(BATCH), exact
    ) == pytest.approx(error, rel=0.1, abs=1e-13)
    monkeypatch.undo()
    with pytest.raises(RequestError) as refusal:
        learner_of(make()).meta_gradients(BATCH)
    assert str(refusal.value) == text


def test_an_input_changed_in_place_is_refused(unguarded, monkeypatch):
    """In second order, or with several tasks, torch notices; in first order with one task nobody
    does."""
    single = problem(tasks=1).batch
    exact, batch = exactly(double(OutOfPlace), single, order=1), copy.deepcopy(single)
    assert off(learner_of(double(InPlace), preset="fomaml").meta_gradients(batch), exact) == about(
        0.059
    )
    monkeypatch.undo()
    batch = copy.deepcopy(single)
    with pytest.raises(RequestError) as refusal:
        learner_of(double(InPlace), preset="fomaml").meta_gradients(batch)
    assert str(refusal.value) == (
        "the model changes its input in place, and with it the data of the next inner step: give "
        "it operations that make new tensors"
    )
    assert torch.equal(batch.support_x, single.support_x)


class InPlaceAtEvaluation(InPlace):
    def forward(self, x):
        return self.layers(x * 1.5 if self.training else x.mul_(1.5))


class InPlaceByData(InPlace):
    """Writes where torch does not count it."""

    def forward(self, x):
        x.data.mul_(1.5)
        return self.layers(x)


@pytest.mark.parametrize("model", [InPlaceAtEvaluation, InPlaceByData])
def test_inputs_are_not_written_at_evaluation_or_uncounted_either(model):
    batch = copy.deepcopy(BATCH)
    with pytest.raises(RequestError, match="the model changes its input in place, and with it the"):
        learner_of(double(model)).evaluate(batch)
    assert all(map(torch.equal, batch.tensors(), BATCH.tensors()))


def test_what_a_loss_remembers_is_refused(unguarded, monkeypatch):
    exact = exactly(double())
    assert off(
        learner_of(double(), loss=counting(), task_batching="sequential").meta_gradients(BATCH),
        exact,
    ) == about(12.8)
    monkeypatch.undo()
    with pytest.raises(RequestError) as refusal:
        learner_of(double(), loss=counting()).meta_gradients(BATCH)
    assert str(refusal.value) == (
        "the loss answers otherwise when it is asked again, as if it remembered, so that tasks "
        "would see each other: keep nothing in it"
    )


def hiding(prediction, target):
    """Hides the first class, in place."""
    prediction[:, 0] = -20
    return F.cross_entropy(prediction, target)


def hiding_by_data(prediction, target):
    """The same, where torch does not count it."""
    prediction.data[:, 0] = -20
    return F.cross_entropy(prediction, target)


def hiding_at_evaluation(prediction, target):
    return (F.cross_entropy if torch.is_grad_enabled() else hiding)(prediction, target)


def hiding_where_large(prediction, target):
    return (hiding if prediction.abs().max() > 20 else F.cross_entropy)(prediction, target)


def clamped_to_what_they_are(prediction, target):
    return F.cross_entropy(prediction, target.clamp_(0, 2))


def without_the_last(prediction, target):
    target[target == 2] = 1
    return F.cross_entropy(prediction, target)


def hiding_in_a_copy(prediction, target):
    return hiding(prediction.clone(), target.clone())


WRITTEN = {
    "prediction, so that scores would be those of what it leaves there": (
        hiding,
        hiding_by_data,
        hiding_at_evaluation,
        hiding_where_large,
    ),
    "targets, which are the data of later steps and your own": (
        clamped_to_what_they_are,
        without_the_last,
    ),
}
CASES_OF_WRITES = [(what, loss) for what, losses in WRITTEN.items() for loss in losses]


@pytest.mark.parametrize(("what", "loss"), CASES_OF_WRITES)
def test_a_loss_that_writes_is_refused_and_the_data_stay_whole(what, loss):
    batch = copy.deepcopy(BATCH)
    with pytest.raises(RequestError) as refusal:
        learner_of(double(), loss=loss, task_batching="sequential").meta_gradients(batch)
    assert str(refusal.value) == (
        f"the loss writes into its {what}: give it operations that make new tensors, as clamp for "
        "clamp_, or let it write into a copy, as of clone()"
    )
    assert all(map(torch.equal, batch.tensors(), BATCH.tensors()))


def test_what_a_loss_writes_into_its_prediction_would_be_scored(unguarded, monkeypatch):
    """The first class is never predicted there, though the adapted model does predict it."""
    batch, learner = copy.deepcopy(BATCH), learner_of(double(), loss=hiding)
    found = learner.engine.evaluate(learner.prepare_batch(batch), 2).query_predictions
    assert bool((found[..., 0] == -20).all())
    monkeypatch.undo()
    learner = learner_of(double(), loss=hiding_in_a_copy)
    found = learner.engine.evaluate(learner.prepare_batch(batch), 2).query_predictions
    adapted = learner.adapt(batch.support_x[0], batch.support_y[0])
    torch.testing.assert_close(found[0], adapted(batch.query_x[0]), rtol=0, atol=1e-12)


def test_weights_that_nobody_trains_are_refused(unguarded, monkeypatch):
    assert set(learner_of(double(Listed)).meta_gradients(BATCH)) == {"first.weight", "first.bias"}
    assert set(learner_of(double(), loss=Scaling()).meta_gradients(BATCH)) == set(
        dict(double().named_parameters())
    )
    monkeypatch.undo()
    with pytest.raises(RequestError) as refusal:
        learner_of(double(Listed)).meta_gradients(BATCH)
    assert str(refusal.value) == STRANGERS.format("model", "(3, 6), (3,)")
    frozen = double(Listed)
    frozen.rest[0].requires_grad_(False)
    assert learner_of(frozen).meta_gradients(BATCH)
    with pytest.raises(RequestError) as refusal:
        learner_of(double(), loss=Scaling())
    assert str(refusal.value) == (
        "the loss has the trainable parameters 'weight', which nothing would train: make them a "
        "plugin's, which changes losses in "
        "transform_inner_losses and transform_outer_losses, or call loss.requires_grad_(False)"
    )
    assert learner_of(double(), loss=Scaling().requires_grad_(False)).meta_gradients(BATCH)
    scaling = Scaling().forward
    with pytest.raises(RequestError) as refusal:
        learner_of(double(), loss=scaling).meta_gradients(BATCH)
    assert str(refusal.value) == STRANGERS.format("loss", "()")


# Random numbers.


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
def test_every_task_draws_its_own_dropout(batching):
    """As a plain loop does; vmap's default would be an error, and randomness="same" one mask for
    all tasks."""

    class Noted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 3)

        def forward(self, x):
            """Of 64 values, so that two masks are alike by chance once in 10^19 pairs."""
            return self.layer(F.dropout(x.repeat(1, 16), 0.5, self.training))

    model, batch = double(Noted), problem(tasks=64).batch
    batch = type(batch)(
        torch.ones_like(batch.support_x),
        batch.support_y * 0,
        torch.ones_like(batch.query_x),
        batch.query_y * 0,
    )
    moved = (
        adapted(learner_of(model, inner_steps=1, task_batching=batching), batch)["layer.weight"]
        - model.layer.weight.detach()
    )
    seen = {tuple(row) for row in moved.flatten(1).tolist()}
    assert len(seen) == 64
    same = vmap(lambda x: F.dropout(x, 0.5), randomness="same")(torch.ones(64, 20))
    assert len({tuple(row) for row in same.tolist()}) == 1


def test_random_numbers_of_a_models_own_generator_are_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.generator = body(), torch.Generator()

        def forward(self, x):
            return self.layers(x) + torch.randn(3, generator=self.generator, dtype=x.dtype)

    with pytest.raises(RequestError) as refusal:
        learner_of(double(Own)).meta_gradients(BATCH)
    assert str(refusal.value) == REMEMBERS


# What a trace freezes.


class Counts(Plugin):
    """Keeps a number in Python, which no trace sees."""

    seen = 0

    @hookimpl
    def transform_gradients(self, gradients):
        return {name: gradient / (1 + self.seen) for name, gradient in gradients.items()}


def test_a_trace_does_not_freeze_what_plugins_keep_in_python(monkeypatch):
    def second(trace):
        plugin = Counts()
        plugin.seen = 0
        learner = learner_of(double(), plugins=[plugin])
        if trace:
            learner.engine.derivation = CompiledDerivation(
                learner.engine, lambda graph, inputs: graph
            )
        learner.meta_gradients(BATCH)
        plugin.seen = 1
        return learner.meta_gradients(BATCH)

    exact = second(trace=False)
    assert off(second(trace=True), exact) < 1e-13
    monkeypatch.setattr("metaplug.execution.python_state.PLAIN", ())
    with pytest.warns(UserWarning, match="'seen' of plugin 'counts' changes from step to step"):
        assert off(second(trace=True), exact) < 1e-13


# Derivatives that torch does not have.


def layer_norm(x):
    return (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def test_third_derivatives_through_layer_norm_are_wrong_and_none_is_taken():
    """A meta-gradient needs second derivatives alone, however many inner steps there are."""
    generator = torch.Generator().manual_seed(0)
    x, *directions = (torch.randn(7, 4, dtype=torch.float64, generator=generator) for _ in range(4))
    x.requires_grad_()

    def derivatives(layer):
        value, found = (layer(x) * directions[0]).sum(), []
        for direction in (*directions[1:], directions[0]):
            [gradient] = torch.autograd.grad(value, x, create_graph=True)
            found.append(gradient.detach())
            value = (gradient * direction).sum()
        return found

    errors = [
        float((own - exact).norm() / exact.norm())
        for own, exact in zip(
            derivatives(lambda x: F.layer_norm(x, (4,))), derivatives(layer_norm), strict=True
        )
    ]
    assert errors == [pytest.approx(0, abs=1e-13), pytest.approx(0, abs=1e-13), about(0.179)]
    case = problem("layer-norm", steps=4)
    assert (
        off(
            learner_of(case.model, inner_steps=4).meta_gradients(BATCH),
            exactly(case.model, steps=4),
        )
        < 1e-12
    )


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.project(x).unsqueeze(0)
        return self.head(F.scaled_dot_product_attention(hidden, hidden, hidden)[0])


@pytest.mark.parametrize("batching", ["auto", "sequential"])
def test_attention_takes_the_kernel_that_has_a_second_derivative(batching):
    model = double(Attention)
    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_"):
        exactly(model)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = exactly(model)
    learner = learner_of(model, task_batching=batching)
    assert off(learner.meta_gradients(BATCH), exact) < 1e-13


def test_recurrent_layers_follow_the_fast_weights():
    model = double(Lstm)
    for batching in ("auto", "sequential"):
        assert (
            off(learner_of(model, task_batching=batching).meta_gradients(BATCH), exactly(model))
            < 1e-13
        )


# What surrounds a call.


def test_autocast_does_not_reach_in(monkeypatch):
    case = problem(dtype=torch.float32)

    def surrounded():
        learner = learner_of(case.model)
        expected = learner.meta_gradients(case.batch)
        with torch.autocast("cpu", torch.bfloat16):
            return off(learner.meta_gradients(case.batch), expected)

    assert surrounded() == 0
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    assert surrounded() == about(0.0055)


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode, nullcontext])
def test_grad_mode_and_default_dtype_do_not_reach_in(surroundings):
    model = double()
    expected = learner_of(model).meta_gradients(BATCH)
    learner = learner_of(model)
    torch.set_default_dtype(torch.float16)
    try:
        with surroundings():
            found = learner.meta_gradients(BATCH)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Bent(nn.Module):
    def forward(self, weight):
        return weight.sinh()


def parametrized():
    model = double()
    for layer in (model[0], model[2]):
        nn.utils.parametrize.register_parametrization(layer, "weight", Bent())
    return model


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
def test_cached_parametrizations_do_not_reach_in(batching, monkeypatch):
    model = parametrized()
    exact, settings = exactly(model), {"task_batching": batching}
    expected = learner_of(model, **settings).evaluate([BATCH]).mean
    trained = parametrized()
    learner_of(trained, **settings).fit([BATCH], iterations=2, tasks_per_batch=3)
    learner, fitted, own = learner_of(model, **settings), parametrized(), parametrized()
    with nn.utils.parametrize.cached():
        kept = own[0].weight
        assert off(learner.meta_gradients(BATCH), exact) < 1e-10
        assert learner.evaluate([BATCH]).mean == expected
        learner_of(fitted, **settings).fit([BATCH], iterations=2, tasks_per_batch=3)
        assert own[0].weight is kept  # the caller's cache stays
    pairs = zip(fitted.parameters(), trained.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert (nn.utils.parametrize._cache_enabled, nn.utils.parametrize._cache) == (0, {})
    learner = learner_of(model, **settings)
    learner.meta_gradients(BATCH)
    unguarded = SimpleNamespace(_cache_enabled=0, _cache={})
    monkeypatch.setattr("metaplug.core.recording.parametrize", unguarded)
    with nn.utils.parametrize.cached():
        assert off(learner.meta_gradients(BATCH), exact) == about(0.675)


def test_cached_parametrizations_are_of_each_adapted_model():
    model = parametrized()
    learner, exact = learner_of(model), reference.maml(model, BATCH, steps=2, lr=0.3).adapted
    query = BATCH.query_x[0]
    with torch.no_grad():
        expected = [reference.predict(model, weights, query) for weights in exact]
        plain = model(query)
        with nn.utils.parametrize.cached():
            for _ in range(2):
                assert torch.equal(model(query), plain)
                for x, y, prediction in zip(
                    BATCH.support_x, BATCH.support_y, expected, strict=True
                ):
                    own = learner.adapt(x, y)
                    for called in (own, own, copy.deepcopy(own)):
                        torch.testing.assert_close(
                            called(query), prediction, rtol=1e-10, atol=1e-12
                        )
                    del own, called  # another may get its id
    weight = learner.adapt(BATCH.support_x[0], BATCH.support_y[0])[0].weight
    torch.testing.assert_close(weight, exact[0]["0.parametrizations.weight.original"].sinh())
