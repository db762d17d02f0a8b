"""Any first-party plugins together, and in which order: invariant 12. What holds of each of them
alone: tests/test_conformance.py."""

import copy
import itertools
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import plugins
from torch import nn

from metaplug import InnerStep, MetaLearner, RequestError, TaskBatch
from metaplug.contract.chain import Chain
from metaplug.testing import Stream, adapted, assert_close, found, problem
from metaplug.testing.strategies import chains, problems

PAIRS = list(itertools.combinations(plugins.NAMES, 2))
CONFLICTING = {
    ("cavia", "partial-adaptation"),
    ("cavia", "l2f"),
    ("cavia", "reptile"),
    ("derivative-order", "metal"),
    ("lora", "partial-adaptation"),
    ("multi-step-loss", "reptile"),
    ("derivative-order", "imaml"),
    ("imaml", "multi-step-loss"),
    ("imaml", "reptile"),
    ("imaml", "sharp-maml"),
    ("imaml", "warp-grad"),
    ("reptile", "sharp-maml"),
    ("sharp-maml", "warp-grad"),
    ("derivative-order", "warp-grad"),
    ("multi-step-loss", "warp-grad"),
    ("reptile", "warp-grad"),
    ("imaml", "metal"),
    ("alfa", "warp-grad"),
}


def select_adapted():
    """A plugin under which none of the model's own parameters adapt."""
    return ()


def finite(tensors):
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def test_only_these_pairs_refuse_each_other():
    assert {pair for pair in PAIRS if not plugins.compatible(pair)} == CONFLICTING


@given(chains(), st.booleans())
def test_any_chain_trains_evaluates_and_goes_on_from_its_state(chain, vectorized):
    uses, case = chain
    model, batching = case.name, "vectorized" if vectorized else "sequential"
    learners = [case.learner(plugins=uses, task_batching=batching) for _ in range(2)]
    learners[0].fit(Stream(model), iterations=1, total=2, tasks_per_batch=2)
    learners[1].load_state_dict(copy.deepcopy(learners[0].state_dict()))
    results = []
    for learner in learners:
        learner.fit(Stream(model), iterations=1, total=2, tasks_per_batch=2)
        results.append(
            (
                learner.meta_gradients(case.batch),
                learner.evaluate(Stream(model, split="test"), num_tasks=2).per_task,
            )
        )
    assert finite(results[0][0])
    assert all(torch.equal(results[0][0][name], results[1][0][name]) for name in results[0][0])
    assert torch.equal(results[0][1], results[1][1])


# More inner steps than trained.


@pytest.mark.parametrize("name", plugins.NAMES)
def test_more_inner_steps_than_trained_repeat_the_last_slot(name):
    """A plugin trained for 2 steps acts in every later step as in its second: compared with values
    that are repeated by hand."""
    case, stream = problem("conv4", steps=2), Stream("conv4", split="test")
    learner = case.learner(plugins=[plugins.make(name)])
    learner.fit(Stream("conv4"), iterations=2, tasks_per_batch=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = learner.evaluate(stream, num_tasks=3, inner_steps=6)
    longer = MetaLearner(
        learner.model, plugins=[plugins.make(name)], inner_lr=case.lr, inner_steps=6
    )
    state = learner.chain.plugins[0].state_dict()
    own = longer.chain.plugins[0].state_dict()
    repeated = {key: _repeated(value, own[key]) for key, value in state.items()}
    longer.chain.plugins[0].load_state_dict(repeated)
    assert torch.equal(longer.evaluate(stream, num_tasks=3).per_task, result.per_task)
    assert result.inner_steps == 6


def _repeated(value, like):
    if value.shape == like.shape:
        return value
    return torch.cat([value, *[value[-1:]] * (len(like) - len(value))])


def test_more_inner_steps_warn_once():
    learner = problem("conv4").learner(plugins=["gradient-sharing"])
    with pytest.warns(
        UserWarning,
        match=r"^adapting for 3 inner steps, trained with 2: later steps use the last step's "
        r"values$",
    ):
        learner.evaluate(Stream("conv4", split="test"), num_tasks=2, inner_steps=3)
    learner.evaluate(Stream("conv4", split="test"), num_tasks=2, inner_steps=3)


# 12. Order matters where plugins share a fold, and nowhere else.


DISJOINT = [
    pair
    for pair in PAIRS
    if plugins.compatible(pair) and not plugins.hooks(pair[0]) & plugins.hooks(pair[1])
]


@given(st.sampled_from(DISJOINT), problems(("batch-norm", "conv4"), steps=(1, 3), lrs=(0.05, 0.3)))
def test_plugins_with_disjoint_hooks_commute(pair, case):
    results = [
        case.learner(plugins=[plugins.make(name) for name in order]).meta_gradients(case.batch)
        for order in (pair, pair[::-1])
    ]
    # Clipping sums the squares of the meta-gradients in the order of the plugins' parameters.
    assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


class Point(nn.Module):
    """Answers its weight: with targets −g and no inputs, the gradient of half the squared distance
    at 0 is g."""

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
        Point(),
        plugins=chain,
        inner_lr=1.0,
        inner_steps=1,
        kind="regression",
        loss=lambda p, y: (p - y).square().sum(1).mean() / 2,
    )
    if matrix is not None:
        learner.engine.meta_parameters["meta-curvature.matrices.weight/out"].data = torch.tensor(
            matrix, dtype=torch.float64
        )
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
    """g = (3, 4), bound 1. Curvature first: (4, 6), clipped to (4, 6)/√52. Clipping first: (0.6,
    0.8), then (0.8, 1.2)."""
    assert_close(moved([curvature(), clipping()], [[3.0, 4.0]], SWAP), rows([4.0, 6.0]) / 52**0.5)
    assert_close(moved([clipping(), curvature()], [[3.0, 4.0]], SWAP), rows([0.8, 1.2]))


