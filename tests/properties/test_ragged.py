"""Tasks of unequal size in one batch: each gets what it gets alone, against plain loops."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import plugins
from support.plain_loop import OPTIMIZERS, RULES, loop, off
from support.ranks import on_ranks
from torch import nn
from torch.nn import functional as F

from metaplug import MetaLearner, Plugin, RequestError, RunError, TaskBatch, hookimpl
from metaplug.contract import registry
from metaplug.execution.ranks import ALONE
from metaplug.execution.traced import CompiledDerivation
from metaplug.testing import found, reference
from metaplug.testing.strategies import seeds

OUTPUTS = 4
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Words(nn.Module):
    """Attention over tokens, of which those that pad an example count for nothing."""

    def __init__(self):
        super().__init__()
        self.rows, self.head = nn.Embedding(7, 8, padding_idx=0), nn.Linear(8, OUTPUTS)
        # Without biases: a key's has no gradient but rounding, which Adam scales to a step.
        self.attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens, mask):
        rows, padding = self.rows(tokens), mask == 0
        mixed, _ = self.attention(rows, rows, rows, key_padding_mask=padding, need_weights=False)
        kept = torch.where(mask.bool().unsqueeze(-1), self.norm(rows + mixed), 0.0)
        return self.head(kept.sum(1) / mask.sum(1, keepdim=True))


def perceptron(*norm):
    return nn.Sequential(nn.Linear(3, 6), *norm, nn.Tanh(), nn.Linear(6, OUTPUTS))


def convolutions():
    # Without biases, as a key of attention: batch norm takes them out again.
    layers = [
        nn.Conv2d(1, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
    layers += [
        nn.Conv2d(3, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers, nn.Linear(12, OUTPUTS))


MODELS = {
    "mlp": perceptron,
    "batch norm": convolutions,
    "layer norm": lambda: perceptron(nn.LayerNorm(6)),
    "attention": Words,
}
LAST = {"mlp": "2", "batch norm": "8", "layer norm": "3", "attention": "head"}
"""The name of the last layer."""


def model_of(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name]().double()


def inputs(name, count, generator):
    if name != "attention":
        shape = (1, 4, 4) if name == "batch norm" else (3,)
        return torch.randn(1, count, *shape, generator=generator, dtype=torch.float64)
    lengths = torch.randint(2, 6, (1, count, 1), generator=generator)
    mask = (torch.arange(5) < lengths).long()
    return {"tokens": mask * torch.randint(1, 7, (1, count, 5), generator=generator), "mask": mask}


def drawn(name, sizes, seed=0):
    """One task of each size (support, query, ways), each with a label of its last class."""
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for support, query, ways in sizes:
        parts = []
        for count in (support, query):
            y = torch.randint(0, ways, (1, count), generator=generator)
            y[0, 0] = ways - 1
            parts += [inputs(name, count, generator), y]
        tasks.append(TaskBatch(*parts))
    return tasks


SIZES = ((4, 3, 2), (2, 5, 3), (4, 3, 2), (3, 3, 4))
sizes_of_tasks = st.lists(
    st.tuples(st.integers(2, 5), st.integers(2, 4), st.integers(2, OUTPUTS)), min_size=1, max_size=4
)


def learner_of(model, **given):
    return MetaLearner(model, **{"inner_lr": 0.3, "inner_steps": 2, **given})


def mean_of(all_gradients):
    """The mean of the meta-gradients of some tasks; a task that has none of a name counts as 0."""
    names = {name: None for each in all_gradients for name in each}
    return {
        name: sum(each[name] for each in all_gradients if name in each) / len(all_gradients)
        for name in names
    }


def assert_alone(outcome, expected, sizes):
    """Each task's row of an outcome is what a plain loop finds for it alone."""
    for row, (task, (_, query, _)) in enumerate(zip(expected.tasks, sizes, strict=True)):
        for name, weight in task.weights.items():
            ours = outcome.adapted_parameters[name][row]
            torch.testing.assert_close(ours, weight, **EXACT, check_dtype=False)
        ours = [losses[row] for losses in outcome.support_losses]
        ours.append(outcome.query_losses[len(ours)][row])
        torch.testing.assert_close(torch.stack(ours), torch.stack(task.losses), **EXACT)
        predictions = outcome.query_predictions[row]
        torch.testing.assert_close(predictions[:query], task.prediction, **EXACT)
        assert not predictions[query:].any()


