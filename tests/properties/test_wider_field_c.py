"""L2F, ALFA and MeTAL against loops written from their equations, task by task, and what must hold
of each."""

import pytest
import torch
from hypothesis import given
from support import plugins
from support.plain_loop import one, predict
from torch.nn import functional as F

from metaplug import RequestError, TaskBatch
from metaplug.testing import Stream, assert_close, found, problem
from metaplug.testing.strategies import problems, seeds

EXACT = {"rtol": 1e-10, "atol": 1e-12}
MODES = ("task_batching", "vectorized"), ("task_batching", "sequential"), ("checkpoint_steps", 1)
CLOSE = {"rtol": 1e-7, "atol": 1e-9}
"""Over drawn models: other kernels, whose rounding batch norm over few examples amplifies."""


def learner_of(case, plugin, *, seed=0, spread=0.3, **given):
    """A learner whose plugin's meta-parameters are not where they start, so that all act."""
    torch.manual_seed(seed)
    learner = case.learner(plugins=[plugin], **given)
    generator = torch.Generator().manual_seed(seed)
    for parameter in learner.chain.named_parameters().values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data += spread * noise
    return learner


def tasks_of(batch):
    return [one(batch.tasks(slice(row, row + 1))) for row in range(batch.num_tasks)]


def grad(loss, weights, **given):
    """The gradient of a loss by name."""
    taken = torch.autograd.grad(loss, list(weights.values()), create_graph=True, **given)
    return dict(zip(weights, taken, strict=True))


def own(weights):
    """The same values as variables of their own."""
    return {name: value.view_as(value) for name, value in weights.items()}


def plain(case, learner, *, start=None, objective=None, update=None, loss_of=F.cross_entropy):
    """MAML task by task, with what a plugin changes as functions; the meta-parameters of `learner`.

    Args:
        start: (model, weights, x, y) → weights.
        objective: (weights, step, task, its prediction, its loss) → what is descended.
        loss_of: (prediction, target) → the loss.
        update: (weights, gradients, step) → weights.
    """
    model = learner.model
    weights = dict(model.named_parameters())
    losses, adapted = [], []
    for task in tasks_of(case.batch):
        x, y, query_x, query_y = task
        fast = own(weights)
        if start is not None:
            fast = start(model, fast, x, y)
        for step in range(case.steps):
            fast = own(fast)
            prediction = predict(model, fast, x)
            loss = loss_of(prediction, y)
            if objective is not None:
                loss = objective(fast, step, task, prediction, loss)
            gradients = grad(loss, fast)
            if update is None:
                fast = {name: fast[name] - case.lr * gradients[name] for name in fast}
            else:
                fast = update(fast, gradients, step)
        losses.append(loss_of(predict(model, fast, query_x), query_y))
        adapted.append(fast)
    outer = torch.stack(losses).mean()
    wanted = {**weights, **learner.chain.named_parameters()}
    return adapted, outer, grad(outer, wanted)


def assert_equals(learner, case, expected):
    adapted, outer, gradients = expected
    taken = found(learner, case.batch)
    for name, value in taken.outcome.adapted_parameters.items():
        torch.testing.assert_close(value, torch.stack([each[name] for each in adapted]), **EXACT)
    torch.testing.assert_close(taken.outer_loss, outer.detach(), **EXACT)
    assert taken.gradients.keys() == gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(taken.gradients[name], value.detach(), **EXACT)


def named(learner, plugin):
    """A plugin's meta-parameters by their own names."""
    given = learner.chain.named_parameters().items()
    return {name.removeprefix(f"{plugin}."): value for name, value in given}


def two_layers(given, x, prefix="network"):
    """W₂ relu(W₁ x + b₁) + b₂."""
    hidden = (given[f"{prefix}.0.weight"] @ x + given[f"{prefix}.0.bias"]).relu()
    return given[f"{prefix}.2.weight"] @ hidden + given[f"{prefix}.2.bias"]


def bits_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# L2F.


def attenuation(learner, *, strength=1.0, detach=False):
    given = named(learner, "l2f")

    def start(model, weights, x, y):
        gradients = grad(F.cross_entropy(predict(model, weights, x), y), weights)
        means = torch.stack([gradient.mean() for gradient in gradients.values()])
        gates = two_layers(given, means.detach() if detach else means).sigmoid()
        return {
            name: (1 - strength * (1 - gate)) * weight
            for (name, weight), gate in zip(weights.items(), gates, strict=True)
        }

    return start


