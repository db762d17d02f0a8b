"""Values that were once wrong without a word, each with the right one beside it."""

import copy
import logging
import math
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from support import plugins as first_party
from torch import nn
from torch.nn import functional as F

from metaplug import MetaLearner, Plugin, RequestError, RunError, TaskBatch, hookimpl
from metaplug.core.rematerialize import rematerialize
from metaplug.execution.traced import CompiledDerivation
from metaplug.testing import Stream, problem, reference

BATCHINGS = ("auto", "vectorized", "sequential")
CASE = problem()


def double(make, *arguments):
    torch.manual_seed(0)
    return make(*arguments).double()


def off(ours, exact):
    """The relative error of meta-gradients as one vector; one that is missing counts as zero."""
    wrong = sum((ours.get(name, 0 * one) - one).square().sum() for name, one in exact.items())
    return float((wrong / sum(one.square().sum() for one in exact.values())).sqrt())


def learner_of(model, **settings):
    return MetaLearner(model, **{"inner_lr": 0.3, "inner_steps": 2, **settings})


def state(model):
    return {name: each.clone() for name, each in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


class Same:
    """The same tasks in every iteration: task i is the `i`-th of a batch, or the first of all."""

    def __init__(self, batch, *, first=False):
        self.tasks, self.first = batch, first

    def batch(self, iteration, indices):
        rows = [0 if self.first else index % self.tasks.num_tasks for index in indices]
        fields = ("support_x", "support_y", "query_x", "query_y")
        return TaskBatch(*(getattr(self.tasks, name)[rows] for name in fields))


# a. Operations whose derivative vmap gets wrong.


class Padded(nn.Module):
    def __init__(self, padding=0):
        super().__init__()
        self.rows = nn.Embedding(11, 6, padding_idx=padding)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.rows(x))).mean(1))


def tokens(padding, *, regression=False):
    """Three tasks of rows of six tokens, of which the last are padding."""
    generator = torch.Generator().manual_seed(1)
    parts = []
    for count in (5, 7):
        x = torch.randint(0, 11, (3, count, 6), generator=generator)
        x[:, :, 4:] = padding % 11
        y = torch.randint(0, 3, (3, count), generator=generator)
        shape = (3, count, 3)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        parts += [x, drawn if regression else y]
    return TaskBatch(*parts)


@pytest.mark.parametrize(("preset", "order"), [("maml", 2), ("fomaml", 1)])
@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("padding", [0, -1])
def test_padded_embeddings_are_exact(padding, batching, preset, order):
    model, batch = double(Padded, padding), tokens(padding)
    exact = reference.maml(model, batch, steps=2, lr=0.3, order=order).gradients
    learner = learner_of(model, preset=preset, task_batching=batching)
    assert off(learner.meta_gradients(batch), exact) < 1e-10
    assert learner.batching.batching == ("sequential" if batching == "sequential" else "vectorized")
    assert not learner.meta_gradients(batch)["rows.weight"][padding].any()


@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_task_is_the_same_at_every_place_of_a_batch(batching):
    batch = tokens(0, regression=True)
    learner = learner_of(double(Padded), kind="regression", task_batching=batching)
    for size in (1, 3, 4):
        found = learner.evaluate(Same(batch, first=True), num_tasks=4, tasks_per_batch=size)
        assert float((found.per_task - found.per_task[0]).abs().max()) < 1e-12


class Bypassing(Padded):
    """Calls torch's embedding past the function for which there is a rule."""

    def forward(self, x):
        rows = torch.embedding(self.rows.weight, x, self.rows.padding_idx)
        return self.head(torch.tanh(self.norm(rows)).mean(1))


@pytest.mark.parametrize(("preset", "order"), [("maml", 2), ("fomaml", 1)])
def test_an_operation_that_vmap_differentiates_wrongly_runs_one_task_at_a_time(preset, order):
    model, batch = double(Bypassing), tokens(0)
    exact = reference.maml(model, batch, steps=2, lr=0.3, order=order).gradients
    learner = learner_of(model, preset=preset)
    assert off(learner.meta_gradients(batch), exact) < 1e-10
    assert learner.batching.batching == "sequential"
    assert learner.batching.reason.startswith(
        "torch.vmap gets the model wrong: its first derivative differs by "
    )
    assert learner.batching.reason.endswith(" % (rows.weight)")
    with pytest.raises(RequestError, match=r"^task batching 'vectorized' cannot be had, as torch"):
        learner_of(model, task_batching="vectorized").meta_gradients(batch)


