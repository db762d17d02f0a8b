"""Any first-party plugins together: finite, in order, and gone without a trace when they are taken out. Invariant 12, and evaluation."""

import copy
import itertools
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import plugins
from support.models import Stream, adapted, assert_close, found, problem
from support.strategies import problems
from torch import nn

from metaplug import InnerStep, MetaLearner, RequestError, TaskBatch
from metaplug.chain import Chain

PAIRS = list(itertools.combinations(plugins.NAMES, 2))
CONFLICTING = {("multi-step-loss", "reptile")}


def finite(tensors):
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def test_only_these_pairs_refuse_each_other():
    assert {pair for pair in PAIRS if not plugins.compatible(pair)} == CONFLICTING


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_every_pair_composes_in_both_orders_and_leaves_no_trace(pair):
    case = problem("conv4", tasks=2)
    model = copy.deepcopy(case.model)
    settings = {"inner_lr": case.lr, "inner_steps": case.steps}
    before = MetaLearner(model, **settings).meta_gradients(case.batch)
    for order in (pair, pair[::-1]):
        if not plugins.compatible(order):
            with pytest.raises(RequestError, match=r"^plugin '[a-z-]+' conflicts with '[a-z-]+': leave one of them out$"):
                MetaLearner(model, plugins=[plugins.make(name) for name in order], **settings)
            continue
        learner = MetaLearner(model, plugins=[plugins.make(name) for name in order], **settings)
        gradients = learner.meta_gradients(case.batch)
        assert finite(gradients)
        assert learner.chain.named_parameters().keys() <= gradients.keys(), "every meta-parameter of a plugin learns"
        learner.evaluate(Stream("conv4", split="test"), num_tasks=2)
        after = MetaLearner(model, **settings).meta_gradients(case.batch)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)


@st.composite
def chains(draw):
    """A few first-party plugins that do not refuse each other, in any order; and a model that has what they need."""
    names = draw(st.permutations(plugins.NAMES))[: draw(st.integers(2, 6))]
    names = [name for index, name in enumerate(names) if plugins.compatible([*names[:index], name])]
    models = ("batch-norm", "conv4") if "per-step-batch-norm" in names else ("tanh", "layer-norm", "max-pool", "conv4")
    model = draw(st.sampled_from(models))
    return names, model, draw(problems((model,), tasks=(1, 4), steps=(1, 3), lrs=(0.01, 0.3)))


@given(chains(), st.booleans())
def test_any_chain_trains_evaluates_and_goes_on_from_its_state(chain, vectorized):
    names, model, case = chain
    batching = "vectorized" if vectorized else "sequential"
    learners = [case.learner(plugins=[plugins.make(name) for name in names], task_batching=batching) for _ in range(2)]
    learners[0].fit(Stream(model), iterations=1, tasks_per_batch=2)
    learners[1].load_state_dict(copy.deepcopy(learners[0].state_dict()))
    results = []
    for learner in learners:
        learner.fit(Stream(model), iterations=1, tasks_per_batch=2)
        results.append((learner.meta_gradients(case.batch), learner.evaluate(Stream(model, split="test"), num_tasks=2).per_task))
    assert finite(results[0][0])
    assert all(torch.equal(results[0][0][name], results[1][0][name]) for name in results[0][0])
    assert torch.equal(results[0][1], results[1][1])


# More inner steps than trained.


