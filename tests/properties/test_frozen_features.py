"""cache_frozen: what the inner loop cannot change is computed once, and nothing differs by it."""

import copy
import itertools
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from support.plain_loop import loop, off
from torch import nn

from metaplug import MetaLearner, Plugin, RequestError, TaskBatch, hookimpl
from metaplug.execution.traced import CompiledDerivation
from metaplug.testing import found

CLASSES = 3


class Named(nn.Module):
    """Answers with a mapping and a tuple, through modules that stand at two places or run twice."""

    def __init__(self):
        super().__init__()
        self.mix, self.pair, self.head = nn.Linear(4, 4), Pair(), nn.Linear(8, CLASSES)
        self.again = self.mix  # at two places
        self.twice = nn.Linear(4, 4)

    def forward(self, x):
        found = self.pair(torch.tanh(self.mix(x)))
        hidden = self.twice(torch.tanh(self.twice(found["sum"])))
        return self.head(torch.cat([hidden, self.again(found["both"][0])], 1))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        one, other = self.layer(x), self.layer(-x)
        return {"sum": one * other, "both": (one, other)}


class AsObject(nn.Module):
    """Its body answers with an object, as Hugging Face's do."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Objecting(), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.body(x).hidden)


@dataclass
class Hidden:
    hidden: torch.Tensor


class Objecting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return Hidden(torch.tanh(self.layer(x)))


class Adapter(nn.Module):
    """A frozen layer with low-rank factors beside it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def perceptron(*between):
    return nn.Sequential(
        nn.Linear(4, 6), *between, nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, CLASSES)
    )


def frozen(model, *paths):
    for path in paths:
        model.get_submodule(path).requires_grad_(False)
    return model


def adapters():
    first = frozen(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)), "0", "1")
    head = nn.Linear(6, CLASSES).requires_grad_(False)
    return nn.Sequential(first, nn.Tanh(), Adapter(), nn.Tanh(), Adapter(), head)


def hooked():
    model = frozen(perceptron(), "0")
    model[0].register_forward_hook(lambda module, given, output: 1.5 * output)
    return model


def dropping():
    """What draws lies above what is kept, and draws as it did."""
    head = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES))
    return nn.Sequential(nn.Linear(4, 6).requires_grad_(False), nn.Tanh(), head)


HEAD = {"plugins": ["partial-adaptation"]}
CASES = {
    "frozen body": (lambda: frozen(perceptron(), "0", "2"), {}, {"0", "1", "2"}),
    "head adapted": (perceptron, HEAD, {"0", "1", "2"}),
    "anil": (perceptron, {"preset": "anil"}, {"0", "1", "2"}),
    "frozen batch norm": (
        lambda: perceptron(nn.BatchNorm1d(6)),
        {**HEAD, "batch_norm": "frozen"},
        {"0", "1", "2", "3"},
    ),
    "changed by a plugin": (
        lambda: perceptron(nn.BatchNorm1d(6)),
        {"plugins": ["partial-adaptation", "per-step-batch-norm"], "batch_norm": "frozen"},
        {"0"},
    ),
    "adapters": (adapters, {}, {"0", "1", "2.base"}),
    "names, pairs, twice": (
        lambda: frozen(Named(), "mix", "pair", "twice"),
        {},
        {"pair", "twice"},
    ),
    "an object": (lambda: frozen(AsObject(), "body"), {}, {"body.layer"}),
    "a hook": (hooked, {}, {"0", "1"}),
    "dropout above": (dropping, {}, {"0", "1"}),
}
"""A model, settings, and the modules that are kept."""

TAKEN = {
    "plain": {},
    "first order": {"plugins": ["derivative-order"]},
    "sequential": {"task_batching": "sequential"},
    "chunks": {"chunk_size": 2},
}


def made(name):
    torch.manual_seed(0)
    return CASES[name][0]().double()