# b. Forward passes that write to the user's weights.


class MaxNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows, self.head = nn.Embedding(11, 6, max_norm=0.5), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.rows(x).mean(1))


class Kept(nn.Module):
    """Keeps a running mean as a frozen parameter; `when` says in which passes it is written."""

    def __init__(self, when):
        super().__init__()
        self.layer, self.when = nn.Linear(4, 3), when
        self.mean = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x):
        hidden = self.layer(x)
        if self.when(self, x):
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * hidden.detach().mean(0))
        return hidden - self.mean


WRITERS = {
    "max_norm": (MaxNorm, "rows.weight", tokens(0)),
    "statistics": (lambda: Kept(lambda model, x: model.training), "mean", CASE.batch),
    "statistics at evaluation": (
        lambda: Kept(lambda model, x: not model.training),
        "mean",
        CASE.batch,
    ),
}


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("name", WRITERS)
def test_forward_does_not_move_the_users_weights(name, batching):
    make, parameter, batch = WRITERS[name]
    model = double(make)
    before = state(model)
    for call in (
        lambda learner: learner.evaluate(Same(batch), num_tasks=3),
        lambda learner: learner.adapt(batch.support_x[0], batch.support_y[0]),
        lambda learner: learner.meta_gradients(batch),
    ):
        with pytest.raises(RequestError) as refusal:
            call(learner_of(model, task_batching=batching))
        assert str(refusal.value).startswith(f"the model writes to its parameter '{parameter}' in ")
    assert unchanged(model, before)


def test_a_write_that_no_probe_saw_stops_the_run():
    rare = double(Kept, lambda model, x: bool(x.abs().max() > 100))
    learner = learner_of(rare, task_batching="sequential")
    learner.evaluate(Same(CASE.batch), num_tasks=3)
    far = copy.deepcopy(CASE.batch)
    far.query_x[1] *= 1000
    with pytest.raises(RunError, match=r"^the model wrote to its own 'mean' in forward"):
        learner.evaluate(Same(far), num_tasks=3)


# c. Pairs of plugins, however a meta-gradient is derived.


def trained(steps=2, iterations=2, **settings):
    model = double(lambda: problem().model)
    given = {"inner_lr": 0.3, "inner_steps": steps, "preset": "reptile", **settings}
    MetaLearner(model, **given).fit(Stream(), iterations=iterations, tasks_per_batch=2)
    return state(model)


def test_reptile_trains_what_a_recomputed_loop_adapts():
    plain, recomputed = (
        trained(checkpoint_steps=size, plugins=[first_party.make("partial-adaptation")])
        for size in (None, 1)
    )
    start = problem().model.state_dict()
    assert not torch.equal(plain["0.weight"], start["0.weight"])
    for name, each in plain.items():
        torch.testing.assert_close(recomputed[name], each, rtol=1e-9, atol=1e-12)


CHAINS = first_party.covering(5)
COUPLED = {*first_party.COUPLING, *first_party.DRAWING}
APART = first_party.covering(5, [name for name in first_party.NAMES if name not in COUPLED])


def derived(chain, *, traced=False, **settings):
    """The meta-gradients of some plugins, on a model that all have something to do with."""
    case = problem("batch-norm", tasks=2, support=3, query=3)
    made = [first_party.make(name) for name in chain]
    learner = case.learner(plugins=made, seed=1, task_batching="vectorized", **settings)
    if traced:
        learner.engine.derivation = CompiledDerivation(learner.engine, lambda graph, inputs: graph)
    return learner.meta_gradients(case.batch)