@pytest.mark.parametrize("settings", [{}, {"strength": 0.6}, {"detach": True}])
@pytest.mark.parametrize("name", ["mlp", "conv4"])
def test_l2f_is_its_equation(name, settings):
    case = problem(name, tasks=3, steps=2)
    learner = learner_of(case, plugins.make("l2f", **settings))
    assert_equals(learner, case, plain(case, learner, start=attenuation(learner, **settings)))


@given(problems(("mlp", "layer-norm", "tied", "conv4"), tasks=(1, 4), lrs=(0.01, 0.3)), seeds)
def test_l2f_whose_gates_are_open_is_maml(case, seed):
    """γ → 1 as b₂ → ∞, and each task starts from no more than the shared weights."""
    learner = learner_of(case, plugins.make("l2f"), seed=seed)
    started = found(learner, case.batch).outcome.initial_parameters
    for name, weight in learner.model.named_parameters():
        assert (started[name].abs() <= weight.abs()).all()
    learner.engine.meta_parameters["l2f.network.2.bias"].data.fill_(1e4)
    ours, theirs = found(learner, case.batch), found(case.learner(), case.batch)
    shared = {name: ours.gradients[name] for name in theirs.gradients}
    assert_close(shared, dict(theirs.gradients), **CLOSE)


# ALFA.


def generated(learner, *, rates=True, factors=True, detach=False, lr=0.3):
    given = named(learner, "alfa")

    def update(weights, gradients, step):
        seen = [weight.mean() for weight in weights.values()]
        seen += [(each.detach() if detach else each).mean() for each in gradients.values()]
        output = 1 + two_layers(given, torch.stack(seen))
        ones = torch.ones(len(weights), dtype=output.dtype)
        a, b = output[: len(weights)], output[-len(weights) :]
        alphas = given["bases.rates"][step] * a if rates else lr * ones
        betas = given["bases.factors"][step] * b if factors else ones
        return {
            name: beta * weights[name] - alpha * gradients[name]
            for name, alpha, beta in zip(weights, alphas, betas, strict=True)
        }

    return update


@pytest.mark.parametrize("settings", [{}, {"rates": False}, {"factors": False}, {"detach": True}])
@pytest.mark.parametrize("name", ["mlp", "conv4"])
def test_alfa_is_its_equation(name, settings):
    case = problem(name, tasks=3, steps=2)
    learner = learner_of(case, plugins.make("alfa", **settings), spread=0.1)
    update = generated(learner, **settings, lr=case.lr)
    assert_equals(learner, case, plain(case, learner, update=update))


def without(gradients, *prefixes):
    return {name: each for name, each in gradients.items() if not name.startswith(prefixes)}


@given(problems(steps=(1, 3), lrs=(0.01, 0.3)), seeds)
def test_alfa_whose_network_says_1_is_a_learned_rate_for_each_layer_and_step(case, seed):
    """With β = 1 and constant α, Meta-SGD by layer; as it begins, MAML."""
    alfa, rates = case.learner(plugins=["alfa"]), case.learner(plugins=["per-step-learning-rates"])
    generator = torch.Generator().manual_seed(seed)
    given = rates.engine.meta_parameters["per-step-learning-rates.rates"]
    for drawn in (given.detach(), torch.randn(given.shape, generator=generator).double() / 3):
        given.data = drawn.clone()
        alfa.engine.meta_parameters["alfa.bases.rates"].data = drawn.clone()
        ours, theirs = found(alfa, case.batch), found(rates, case.batch)
        expected = without(theirs.gradients, "per-step-learning-rates")
        assert_close(without(ours.gradients, "alfa"), expected, **CLOSE)
        assert_close(
            ours.gradients["alfa.bases.rates"],
            theirs.gradients["per-step-learning-rates.rates"],
            **CLOSE,
        )


@pytest.mark.parametrize("other", ["meta-sgd", "per-step-learning-rates"])
def test_alfa_scales_the_rates_of_others_in_either_order(other):
    case = problem("mlp")
    given = []
    for chain in (["alfa", other], [other, "alfa"]):
        torch.manual_seed(0)
        given.append(case.learner(plugins=chain).meta_gradients(case.batch))
    assert given[0].keys() == given[1].keys()
    assert_close(given[0], dict(given[1]))
    assert_close(without(given[0], "alfa", other), dict(case.learner().meta_gradients(case.batch)))