def tasks(sizes=((4, 3),) * 3):
    generator = torch.Generator().manual_seed(1)
    found = []
    for support, query in sizes:
        parts = []
        for count in (support, query):
            parts.append(torch.randn(1, count, 4, generator=generator, dtype=torch.float64))
            parts.append(torch.randint(0, CLASSES, (1, count), generator=generator))
        found.append(TaskBatch(*parts))
    return TaskBatch.from_tasks(found, ways=[None] * len(found))


BATCHES = {"equal": tasks(), "ragged": tasks(((4, 3), (2, 3), (5, 2), (4, 3)))}


def learner_of(model, *more, **given):
    given = {**given, "plugins": [*given.get("plugins", ()), *more]}
    return MetaLearner(model, **{"inner_lr": 0.3, "inner_steps": 3, **given})


def both(name, **given):
    """The learner without and with kept features."""
    return [
        learner_of(
            made(name),
            *given.get("plugins", ()),
            **CASES[name][1],
            **{key: each for key, each in given.items() if key != "plugins"},
            cache_frozen=kept,
        )
        for kept in (False, True)
    ]


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def pairwise():
    """Every case in every way, on equal or ragged tasks in turn; the other half is slow."""
    for (row, name), (column, taken) in itertools.product(enumerate(CASES), enumerate(TAKEN)):
        for place, sizes in enumerate(BATCHES):
            slow = (row + column + place) % 2
            yield pytest.param(name, taken, sizes, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize(("name", "taken", "sizes"), [*pairwise()])
def test_nothing_differs(name, taken, sizes):
    batch = BATCHES[sizes]
    plain, keeping = both(name, **TAKEN[taken])
    for _ in range(2):  # nothing is kept from batch to batch
        expected, ours = (found(learner, batch) for learner in (plain, keeping))
        assert ours.gradients.keys() == expected.gradients.keys()
        assert off(ours.gradients, expected.gradients) < 1e-12
        assert_same(ours.outer_loss, expected.outer_loss)
        assert_same(ours.losses, expected.losses)
        batch = batch.map(lambda each: each.flip(0) if each.is_floating_point() else each)
    expected, ours = (learner.engine.evaluate(batch, 4) for learner in (plain, keeping))
    assert_same(ours.query_predictions, expected.query_predictions)
    assert_same(ours.support_losses, expected.support_losses)
    assert_same(dict(ours.query_losses), dict(expected.query_losses))
    assert_same(dict(ours.adapted_parameters), dict(expected.adapted_parameters))


@pytest.mark.parametrize("name", ["frozen body", "adapters"])
@pytest.mark.parametrize("order", [1, 2])
def test_meta_gradients_are_those_of_a_plain_loop(name, order):
    model = made(name)
    learner = learner_of(model, preset="maml" if order == 2 else "fomaml", cache_frozen=True)
    exact = loop(model, BATCHES["equal"], order=order, steps=3)
    assert off(learner.meta_gradients(BATCHES["equal"]), exact.gradients) < 1e-10


def test_a_body_that_no_step_adapts_is_meta_learned_through_what_is_kept():
    model = made("anil")
    learner = learner_of(model, preset="anil", cache_frozen=True)
    exact = loop(model, BATCHES["equal"], steps=3, adapted=("3.weight", "3.bias"))
    ours = learner.meta_gradients(BATCHES["equal"])
    assert off(ours, exact.gradients) < 1e-10
    assert ours["0.weight"].any()


AFTER = {
    "anil and imaml": ("anil", ["imaml"]),
    "anil and taml": ("anil", ["taml"]),
    "a frozen body and taml": ("frozen body", ["taml"]),
}
"""A case, and plugins that ask for passes after the inner loop."""


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
def test_passes_after_the_inner_loop_see_no_features_of_another_batch(batching, name):
    case, plugins = AFTER[name]
    plain, ours = both(case, plugins=plugins, task_batching=batching)
    first = BATCHES["equal"]
    other = first.map(lambda each: each.flip(1) + 1 if each.is_floating_point() else each)
    for batch in (first, other, first):
        assert off(ours.meta_gradients(batch), plain.meta_gradients(batch)) < 1e-12
    for learner in (ours, plain):
        learner.fit(Same(), iterations=2, tasks_per_batch=3)
    assert_same(dict(ours.model.state_dict()), dict(plain.model.state_dict()))


class Counted(nn.Linear):
    """Counts its calls, by the form of what it is given."""

    calls = Counter()

    def forward(self, x):
        Counted.calls[x.shape[0]] += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("batching", "name", "calls"),
    [
        # one for each size and part
        ("vectorized", "equal", {4: 1, 3: 1}),
        ("vectorized", "ragged", {4: 1, 2: 2, 5: 1, 3: 1}),
        # one for each task and part
        ("sequential", "equal", {4: 3, 3: 3}),
        ("sequential", "ragged", {4: 2, 3: 3, 2: 2, 5: 1}),
    ],
)
def test_a_kept_module_runs_once_for_a_part_of_a_batch(batching, name, calls):
    torch.manual_seed(0)
    model = nn.Sequential(Counted(4, 6).requires_grad_(False), nn.Linear(6, CLASSES)).double()
    weights = {"plugins": ["multi-step-loss"]}  # asks for the query loss after every step
    learner = learner_of(model, **weights, cache_frozen=True, task_batching=batching)
    batch = learner.prepare_batch(BATCHES[name])
    for run in (
        lambda: learner.engine.meta_gradients(batch, 0, 1),
        lambda: learner.engine.evaluate(batch, 3),
    ):
        Counted.calls.clear()
        run()
        assert Counted.calls == calls