def assert_same(others, exact):
    for other in others:
        assert other.keys() == exact.keys()
        for name, each in exact.items():
            torch.testing.assert_close(other[name], each, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chain", CHAINS, ids="+".join)
def test_all_pairs_of_plugins_are_the_same_recomputed(chain):
    assert_same([derived(chain, checkpoint_steps=1)], derived(chain))


@pytest.mark.parametrize("chain", APART, ids="+".join)
def test_all_pairs_of_plugins_that_do_not_couple_tasks_are_the_same_in_chunks(chain):
    assert_same([derived(chain, chunk_size=1)], derived(chain))


@pytest.mark.filterwarnings("ignore:steps are not compiled")
@pytest.mark.parametrize(
    "chain",
    [
        pytest.param(chain, marks=() if place % 4 == 0 else pytest.mark.slow)
        for place, chain in enumerate(CHAINS)  # the rest takes seconds each
    ],
    ids="+".join,
)
def test_all_pairs_of_plugins_are_the_same_traced(chain):
    assert_same([derived(chain, traced=True)], derived(chain))


# d. What a trace would freeze.


class Factor(Plugin):
    """Scales gradients by a number; how it is found and how it changes is a test's.

    Args:
        find: (plugin, step) → the factor.
        go_on: called with the plugin after every meta-update.
        held: what the plugin has of its own, beside its buffers.
    """

    def __init__(self, find, go_on=lambda plugin: None, **held):
        super().__init__()
        self.find, self.go_on = find, go_on
        for name, value in held.items():
            setattr(self, name, value)

    @hookimpl
    def transform_gradients(self, gradients, step):
        factor = self.find(self, step)
        return {name: factor * gradient for name, gradient in gradients.items()}

    @hookimpl
    def end_meta_step(self):
        self.go_on(self)
        return {}


def three():
    return torch.tensor(3.0, dtype=torch.float64)


def append_half(plugin):
    plugin.factors.append(plugin.factors[-1] / 2)


FROZEN = {
    "a branch": (
        lambda: Factor(lambda plugin, step: 3.0 if step.meta_iteration == 0 else 1.0),
        "'factor'",
    ),
    "an index": (
        lambda: Factor(lambda plugin, step: [3.0, 1.0, 0.1][step.meta_iteration]),
        "'factor'",
    ),
    "a list": (
        lambda: Factor(lambda plugin, step: plugin.factors[-1], append_half, factors=[3.0]),
        "'factors' of plugin 'factor' changes from step to step",
    ),
    "tensors in a list": (
        lambda: Factor(lambda plugin, step: plugin.factors[-1], append_half, factors=[three()]),
        "'factors' of plugin 'factor' changes from step to step",
    ),
    "a tensor that is written": (
        lambda: Factor(
            lambda plugin, step: plugin.held, lambda plugin: plugin.held.mul_(0.3), held=three()
        ),
        "'held' of plugin 'factor' changes from step to step",
    ),
    "a tensor that is replaced": (
        lambda: Factor(
            lambda plugin, step: plugin.held,
            lambda plugin: setattr(plugin, "held", 0.3 * plugin.held),
            held=three(),
        ),
        "'held' of plugin 'factor' changes from step to step",
    ),
}


TABLE, ARRAY, LOGGER = [3.0], np.array([3.0]), logging.getLogger("metaplug.tests.chatty")


def from_the_table():
    return TABLE[0]


def by_a_comprehension(_, gradients, step):
    return {name: TABLE[0] * one for name, one in gradients.items()}


def by_a_helper(_, gradients, step):
    return {name: from_the_table() * one for name, one in gradients.items()}


def by_an_array(_, gradients, step):
    factor = float(ARRAY[0])
    return {name: factor * one for name, one in gradients.items()}


def logged(_, gradients, step):
    LOGGER.debug("the hook has been called")
    return {name: 1.0 * one for name, one in gradients.items()}


def plugin_of(hook):
    return type("Reading", (Plugin,), {"transform_gradients": hookimpl(hook)})()


@pytest.mark.parametrize("hook", [by_a_comprehension, by_a_helper, by_an_array])
def test_a_trace_does_not_freeze_what_hooks_read_around_them(hook):
    def halve(record):
        TABLE[0], ARRAY[0] = TABLE[0] * 0.98, ARRAY[0] * 0.98

    hook.__name__ = "transform_gradients"
    TABLE[0] = ARRAY[0] = 3.0
    exact, _ = run(plugin_of(hook), traced=False, between=halve)
    TABLE[0] = ARRAY[0] = 3.0
    ours, [warned] = run(plugin_of(hook), traced=True, between=halve)
    assert "which plugin 'reading' reads in transform_gradients, changes from step" in warned
    for key, each in exact.items():
        torch.testing.assert_close(ours[key], each, rtol=1e-10, atol=1e-12)


def test_a_trace_does_not_mind_what_a_logger_keeps():
    logged.__name__ = "transform_gradients"
    assert run(plugin_of(logged), traced=True)[1] == []


class Reader(nn.Module):
    """Scales its features by numbers that it has read from them."""

    def __init__(self, read):
        super().__init__()
        self.layer, self.head, self.read = nn.Linear(4, 8), nn.Linear(8, 3), read

    def forward(self, x):
        h = torch.tanh(self.layer(x))
        return self.head(h * torch.as_tensor(self.read(h.detach()), dtype=h.dtype))


READINGS = {
    "numpy": lambda h: 1 + h.numpy().mean(1, keepdims=True),
    "tolist": torch.Tensor.tolist,
    "__array__": lambda h: np.asarray(h).copy(),
}


@pytest.mark.parametrize("name", READINGS)
def test_a_trace_does_not_freeze_numbers_that_forward_reads(name):
    learner = learner_of(double(Reader, READINGS[name]))
    learner.engine.derivation = CompiledDerivation(learner.engine, lambda graph, inputs: graph)
    with pytest.warns(UserWarning, match=rf"^steps are not compiled.* by Tensor\.{name}, which"):
        learner.meta_gradients(CASE.batch)


def stateful_loss():
    """A loss of which a test changes the temperature between two iterations."""
    temperature = [1.0]

    def loss(prediction, target):
        return F.cross_entropy(prediction / temperature[0], target)

    return loss, temperature


def run(plugin, *, traced, loss=None, between=None):
    """The weights after three iterations, and what was warned of.

    Args:
        between: called after every iteration.
    """
    random.seed(0)
    model = double(lambda: problem().model)
    learner = learner_of(model, plugins=[plugin] if plugin else [], loss=loss)
    if traced:
        learner.engine.derivation = CompiledDerivation(learner.engine, lambda graph, inputs: graph)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        learner.fit(Same(CASE.batch), iterations=3, tasks_per_batch=3, on_record=between)
    texts = [str(each.message) for each in warned]
    return state(model), [text for text in texts if text.startswith("steps are not compiled")]


@pytest.mark.parametrize("name", FROZEN)
def test_a_trace_freezes_nothing_that_python_decides(name):
    make, named = FROZEN[name]
    exact, _ = run(make(), traced=False)
    ours, [warned] = run(make(), traced=True)
    assert named in warned
    for key, each in exact.items():
        torch.testing.assert_close(ours[key], each, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["scale", "config", "_is_full_backward_hook"])
def test_a_number_of_a_part_of_a_plugin_is_part_of_a_traces_key(name):
    def changing():
        part = nn.Module()
        setattr(part, name, 3.0)
        return Factor(
            lambda plugin, step: getattr(plugin.part, name),
            lambda plugin: setattr(plugin.part, name, 0.3 * getattr(plugin.part, name)),
            part=part,
        )

    exact, _ = run(changing(), traced=False)
    ours, warned = run(changing(), traced=True)
    assert warned == []
    for key, each in exact.items():
        torch.testing.assert_close(ours[key], each, rtol=1e-10, atol=1e-12)


def test_a_trace_does_not_freeze_a_loss():
    results = []
    for traced in (False, True):
        loss, temperature = stateful_loss()
        found, warned = run(
            None,
            traced=traced,
            loss=loss,
            between=lambda record, held=temperature: held.append(held.pop() + 1),
        )
        results.append(found)
    assert "'temperature', which the loss reads, changes from step to step" in warned[0]
    for name, each in results[0].items():
        torch.testing.assert_close(results[1][name], each, rtol=1e-10, atol=1e-12)


def test_a_cause_that_nobody_thought_of_is_found_at_the_second_step():
    """Python's own random numbers, which nothing that is looked at shows."""
    drawing = Factor(lambda plugin, step: random.random())
    _, [warned] = run(drawing, traced=True)
    assert "its second meta-gradient is " in warned
    assert "off the untraced one" in warned


# e. Second derivatives that cannot be had.


def test_recomputed_steps_refuse_a_second_derivative():
    """Of x⁴ at 2 it is 48; the recomputed graph ends at new leaves, and would give 12 or less."""
    x = torch.tensor(2.0, requires_grad=True)
    y = rematerialize(lambda inputs, graph: inputs["x"] ** 4, {"x": x}, [])
    [first] = torch.autograd.grad(y, x, create_graph=True)
    assert float(first.detach()) == 32
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(first * x, x)


class Once(torch.autograd.Function):
    """The cube, with a first derivative alone."""

    generate_vmap_rule = False

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class Cubed(nn.Module):
    def __init__(self, cube):
        super().__init__()
        self.first, self.second, self.cube = nn.Linear(4, 4), nn.Linear(4, 3), cube

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) + self.cube(self.first(x)[:, :3])