def test_alfa_leaves_what_receives_no_gradient():
    case = problem("mlp")
    case.model.register_parameter("idle", torch.nn.Parameter(torch.ones(2).double()))
    learner = learner_of(case, plugins.make("alfa"))
    weights = found(learner, case.batch).outcome.adapted_parameters
    assert torch.equal(weights["idle"], torch.ones(3, 2).double())
    assert not torch.equal(weights["0.bias"], learner.model[0].bias.expand(3, -1))


# MeTAL.


def normal(x):
    return (x - x.mean()) / x.std()


def adapted_loss(given, which, step, state, rows):
    """The mean over rows of a loss network whose tensors a second network transforms by a state."""
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    networks = {
        f"{part}.{name}": given[f"{which}.{part}.{place}"][step]
        for part in ("loss", "adapter")
        for place, name in enumerate(names)
    }
    changes = given[f"{which}.scale"][step] * two_layers(networks, state, "adapter")
    for name, gamma, delta in zip(names, changes[:4], changes[4:], strict=True):
        networks[f"loss.{name}"] = (1 + gamma) * networks[f"loss.{name}"] + delta
    return torch.stack([two_layers(networks, row, "loss")[0] for row in rows]).mean()


def learned_loss(learner, *, strength=1.0, query=False):
    given = named(learner, "metal")

    def objective(weights, step, task, prediction, loss):
        _, y, query_x, _ = task
        means = torch.stack([weight.mean() for weight in weights.values()])
        state = torch.cat([loss.view(1), means])
        labels = y if y.is_floating_point() else F.one_hot(y, prediction.shape[1])
        rows = [torch.cat([state, *row]) for row in zip(prediction, labels, strict=True)]
        rows = normal(torch.stack(rows))
        learned = adapted_loss(given, "support", step, normal(state), rows)
        if query:
            asked = predict(learner.model, weights, query_x)
            entropies = -torch.distributions.Categorical(logits=asked).entropy()
            if y.is_floating_point():
                entropies = asked[:, :0]
            rows = [
                torch.cat([means, p, e.view(-1)]) for p, e in zip(asked, entropies, strict=True)
            ]
            rows = normal(torch.stack(rows))
            learned = learned + adapted_loss(given, "query", step, rows.mean(0), rows)
        return loss + strength * learned

    return objective


@pytest.mark.parametrize("settings", [{}, {"strength": 0.3, "query": True}])
@pytest.mark.parametrize("name", ["mlp", "conv4"])
def test_metal_is_its_equation(name, settings):
    case = problem(name, tasks=3, steps=2)
    learner = learner_of(case, plugins.make("metal", **settings), spread=0.1)
    objective = learned_loss(learner, **settings)
    assert_equals(learner, case, plain(case, learner, objective=objective))


def test_metal_is_its_equation_in_regression():
    case = problem("regression", tasks=2, steps=2)
    learner = learner_of(case, plugins.make("metal", query=True), spread=0.1)
    objective = learned_loss(learner, query=True)
    expected = plain(case, learner, objective=objective, loss_of=F.mse_loss)
    assert_equals(learner, case, expected)


@given(problems(tasks=(1, 3), steps=(1, 3), lrs=(0.01, 0.3)), seeds)
def test_a_learned_loss_that_says_0_is_maml(case, seed):
    learner = learner_of(case, plugins.make("metal", query=True), seed=seed)
    for name, value in learner.chain.named_parameters().items():
        if name.endswith((".loss.2", ".loss.3", ".scale")):
            value.data.zero_()
    ours, theirs = found(learner, case.batch), found(case.learner(), case.batch)
    assert_close(without(ours.gradients, "metal"), dict(theirs.gradients), **CLOSE)


@pytest.mark.parametrize("query", [False, True])
def test_metal_reads_query_inputs_if_asked_and_labels_never(query):
    case = problem("mlp")
    learner, batch = learner_of(case, plugins.make("metal", query=query)), case.batch
    moved = TaskBatch(batch.support_x, batch.support_y, batch.query_x + 1, batch.query_y)
    other = TaskBatch(batch.support_x, batch.support_y, batch.query_x, 2 - batch.query_y)
    ends = [found(learner, each).outcome.adapted_parameters for each in (batch, moved, other)]
    assert bits_equal(ends[0], ends[2])
    assert bits_equal(ends[0], ends[1]) is not query
    told = learner.evaluate(Stream(), num_tasks=2).transductive
    assert told == (("plugin metal sees more than a task's support set",) if query else ())