@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_are_the_outermost_modules(name):
    learner = both(name)[1]
    learner.meta_gradients(BATCHES["equal"])
    assert {path for path, _ in learner.engine.inner.features._calls} == CASES[name][2]


class Same:
    def batch(self, iteration, indices):
        rows = [index % 3 for index in indices]
        return TaskBatch.stack([BATCHES["equal"].tasks(slice(row, row + 1)) for row in rows])


@pytest.mark.parametrize("every", [1, 3])
def test_training_is_the_same_step_by_step_and_in_windows(every):
    learners = both("anil", metrics_every=every)
    histories = [
        learner.fit(Same(), iterations=4, tasks_per_batch=3, validation=Same(), validation_tasks=3)
        for learner in learners
    ]
    plain, ours = ([record.step.outer_loss for record in each.records] for each in histories)
    assert ours == pytest.approx(plain, rel=1e-12)
    assert_same(*(dict(each.model.state_dict()) for each in learners[::-1]))
    assert_same(*(each.evaluate(Same(), num_tasks=3).per_task for each in learners))
    x, y = BATCHES["equal"].support_x[0], BATCHES["equal"].support_y[0]
    assert_same(*(each.adapt(x, y)(x) for each in learners))


def test_hooks_that_come_later_are_followed():
    plain, ours = (made("frozen body") for _ in range(2))
    learner = learner_of(ours, cache_frozen=True)
    learner.meta_gradients(BATCHES["equal"])
    for place in (0, 1):
        for model in (plain, ours):
            model[place].register_forward_hook(lambda module, given, output: output + 0.5)
        expected = learner_of(plain).meta_gradients(BATCHES["equal"])
        assert off(learner.meta_gradients(BATCHES["equal"]), expected) < 1e-12


def test_a_trace_computes_them_once():
    learner, plain = (
        learner_of(made("anil"), preset="anil", cache_frozen=kept) for kept in (True, False)
    )
    learner.engine.derivation = CompiledDerivation(learner.engine, lambda graph, inputs: graph)
    for _ in range(2):
        ours, expected = (each.meta_gradients(BATCHES["ragged"]) for each in (learner, plain))
        assert off(ours, expected) < 1e-12
    assert learner.engine.derivation.refusal is None


def test_the_users_model_is_left_as_it_is():
    model = made("a hook")
    before = copy.deepcopy(dict(vars(model[0])))
    learner_of(model, cache_frozen=True).meta_gradients(BATCHES["equal"])
    assert vars(model[0]).keys() == before.keys()


# What is refused.


def refused(model, error=RequestError, **given):
    with pytest.raises(error) as refusal:
        learner_of(model.double(), **{"cache_frozen": True, **given}).meta_gradients(
            BATCHES["equal"]
        )
    return str(refusal.value)