def test_an_operation_with_a_first_derivative_alone_is_no_silent_zero():
    plain, once = (double(Cubed, cube) for cube in (lambda x: x**3, Once.apply))
    exact = reference.maml(plain, CASE.batch, steps=2, lr=0.3, order=1).gradients
    found = learner_of(once, preset="fomaml").meta_gradients(CASE.batch)
    assert off(found, exact) < 1e-10
    with pytest.raises(RunError, match=r"once_differentiable\): add the plugin derivative-order$"):
        learner_of(once).meta_gradients(CASE.batch)


# f. Learning rates that a plugin writes to.


@pytest.mark.parametrize("preset", ["maml", "fomaml"])
def test_a_plugin_that_writes_to_learning_rates_writes_to_this_steps_alone(preset):
    seen = []

    class InPlace(Plugin):
        @hookimpl
        def transform_learning_rates(self, learning_rates):
            seen.append([float(rate) for rate in learning_rates.values()])
            for rate in learning_rates.values():
                rate.mul_(0.1)

    model = double(lambda: problem().model)
    learner = MetaLearner(model, preset=preset, plugins=[InPlace()], inner_lr=0.4, inner_steps=2)
    learner.fit(Stream(), iterations=2, tasks_per_batch=2)
    assert seen == [[pytest.approx(0.4)] * 4] * len(seen)