REFUSED = {
    "alfa without a rate": (
        {"plugins": ["alfa"], "inner_lr": 0.0},
        "plugin 'alfa' starts rates at inner_lr = 0: raise it, or set rates = false",
    ),
    "metal with another number of outputs": (
        {"plugins": [plugins.make("metal", outputs=5)]},
        "plugin 'metal' reads 5 numbers in every prediction, but the model's have the shape (3,): "
        "set outputs to their length, or leave it out",
    ),
    "metal in first order": (
        {"plugins": ["metal", "derivative-order"]},
        "plugin 'metal' conflicts with 'derivative-order': leave one of them out",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_is_refused_with_the_fix(fault):
    settings, text = REFUSED[fault]
    with pytest.raises(RequestError) as error:
        case = problem("mlp")
        case.learner(**settings).meta_gradients(case.batch)
    assert str(error.value) == text


def test_alfa_makes_the_update_itself():
    case = problem("mlp")
    learner = case.learner(plugins=["alfa"], inner_optimizer="adam")
    with pytest.raises(RequestError, match="makes the inner update itself"):
        learner.meta_gradients(case.batch)


# All three.

SETTINGS = {"alfa": {}, "l2f": {}, "metal": {"query": True}}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("model", ["tied", "max-pool", "batch-norm"])
def test_every_way_of_computing_gives_the_same(name, model):
    case = problem(model, tasks=3, steps=2)
    ways = {
        "vectorized": {"task_batching": "vectorized"},
        "sequential": {"task_batching": "sequential"},
        "recomputed": {"checkpoint_steps": 1},
        "in chunks": {"chunk_size": 2},
    }
    taken = [
        found(learner_of(case, plugins.make(name, **SETTINGS[name]), spread=0.1, **way), case.batch)
        for way in ways.values()
    ]
    for other in taken[1:]:
        assert_close(other.gradients, dict(taken[0].gradients), **CLOSE)
        assert_close(other.outer_loss, taken[0].outer_loss, **CLOSE)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_task_gets_what_it_gets_alone(name):
    """Tasks of other numbers of examples and ways, padded."""
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    ).double()
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for support, query, ways in ((5, 4, 3), (3, 2, 2), (4, 6, 3)):
        x = [torch.randn(1, n, 4, generator=generator).double() for n in (support, query)]
        y = [torch.arange(n).remainder(ways).unsqueeze(0) for n in (support, query)]
        tasks.append(TaskBatch(x[0], y[0], x[1], y[1]))
    case = problem("mlp")
    case.model = model
    learner = learner_of(case, plugins.make(name, **SETTINGS[name]), spread=0.1)
    together = found(learner, TaskBatch.from_tasks(tasks))
    alone = [found(learner, TaskBatch.from_tasks([task])) for task in tasks]
    assert together.gradients.keys() == alone[0].gradients.keys()
    for key, gradient in together.gradients.items():
        mean = torch.stack([each.gradients[key] for each in alone]).mean(0)
        torch.testing.assert_close(gradient, mean, **EXACT)


@pytest.mark.parametrize("name", ["alfa", "metal"])
def test_without_an_inner_step_it_is_the_ordinary_gradient(name):
    case = problem("mlp", steps=0)
    learner = learner_of(case, plugins.make(name, **SETTINGS[name]))
    plain_gradients = case.learner().meta_gradients(case.batch)
    assert bits_equal(without(learner.meta_gradients(case.batch), name), plain_gradients)


def test_l2f_without_an_inner_step_is_the_attenuated_model():
    case = problem("mlp", steps=0)
    learner = learner_of(case, plugins.make("l2f"))
    assert_equals(learner, case, plain(case, learner, start=attenuation(learner)))


# Parameters of no axis.


class Scaled(torch.nn.Module):
    """A head behind one scalar."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.scale * x)


@pytest.mark.parametrize("name", ["alfa", "imaml", "l2f", "metal", "sharp-maml", "warp-grad"])
def test_it_takes_a_parameter_without_axes(name):
    case = problem("mlp", tasks=2, steps=2)
    case.model = Scaled().double()
    taken = case.learner(plugins=[name]).meta_gradients(case.batch)
    assert taken["scale"].shape == ()
    assert all(torch.isfinite(each).all() for each in taken.values())