def test_what_draws_is_refused():
    assert refused(perceptron(nn.Dropout(0.5)), **HEAD) == (
        "cache_frozen would keep the output of '1', which draws random numbers, so it is another "
        "one in every step: set its dropout to 0, or leave cache_frozen out"
    )


def test_the_statistics_of_a_batch_are_refused():
    assert refused(perceptron(nn.BatchNorm1d(6)), **HEAD) == (
        "cache_frozen would keep the output of '1', which uses the statistics of a batch, so it is "
        "another one in every step: give batch_norm='frozen', or leave cache_frozen out"
    )


NOTHING_TO_KEEP = (
    "cache_frozen keeps what lies below the first adapted layer, but nothing does: the first "
    "module that runs is adapted; leave it out"
)


def test_where_there_is_nothing_to_keep_it_is_said():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    assert refused(model) == NOTHING_TO_KEEP


def test_recomputed_steps_are_refused():
    with pytest.raises(RequestError) as refusal:
        learner_of(perceptron(), cache_frozen=True, checkpoint_steps=1)
    assert str(refusal.value) == (
        "cache_frozen keeps what checkpoint_steps recomputes: leave one of the two out"
    )


class Shifted(Plugin):
    """Another value of one parameter in every step."""

    name = "shifted"

    def __init__(self, parameter):
        super().__init__()
        self.parameter = parameter

    @hookimpl
    def transform_parameters(self, parameters, step):
        return {**parameters, self.parameter: parameters[self.parameter] + step.index}


class Tied(nn.Module):
    """Its second layer has the first one's weight, and alone is kept by calls."""

    def __init__(self):
        super().__init__()
        self.unused, self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.body.weight = self.unused.weight

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def test_what_a_plugin_changes_by_a_tied_name_is_not_kept():
    given = {"plugins": ["partial-adaptation", Shifted("unused.weight")]}
    assert refused(Tied(), **given) == NOTHING_TO_KEEP


OTHERWISE = (
    "cache_frozen keeps what autograd says that adapted weights do not reach, but with it the "
    "model answers otherwise once they change (it detaches a value of theirs, or goes another way "
    "at evaluation): leave cache_frozen out"
)


class Drawing(nn.Linear):
    """Draws at evaluation alone."""

    def forward(self, x):
        output = super().forward(x)
        return output if self.training else output + torch.randn_like(output)


class Odd(nn.Module):
    """A frozen body, which adapted weights reach in a way that autograd does not show."""

    def __init__(self, way):
        super().__init__()
        self.first, self.body = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.rows, self.head = nn.Embedding(4, 4).requires_grad_(False), nn.Linear(8, CLASSES)
        self.way, self.drawing = way, Drawing(4, 4).requires_grad_(False)

    def forward(self, x):
        hidden = self.first(x)
        if self.way == "detached":
            kept = self.body(hidden.detach())
        elif self.way == "an index":
            kept = self.rows(hidden.argmax(1))
        elif self.way == "a draw at evaluation":
            kept = self.drawing(x)
        elif self.way == "at evaluation":
            kept = self.body(x if self.training else hidden)
        else:
            kept = self.body(x)
            kept += 1
        return self.head(torch.cat([hidden, kept], 1))


WAYS = ["detached", "an index", "at evaluation", "a draw at evaluation", "in place"]


@pytest.mark.parametrize("way", WAYS)
def test_what_autograd_does_not_show_is_refused(way):
    torch.manual_seed(0)
    in_place = (
        "cache_frozen would keep the output of 'body', which the model then changes in place, in "
        "every step once more: make a new tensor there, or leave cache_frozen out"
    )
    learner = learner_of(Odd(way).double(), cache_frozen=True)
    for _ in range(2):  # not on the first batch alone
        with pytest.raises(RequestError) as refusal:
            learner.meta_gradients(BATCHES["equal"])
        assert str(refusal.value) == (in_place if way == "in place" else OTHERWISE)
    learner_of(Odd(way).double()).meta_gradients(BATCHES["equal"])  # without it, all is well