@pytest.mark.parametrize("name", MODELS)
@given(
    sizes=sizes_of_tasks,
    seed=seeds,
    optimizer=st.sampled_from(list(RULES)),
    settings=st.builds(
        lambda preset, batching, saving: {"preset": preset, "task_batching": batching, **saving},
        st.sampled_from(["maml", "fomaml"]),
        st.sampled_from(["auto", "vectorized", "sequential"]),
        st.sampled_from([{}, {"chunk_size": 1}, {"chunk_size": 2}, {"checkpoint_steps": 1}]),
    ),
)
def test_each_task_gets_what_it_gets_alone(name, sizes, seed, optimizer, settings):
    tasks, model = drawn(name, sizes, seed), model_of(name, seed)
    lr = 0.05 if optimizer == "adam" else 0.3  # Adam's steps are as long as its rate
    given = {"order": 2 if settings["preset"] == "maml" else 1, "rule": RULES[optimizer]}
    exact = loop(model, tasks, lr=lr, ways=[ways for _, _, ways in sizes], **given)
    learner = learner_of(model, **{**settings, **OPTIMIZERS[optimizer], "inner_lr": lr})
    batch = TaskBatch.from_tasks(tasks)
    taken = found(learner, batch)
    assert off(taken.gradients, exact.gradients) < 1e-10
    torch.testing.assert_close(taken.outer_loss, exact.outer, **EXACT)
    if taken.outcome is not None:
        assert_alone(detached(taken.outcome), detached(exact), sizes)
    assert_alone(learner.engine.evaluate(learner.prepare_batch(batch), 2), detached(exact), sizes)
    most = max(ways for _, _, ways in sizes)
    for part in ("weight", "bias"):  # of classes that no task has
        assert not taken.gradients[f"{LAST[name]}.{part}"][most:].any()


def detached(of):
    if isinstance(of, SimpleNamespace):
        tasks = [
            SimpleNamespace(
                weights={name: each.detach() for name, each in task.weights.items()},
                losses=[each.detach() for each in task.losses],
                prediction=task.prediction.detach(),
            )
            for task in of.tasks
        ]
        return SimpleNamespace(tasks=tasks)
    return dataclasses.replace(
        of,
        adapted_parameters={name: each.detach() for name, each in of.adapted_parameters.items()},
        support_losses=[each.detach() for each in of.support_losses],
        query_losses={after: each.detach() for after, each in of.query_losses.items()},
    )


# Targets of other forms.

FORMS = {
    "regression": ((2,), None, {"kind": "regression"}, F.mse_loss),
    "several labels": (
        (2,),
        None,
        {"loss": F.binary_cross_entropy_with_logits},
        F.binary_cross_entropy_with_logits,
    ),
    "a class for each pixel": ((3, 2, 2), (2, 2), {}, F.cross_entropy),
    "a class for each token": (
        (5, 3),
        (5,),
        {},
        lambda prediction, target: F.cross_entropy(prediction.transpose(1, 2), target),
    ),
}
"""The form of an answer, that of class indices, the learner's settings and the loss."""