def test_sharing_and_curvature_by_hand():
    """g = (3, 4) and (0, −10), gate ½, no momentum.

    Sharing first: d = (2.25, 1.75) and (1.5, −5.5), then (1.75, 4.5) and (−5.5, 3). Curvature
    first: (4, 6) and (−10, 0), of lengths √52
    and 10; ū = ((4/√52 − 1)/2, 3/√52); d = (2, 3) + √52 ū/2 = (3 − √52/4, 4.5) and (−5, 0) + 5 ū =
    (−7.5 + 10/√52, 15/√52).
    """
    root = 52**0.5
    assert_close(moved([sharing(), curvature()], TWO, SWAP), rows([1.75, 4.5], [-5.5, 3.0]))
    assert_close(
        moved([curvature(), sharing()], TWO, SWAP),
        rows([3 - root / 4, 4.5], [-7.5 + 10 / root, 15 / root]),
    )


@pytest.mark.parametrize("other", [clipping, sharing, curvature])
def test_noise_before_and_behind_another_plugin_by_hand(other):
    """Behind, the noise n is added to what the other made of g; before, the other works on g +
    n."""
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
    logits = torch.tensor([[[0.0, 0.0]]], dtype=torch.float64) + torch.tensor(
        [1.0, 0.0], dtype=torch.float64
    )
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
            support_targets=torch.tensor([[0]]),
        )
        results[order] = float(
            chain.fold(
                "transform_inner_losses", torch.tensor([2.0], dtype=torch.float64), step=step
            )
        )
    assert results["smoothing", "decay"] == pytest.approx(0.9 * 2 + 0.1 * spread + 10, abs=1e-12)
    assert results["decay", "smoothing"] == pytest.approx(0.9 * (2 + 10) + 0.1 * spread, abs=1e-12)


def test_batch_norm_by_step_and_patterns_select_what_both_leave():
    case = problem("conv4")
    for order in (
        ["per-step-batch-norm", "partial-adaptation"],
        ["partial-adaptation", "per-step-batch-norm"],
    ):
        assert case.learner(plugins=order).engine.inner.adapted == ("13.weight", "13.bias")


# Composition is checked before anything is trained.


REFUSED = {
    "conflict": (
        lambda: [plugins.make("multi-step-loss"), plugins.make("reptile")],
        "plugin 'multi-step-loss' conflicts with 'reptile': leave one of them out",
    ),
    "twice": (
        lambda: [plugins.make("gradient-sharing"), plugins.make("gradient-sharing")],
        "plugin 'gradient-sharing' stands twice in the list: give one of them a name of its own, "
        "or leave it out",
    ),
    "no batch norm": (
        lambda: [plugins.make("per-step-batch-norm")],
        "plugin 'per-step-batch-norm' needs batch norm layers with trainable scales and shifts, "
        "and the model has none: "
        "leave it out, or use a model that has them, such as conv4",
    ),
    "no such parameter": (
        lambda: [plugins.make("partial-adaptation", head=("fc.*",))],
        "plugin 'partial-adaptation': the pattern 'fc.*' matches none of the parameters that may "
        "adapt "
        "(0.weight, 0.bias, 2.weight, 2.bias): correct head",
    ),
    "nothing to choose from": (
        lambda: [select_adapted, plugins.make("partial-adaptation")],
        "plugin 'partial-adaptation' has nothing to choose from, as the plugins before it adapt "
        "none of the model's own parameters: leave it out",
    ),
    "no body": (
        lambda: [plugins.make("partial-adaptation", adapts="body", head=("*",))],
        "plugin 'partial-adaptation' would adapt the body, but all that may adapt is the head: "
        "correct head",
    ),
    "nothing left": (
        lambda: [
            plugins.make("partial-adaptation", adapts="head"),
            plugins.make("partial-adaptation", adapts="body", name="other"),
        ],
        "plugin 'other' would adapt the body, but all that may adapt is the head: correct head",
    ),
    "too large a matrix": (
        lambda: [plugins.make("meta-curvature", largest=5)],
        "plugin 'meta-curvature' would learn a matrix of 6 x 6 numbers for '0.weight', more than "
        "largest = 5 allows: "
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
    assert (
        str(error.value)
        == f"plugin '{name}' learns rates that start at inner_lr, which is 0: give an inner_lr "
        "above 0"
    )


def test_label_smoothing_needs_classes():
    with pytest.raises(RequestError) as error:
        MetaLearner(Point(), plugins=["label-smoothing"], kind="regression")
    assert (
        str(error.value)
        == "plugin 'label-smoothing' smooths class labels, and regression has none: leave it out, "
        "or use classification"
    )


def test_a_name_of_its_own_lets_a_plugin_stand_twice():
    case = problem()
    learner = case.learner(
        plugins=[plugins.make("meta-sgd"), plugins.make("meta-sgd", name="second")]
    )
    assert {name.split(".")[0] for name in learner.chain.named_parameters()} == {
        "meta-sgd",
        "second",
    }
    assert finite(found(learner, case.batch).gradients)