@pytest.mark.parametrize("name", plugins.NAMES)
@pytest.mark.parametrize("extra", [0, 1, 4])
def test_more_inner_steps_than_trained_repeat_the_last_slot(name, extra):
    """A plugin trained for 2 steps acts in every later step as in its second: compared with values that are repeated by hand."""
    case, stream = problem("conv4", steps=2), Stream("conv4", split="test")
    learner = case.learner(plugins=[plugins.make(name)])
    learner.fit(Stream("conv4"), iterations=2, tasks_per_batch=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = learner.evaluate(stream, num_tasks=3, inner_steps=2 + extra)
    longer = MetaLearner(learner.model, plugins=[plugins.make(name)], inner_lr=case.lr, inner_steps=2 + extra)
    state = learner.chain.plugins[0].state_dict()
    own = longer.chain.plugins[0].state_dict()
    repeated = {key: _repeated(value, own[key]) for key, value in state.items()}
    longer.chain.plugins[0].load_state_dict(repeated)
    assert torch.equal(longer.evaluate(stream, num_tasks=3).per_task, result.per_task)
    assert result.inner_steps == 2 + extra


def _repeated(value, like):
    if value.shape == like.shape:
        return value
    return torch.cat([value, *[value[-1:]] * (len(like) - len(value))])


@pytest.mark.parametrize("name", plugins.NAMES)
def test_more_inner_steps_warn_once(name):
    learner = problem("conv4").learner(plugins=[plugins.make(name)])
    with pytest.warns(UserWarning, match=r"^adapting for 3 inner steps, trained with 2: later steps use the last step's values$"):
        learner.evaluate(Stream("conv4", split="test"), num_tasks=2, inner_steps=3)
    learner.evaluate(Stream("conv4", split="test"), num_tasks=2, inner_steps=3)


# Evaluation changes nothing, and keeps test tasks apart, for every plugin.


@pytest.mark.parametrize("name", plugins.NAMES)
def test_evaluation_changes_no_state_and_a_task_does_not_depend_on_its_batch(name):
    learner = problem("conv4").learner(plugins=[plugins.make(name)])
    learner.fit(Stream("conv4"), iterations=2, tasks_per_batch=2)
    before, random = copy.deepcopy(learner.state_dict()), torch.get_rng_state()
    test = Stream("conv4", split="test")
    together, alone = (learner.evaluate(test, num_tasks=5, tasks_per_batch=size).per_task for size in (5, 1))
    assert torch.equal(together, alone)
    assert torch.equal(torch.get_rng_state(), random)
    after = learner.state_dict()
    for part in ("model", "plugin_states", "optimizer"):
        _assert_same(before[part], after[part])


def _assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _assert_same(one[key], other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            _assert_same(*pair)
    else:
        assert one == other


# 11. One meaning, whatever the batching.


@pytest.mark.parametrize("name", plugins.NAMES)
@given(problems(("batch-norm", "conv4"), steps=(1, 3), lrs=(0.05, 0.3)))
def test_vectorized_equals_sequential(name, case):
    results = [
        case.learner(plugins=[plugins.make(name)], task_batching=batching).meta_gradients(case.batch)
        for batching in ("vectorized", "sequential")
    ]
    if name == "gradient-clipping":  # a bound that is just met, or not, by rounding
        return assert_close(*results, rtol=1e-6, atol=1e-7)
    return assert_close(*results, rtol=1e-8, atol=1e-9)


# 4. The order of tasks means nothing.


@pytest.mark.parametrize("name", [name for name in plugins.NAMES if name != "gradient-noise"])  # whose numbers follow a task's place
@given(problems(("batch-norm", "conv4"), tasks=(2, 4), steps=(1, 2), lrs=(0.05, 0.3)), st.randoms(use_true_random=False))
def test_permuting_the_tasks_leaves_meta_gradients_unchanged(name, case, random):
    order = list(range(case.batch.num_tasks))
    random.shuffle(order)
    permuted = TaskBatch(*(getattr(case.batch, field)[order] for field in ("support_x", "support_y", "query_x", "query_y")))
    learner = case.learner(plugins=[plugins.make(name)])
    expected = {key: weight[order] for key, weight in adapted(learner, case.batch).items()}
    assert_close(adapted(learner, permuted), expected, rtol=1e-7, atol=1e-8)
    assert_close(learner.meta_gradients(permuted), learner.meta_gradients(case.batch), rtol=1e-6, atol=1e-7)


# 12. Order matters where plugins share a fold, and nowhere else.


DISJOINT = [pair for pair in PAIRS if plugins.compatible(pair) and not plugins.hooks(pair[0]) & plugins.hooks(pair[1])]


@given(st.sampled_from(DISJOINT), problems(("batch-norm", "conv4"), steps=(1, 3), lrs=(0.05, 0.3)))
def test_plugins_with_disjoint_hooks_commute(pair, case):
    results = [case.learner(plugins=[plugins.make(name) for name in order]).meta_gradients(case.batch) for order in (pair, pair[::-1])]
    # Clipping sums the squares of the meta-gradients in the order of the plugins' parameters.
    assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_the_pairs_that_share_a_fold_are_these():
    shared = {pair: plugins.hooks(pair[0]) & plugins.hooks(pair[1]) for pair in PAIRS}
    assert {pair: hooks for pair, hooks in shared.items() if hooks} == {
        ("gradient-clipping", "gradient-noise"): {"transform_gradients"},
        ("gradient-clipping", "gradient-sharing"): {"transform_gradients"},
        ("gradient-clipping", "meta-curvature"): {"transform_gradients"},
        ("gradient-noise", "gradient-sharing"): {"transform_gradients"},
        ("gradient-noise", "meta-curvature"): {"transform_gradients"},
        ("gradient-sharing", "meta-curvature"): {"transform_gradients"},
        ("label-smoothing", "weight-decay-to-init"): {"transform_inner_losses"},
        ("meta-sgd", "per-step-learning-rates"): {"transform_learning_rates"},
        ("partial-adaptation", "per-step-batch-norm"): {"select_adapted"},
    }


class Point(nn.Module):
    """Answers its weight: with targets −g and no inputs, the gradient of half the squared distance at 0 is g."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        return self.weight.expand(len(x), -1)


def moved(chain, gradients, matrix=None):
    """By how much each task moves at rate 1 in one step whose gradients are given, (T, 2)."""
    targets = -torch.tensor(gradients, dtype=torch.float64).unsqueeze(1)
    nothing = torch.zeros(len(gradients), 1, 1)
    batch = TaskBatch(nothing, targets, nothing, torch.zeros_like(targets))
    learner = MetaLearner(
        Point(), plugins=chain, inner_lr=1.0, inner_steps=1, kind="regression", loss=lambda p, y: (p - y).square().sum(1).mean() / 2
    )
    if matrix is not None:
        learner.engine.meta_parameters["meta-curvature.matrices.weight/out"].data = torch.tensor(matrix, dtype=torch.float64)
    return -adapted(learner, batch)["weight"]


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


SWAP = [[0.0, 1.0], [2.0, 0.0]]
"""(a, b) → (b, 2a)."""
TWO = [[3.0, 4.0], [0.0, -10.0]]


def curvature():
    return plugins.make("meta-curvature")


def clipping():
    return plugins.make("gradient-clipping", max_norm=1.0, max_meta_norm=None)


def sharing():
    return plugins.make("gradient-sharing", gate=0.5, momentum=0.0)


def test_clipping_and_curvature_by_hand():
    """g = (3, 4), bound 1. Curvature first: (4, 6), clipped to (4, 6)/√52. Clipping first: (0.6, 0.8), then (0.8, 1.2)."""
    assert_close(moved([curvature(), clipping()], [[3.0, 4.0]], SWAP), rows([4.0, 6.0]) / 52**0.5)
    assert_close(moved([clipping(), curvature()], [[3.0, 4.0]], SWAP), rows([0.8, 1.2]))


def test_sharing_and_curvature_by_hand():
    """g = (3, 4) and (0, −10), gate ½, no momentum.

    Sharing first: d = (2.25, 1.75) and (1.5, −5.5), then (1.75, 4.5) and (−5.5, 3). Curvature first: (4, 6) and (−10, 0), of lengths √52
    and 10; ū = ((4/√52 − 1)/2, 3/√52); d = (2, 3) + √52 ū/2 = (3 − √52/4, 4.5) and (−5, 0) + 5 ū = (−7.5 + 10/√52, 15/√52).
    """
    root = 52**0.5
    assert_close(moved([sharing(), curvature()], TWO, SWAP), rows([1.75, 4.5], [-5.5, 3.0]))
    assert_close(moved([curvature(), sharing()], TWO, SWAP), rows([3 - root / 4, 4.5], [-7.5 + 10 / root, 15 / root]))


@pytest.mark.parametrize("other", [clipping, sharing, curvature])
def test_noise_before_and_behind_another_plugin_by_hand(other):
    """Behind, the noise n is added to what the other made of g; before, the other works on g + n."""
    matrix = SWAP if other is curvature else None
    noise = moved([plugins.make("gradient-noise", scale=1.0)], TWO) - rows(*TWO)
    assert float(noise.abs().min()) > 0
    behind = moved([other(), plugins.make("gradient-noise", scale=1.0)], TWO, matrix)
    before = moved([plugins.make("gradient-noise", scale=1.0), other()], TWO, matrix)
    assert_close(behind, moved([other()], TWO, matrix) + noise)
    assert_close(before, moved([other()], (rows(*TWO) + noise).tolist(), matrix))
    assert not torch.allclose(behind, before)


def test_smoothing_and_decay_by_hand():
    """ℓ = 2, spread 3 = −mean log p, ε = 0.1; the pull is 4/2 · ‖(1, 2)‖² = 10.

    Smoothing first: 0.9·2 + 0.1·3 + 10 = 12.1. Decay first: 0.9·(2 + 10) + 0.1·3 = 11.1.
    """
    logits = torch.tensor([[[0.0, 0.0]]], dtype=torch.float64) + torch.tensor([1.0, 0.0], dtype=torch.float64)
    spread = -float(logits.log_softmax(2).mean())
    makers = {
        "smoothing": lambda: plugins.make("label-smoothing", smoothing=0.1),
        "decay": lambda: plugins.make("weight-decay-to-init", strength=4.0),
    }
    results = {}
    for order in (("smoothing", "decay"), ("decay", "smoothing")):
        chain = Chain([makers[name]() for name in order])
        for plugin in chain.plugins:
            if plugin.name == "weight-decay-to-init":
                plugin._adapted = ("w",)
        step = InnerStep(
            *(0, 1, 1, 0, 0, True),
            parameters={"w": rows([2.0, 3.0])},
            initial_parameters={"w": rows([1.0, 1.0])},
            support_predictions=logits,
        )
        results[order] = float(chain.fold("transform_inner_losses", torch.tensor([2.0], dtype=torch.float64), step=step))
    assert results["smoothing", "decay"] == pytest.approx(0.9 * 2 + 0.1 * spread + 10, abs=1e-12)
    assert results["decay", "smoothing"] == pytest.approx(0.9 * (2 + 10) + 0.1 * spread, abs=1e-12)


def test_batch_norm_by_step_and_patterns_select_what_both_leave():
    case = problem("conv4")
    for order in (["per-step-batch-norm", "partial-adaptation"], ["partial-adaptation", "per-step-batch-norm"]):
        assert case.learner(plugins=order).engine.inner.adapted == ("13.weight", "13.bias")


# Composition is checked before anything is trained.


REFUSED = {
    "conflict": (
        lambda: [plugins.make("multi-step-loss"), plugins.make("reptile")],
        "plugin 'multi-step-loss' conflicts with 'reptile': leave one of them out",
    ),
    "twice": (
        lambda: [plugins.make("gradient-sharing"), plugins.make("gradient-sharing")],
        "plugin 'gradient-sharing' stands twice in the list: give one of them a name of its own, or leave it out",
    ),
    "no batch norm": (
        lambda: [plugins.make("per-step-batch-norm")],
        "plugin 'per-step-batch-norm' needs batch norm layers with trainable scales and shifts, and the model has none: "
        "leave it out, or use a model that has them, such as conv4",
    ),
    "no such parameter": (
        lambda: [plugins.make("partial-adaptation", head=("fc.*",))],
        "plugin 'partial-adaptation': the pattern 'fc.*' matches none of the parameters that may adapt "
        "(0.weight, 0.bias, 2.weight, 2.bias): correct head",
    ),
    "no body": (
        lambda: [plugins.make("partial-adaptation", adapts="body", head=("*",))],
        "plugin 'partial-adaptation' would adapt the body, but all that may adapt is the head: correct head",
    ),
    "nothing left": (
        lambda: [plugins.make("partial-adaptation", adapts="head"), plugins.make("partial-adaptation", adapts="body", name="other")],
        "plugin 'other' would adapt the body, but all that may adapt is the head: correct head",
    ),
    "too large a matrix": (
        lambda: [plugins.make("meta-curvature", largest=5)],
        "plugin 'meta-curvature' would learn a matrix of 6 x 6 numbers for '0.weight', more than largest = 5 allows: "
        "raise it, or adapt less with partial-adaptation",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_composed_is_refused_with_the_mend(fault):
    make, text = REFUSED[fault]
    with pytest.raises(RequestError) as error:
        problem().learner(plugins=make())
    assert str(error.value) == text


@pytest.mark.parametrize("name", ["meta-sgd", "per-step-learning-rates"])
def test_learned_rates_need_a_rate_to_start_from(name):
    with pytest.raises(RequestError) as error:
        problem(lr=0.0).learner(plugins=[name])
    assert str(error.value) == f"plugin '{name}' learns rates that start at inner_lr, which is 0: give an inner_lr above 0"


def test_label_smoothing_needs_classes():
    with pytest.raises(RequestError) as error:
        MetaLearner(Point(), plugins=["label-smoothing"], kind="regression")
    assert str(error.value) == "plugin 'label-smoothing' smooths class labels, and regression has none: leave it out, or use classification"


def test_a_name_of_its_own_lets_a_plugin_stand_twice():
    case = problem()
    learner = case.learner(plugins=[plugins.make("meta-sgd"), plugins.make("meta-sgd", name="second")])
    assert {name.split(".")[0] for name in learner.chain.named_parameters()} == {"meta-sgd", "second"}
    assert finite(found(learner, case.batch).gradients)