@pytest.mark.parametrize("name", FORMS)
def test_targets_of_other_forms(name):
    answer, indices, given, loss = FORMS[name]
    generator = torch.Generator().manual_seed(0)

    def target(count):
        if indices is not None:
            return torch.randint(0, 2, (1, count, *indices), generator=generator)
        return torch.rand(1, count, *answer, generator=generator, dtype=torch.float64).round()

    torch.manual_seed(0)
    last = nn.Linear(6, torch.Size(answer).numel())
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), last, nn.Unflatten(1, answer)).double()
    tasks = [
        TaskBatch(*(part for n in size for part in (inputs("mlp", n, generator), target(n))))
        for size in ((4, 3), (2, 5), (4, 3))
    ]
    learner, exact = learner_of(model, **given), loop(model, tasks, loss=loss)
    assert off(learner.meta_gradients(TaskBatch.from_tasks(tasks)), exact.gradients) < 1e-10
    if indices is None:
        return
    ways = [2, 3, 2]  # the last one's loss and the first one's leave a class out
    axis = len(answer) if name.endswith("token") else 1
    alone = [
        loop(model, [task], loss=lambda p, y, own=own: loss(p.narrow(axis, 0, own), y)).gradients
        for task, own in zip(tasks, ways, strict=True)
    ]
    ours = learner.meta_gradients(TaskBatch.from_tasks(tasks, ways=ways))
    assert off(ours, mean_of(alone)) < 1e-10


# Every plugin and preset.

COUPLED = plugins.COUPLING
APART = [name for name in plugins.NAMES if name not in (*COUPLED, *plugins.DRAWING)]


def with_plugin(name, **given):
    """A learner with a first-party plugin, and the name of its model, which has what it needs."""
    own = {"max_norm": 0.1} if name == "gradient-clipping" else {}
    kind = "batch norm" if name == "per-step-batch-norm" else "mlp"
    plugin = plugins.make(name, **own)
    return learner_of(model_of(kind), plugins=[plugin], **given), kind


def assert_means(learner, tasks):
    """Meta-gradients of tasks together are the means of those of each alone."""
    alone = [learner.meta_gradients(TaskBatch.from_tasks([task])) for task in tasks]
    together = learner.meta_gradients(TaskBatch.from_tasks(tasks))
    assert off(together, mean_of(alone)) < 1e-10


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
@pytest.mark.parametrize("name", APART)
def test_with_a_plugin_that_takes_tasks_apart(name, batching):
    learner, kind = with_plugin(name, task_batching=batching)
    assert_means(learner, drawn(kind, SIZES))


@pytest.mark.parametrize("preset", registry.names("preset"))
def test_with_a_preset(preset):
    kind = "batch norm" if preset.startswith("maml++") else "mlp"
    learner = learner_of(model_of(kind), preset=preset)
    assert learner.settings.inner_steps == 2
    assert_means(learner, drawn(kind, SIZES))


@pytest.mark.parametrize("name", [*COUPLED, *plugins.DRAWING])
def test_with_a_plugin_that_couples_tasks_or_draws(name):
    batch = TaskBatch.from_tasks(drawn("mlp", SIZES))
    ours, theirs = (
        with_plugin(name, task_batching=batching)[0] for batching in ("vectorized", "sequential")
    )
    assert off(ours.meta_gradients(batch), theirs.meta_gradients(batch)) < 1e-10


def narrowed(prediction, target):
    """Cross-entropy of a task that knows its ways, for loops that do not."""
    return F.cross_entropy(prediction[:, : target.ways], target)


def as_listed(tasks, sizes):
    """Tasks of other sizes, for loops that go from one to the next."""
    listed = {name: [getattr(each, name)[0] for each in tasks] for name in FIELDS}
    for name in ("support_y", "query_y"):
        for y, (_, _, ways) in zip(listed[name], sizes, strict=True):
            y.ways = ways
    return SimpleNamespace(num_tasks=len(tasks), **listed)


FIELDS = ("support_x", "support_y", "query_x", "query_y")