# g. What the meta-optimizer writes.


def test_a_model_in_half_precision_is_refused():
    with pytest.raises(RequestError) as refusal:
        MetaLearner(nn.Linear(4, 3).half())
    assert str(refusal.value) == (
        "the model is in float16, whose largest number is 65504 and whose smallest step loses a "
        "meta-update: call model.float(), and give precision='bfloat16' for speed"
    )


class Huge(Plugin):
    """Finite meta-gradients, and a finite rate, whose product is not."""

    @hookimpl
    def transform_meta_gradients(self, gradients, iteration):
        return {name: (1e10 if iteration else 1) * each for name, each in gradients.items()}

    @hookimpl
    def scale_meta_learning_rate(self, factor, iteration):
        return 1e38 if iteration else 1.0


def test_an_update_that_overflows_stops_with_the_name_of_the_weight():
    case = problem(dtype=torch.float32)
    learner = case.learner(plugins=[Huge()], meta_optimizer="sgd", meta_lr=1.0)
    with pytest.raises(RunError) as stop:
        learner.fit(Same(case.batch), iterations=3, tasks_per_batch=3)
    assert str(stop.value).startswith(
        "iteration 2 stopped: the meta-optimizer wrote NaN or Inf into '0.weight', from finite "
        "meta-gradients, at meta learning rates '1e+38'"
    )


def test_gradients_whose_square_overflows_stop_before_the_update():
    case = problem(dtype=torch.float32)

    class Large(Plugin):
        @hookimpl
        def transform_meta_gradients(self, gradients):
            return {name: 1e25 * gradient for name, gradient in gradients.items()}

    learner = case.learner(plugins=[Large()])
    before = state(learner.model)
    with pytest.raises(RunError, match=r"nothing was updated: .*its square"):
        learner.fit(Same(case.batch), iterations=3, tasks_per_batch=3)
    assert unchanged(learner.model, before)


# h. Images of other modes: tests/tasks.

# i. A run of several calls.


def rates(calls, **settings):
    """The meta learning rates of a run, and what it warned of."""
    learner, found = learner_of(double(lambda: problem().model), **settings), []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for iterations, total in calls:
            given = {} if total is None else {"total": total}
            history = learner.fit(Stream(), iterations=iterations, tasks_per_batch=2, **given)
            found += [record.step.meta_lr for record in history.records]
    return found, [str(each.message) for each in warned if "this call makes" in str(each.message)]


def test_schedules_go_on_over_several_calls():
    cosine = {"plugins": ["cosine-meta-lr"]}
    whole, warned = rates([(6, None)], **cosine)
    assert warned == []
    assert rates([(3, 6), (3, 6)], **cosine) == (whole, [])
    jumping, [text] = rates([(3, None), (3, None)], **cosine)
    assert jumping[:3] != whole[:3]
    assert text == (
        "this call makes a run of 3 iterations one of 6, so the schedules of plugin "
        "'cosine-meta-lr' jump: give total=, the same in every call"
    )
    assert rates([(3, None), (3, None)], plugins=[first_party.make("gradient-clipping")])[1] == []
    assert rates([(3, None), (3, None)])[1] == []
    assert rates([(3, None), (3, None)], preset="fomaml")[1] == [], "its order is always the same"


# j. One learner, several threads.


def test_threads_take_turns():
    case = problem("batch-norm")
    learner = case.learner()
    drawn = problem("batch-norm", tasks=40, seed=1).batch  # drawing is not for several threads
    tasks = Same(drawn)

    def call(number):
        if number % 2:
            return learner.evaluate(
                tasks, num_tasks=1 + number % 5, inner_steps=number % 3
            ).per_task
        task = tasks.batch(0, [number])
        adapted = learner.adapt(task.support_x[0], task.support_y[0], inner_steps=number % 3)
        return adapted(task.query_x[0]).detach()

    alone = [call(number) for number in range(40)]
    found, failed = [None] * 40, []

    def work(first):
        try:
            for number in range(first, 40, 8):
                found[number] = call(number)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    differ = [
        number
        for number, (one, other) in enumerate(zip(found, alone, strict=True))
        if not torch.allclose(one, other, rtol=1e-12, atol=1e-12)
    ]
    assert differ == []


# k. Random numbers at evaluation.


class Drawing(nn.Module):
    """Draws dropout masks in evaluation mode too, as for Monte Carlo dropout."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(F.dropout(self.layers(x), 0.5, training=True))


class Numbers:
    """Tasks of regression, each by its number."""

    def batch(self, iteration, indices):
        drawn = [torch.Generator().manual_seed(index) for index in indices]
        parts = [
            torch.stack(
                [torch.randn(5, size, generator=each, dtype=torch.float64) for each in drawn]
            )
            for size in (4, 2, 4, 2)
        ]
        return TaskBatch(*parts)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_task_that_draws_does_not_depend_on_its_batch(batching):
    learner = learner_of(double(Drawing), kind="regression", task_batching=batching)
    found = [
        learner.evaluate(Numbers(), num_tasks=6, tasks_per_batch=size).per_task
        for size in (6, 1, 4)
    ]
    assert math.isfinite(float(found[0].mean()))
    assert len(set(found[0].tolist())) == 6
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)


# l. Layers that training and evaluation run otherwise, within a module of the user's own.


class Moded(nn.Module):
    """Notes the modes that it and its dropout run in."""

    def __init__(self):
        super().__init__()
        self.layer, self.dropout, self.head = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)

    def forward(self, x):
        MODES.append((self.training, self.dropout.training))
        return self.head(self.dropout(self.layer(x)))


MODES = []


@pytest.mark.parametrize("batching", BATCHINGS)
def test_dropout_is_on_in_training_and_off_at_evaluation(batching):
    learner = learner_of(double(Moded), kind="regression", task_batching=batching)
    batch = Numbers().batch(0, range(3))
    learner.meta_gradients(batch)  # the model is tried in both modes before the first step
    for _ in range(2):
        MODES.clear()
        learner.meta_gradients(batch)
        assert set(MODES) == {(True, True)}
        MODES.clear()
        learner.evaluate(Numbers(), num_tasks=2)
        assert set(MODES) == {(False, False)}