def test_shared_gradients_are_those_of_a_plain_loop():
    tasks, model = drawn("mlp", SIZES), model_of("mlp")
    learner = learner_of(model, plugins=["gradient-sharing"])
    gate, momentum = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    exact = reference.gradient_sharing(
        model,
        as_listed(tasks, SIZES),
        steps=2,
        lr=0.3,
        gate=gate,
        momentum=momentum,
        loss=narrowed,
    )
    ours = found(learner, TaskBatch.from_tasks(tasks))
    of_gate = ours.gradients["gradient-sharing.gate"].flatten()
    assert off({**ours.gradients, "gradient-sharing.gate": of_gate}, exact.gradients) < 1e-10
    for name, weights in ours.outcome.adapted_parameters.items():
        expected = torch.stack([each[name] for each in exact.adapted])
        torch.testing.assert_close(weights.detach(), expected, **EXACT)


def test_the_order_of_tasks_that_share_gradients_does_not_matter():
    tasks, order = drawn("mlp", SIZES), [2, 0, 3, 1]
    learner = learner_of(model_of("mlp"), plugins=["gradient-sharing"])
    plain = found(learner, TaskBatch.from_tasks(tasks))
    moved = found(learner, TaskBatch.from_tasks([tasks[place] for place in order]))
    assert off(moved.gradients, plain.gradients) < 1e-10
    for name, weights in moved.outcome.adapted_parameters.items():
        expected = plain.outcome.adapted_parameters[name][order]
        torch.testing.assert_close(weights, expected, **EXACT)


@pytest.mark.parametrize("ways", [None, OUTPUTS])
@pytest.mark.parametrize("listed", [[], ["gradient-sharing"]])
def test_tasks_of_one_size_are_the_plain_batch(listed, ways):
    tasks = drawn("batch norm", [(4, 3, OUTPUTS)] * 3)
    learner = learner_of(model_of("batch norm"), plugins=listed)
    joined = TaskBatch.from_tasks(tasks, ways=[ways] * 3)
    assert (joined.sizes is None) == (ways is None)
    ours, plain = (learner.meta_gradients(each) for each in (joined, TaskBatch.stack(tasks)))
    assert all(torch.equal(ours[name], each) for name, each in plain.items())


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_smoothed_labels_are_spread_over_a_tasks_own_classes(chunk_size):
    tasks, model = drawn("mlp", SIZES), model_of("mlp")

    def smoothed(loss, weights, initial, prediction, target):
        spread = -prediction[:, : target.ways].log_softmax(1).mean()
        return 0.7 * loss + 0.3 * spread

    exact = reference.loop(
        model,
        as_listed(tasks, SIZES),
        steps=2,
        rate=lambda k, name: 0.3,
        loss=narrowed,
        inner=smoothed,
    )
    plugin = plugins.make("label-smoothing", smoothing=0.3)
    learner = learner_of(model, plugins=[plugin], chunk_size=chunk_size)
    assert off(learner.meta_gradients(TaskBatch.from_tasks(tasks)), exact.gradients) < 1e-10


def with_targets_by_output(tasks):
    """The same tasks, with a target of 0 or 1 for each output of the model."""
    return [
        dataclasses.replace(
            each,
            support_y=F.one_hot(each.support_y, OUTPUTS).double(),
            query_y=F.one_hot(each.query_y, OUTPUTS).double(),
        )
        for each in tasks
    ]


@pytest.mark.parametrize("of", [F.cross_entropy, F.binary_cross_entropy_with_logits])
def test_outputs_beyond_the_ways_count_nowhere_where_each_has_its_target(of):
    tasks, model = with_targets_by_output(drawn("mlp", SIZES)), model_of("mlp")
    ways = [ways for *_, ways in SIZES]
    alone = [
        loop(model, task, lr=0.3, loss=lambda p, y, own=own: of(p[:, :own], y[:, :own]))
        for task, own in zip(tasks, ways, strict=True)
    ]
    learner, batch = learner_of(model, loss=of), TaskBatch.from_tasks(tasks, ways=ways)
    exact = mean_of([each.gradients for each in alone])
    assert off(learner.meta_gradients(batch), exact) < 1e-10
    hits = [
        ((each.tasks[0].prediction > 0) == (task.query_y[0] > 0.5))[:, :own].double().mean()
        for each, task, own in zip(alone, tasks, ways, strict=True)
    ]
    assert learner.evaluate([batch]).mean == pytest.approx(float(sum(hits)) / len(hits))


def test_targets_of_outputs_beyond_the_ways_are_refused():
    tasks = with_targets_by_output(drawn("mlp", SIZES))
    refused = (
        "^labels out of range: support_y of task 1 has targets beyond its 2 ways that are not 0: "
        "correct its targets or its ways$"
    )
    with pytest.raises(RequestError, match=refused):
        TaskBatch.from_tasks(tasks, ways=[2, 2, 2, None])


def test_a_plugin_that_loses_the_sizes_of_tasks_is_refused():
    class Forgetful(Plugin):
        @hookimpl
        def transform_tasks(self, batch):
            return TaskBatch(batch.support_x, batch.support_y, batch.query_x, batch.query_y)

    batch = TaskBatch.from_tasks(drawn("mlp", SIZES))
    with pytest.raises(RunError) as error:
        learner_of(model_of("mlp"), plugins=[Forgetful()]).meta_gradients(batch)
    assert plugins.placeless(error.value) == (
        "plugin 'forgetful' in transform_tasks (link 1 of 1, iteration 1) returned a batch without "
        "the sizes of its tasks, so padding would count: make it by dataclasses.replace(batch, "
        "...), or give TaskBatch(..., sizes=...)"
    )


def test_a_plugin_may_change_the_examples_of_tasks_of_other_sizes():
    class Doubling(Plugin):
        @hookimpl
        def transform_tasks(self, batch):
            return dataclasses.replace(batch, support_x=2 * batch.support_x)

    tasks, model = drawn("mlp", SIZES), model_of("mlp")
    doubled = [dataclasses.replace(task, support_x=2 * task.support_x) for task in tasks]
    ours = learner_of(model, plugins=[Doubling()]).meta_gradients(TaskBatch.from_tasks(tasks))
    exact = loop(model, doubled, ways=[ways for _, _, ways in SIZES])
    assert off(ours, exact.gradients) < 1e-10


# Other ways to compute a step.


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_ranks_find_the_meta_gradients_of_all():
    tasks = drawn("batch norm", (*SIZES, (5, 2, 3)))

    def taken(world):
        batch = TaskBatch.from_tasks(tasks[world.rank :: world.size])
        return [
            learner_of(model_of("batch norm"), plugins=listed, world=world).meta_gradients(batch)
            for listed in ([], ["gradient-sharing"])
        ]

    alone = taken(ALONE)
    for ours in on_ranks(taken):
        assert all(off(*pair) < 1e-10 for pair in zip(ours, alone, strict=True))


def test_a_trace_has_the_sizes_that_it_was_made_for():
    learner, plain = (learner_of(model_of("mlp"), inner_steps=1) for _ in range(2))
    learner.engine.derivation = CompiledDerivation(learner.engine, lambda graph, inputs: graph)
    tasks = drawn("mlp", SIZES[:2])
    for listed in (tasks, tasks[::-1]):  # other tasks, of sizes that pad to one shape
        for _ in range(2):
            batch = TaskBatch.from_tasks(listed)
            assert off(learner.meta_gradients(batch), plain.meta_gradients(batch)) < 1e-12
    assert learner.engine.derivation.refusal is None


@pytest.mark.slow
def test_compiled_steps_of_tasks_of_other_sizes():
    learner, plain = (
        learner_of(model_of("mlp"), inner_steps=1, compile=compiled) for compiled in (True, False)
    )
    batch = TaskBatch.from_tasks(drawn("mlp", SIZES[:2]))
    for _ in range(2):
        assert off(learner.meta_gradients(batch), plain.meta_gradients(batch)) < 1e-10
    assert learner.engine.derivation.refusal is None
