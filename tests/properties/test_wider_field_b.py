"""LoRA, CAVIA and Proto-MAML against straight-line loops written from their equations."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import plugins
from torch import nn
from torch.nn import functional as F

from metaplug import MetaLearner, RequestError, TaskBatch
from metaplug.testing import Stream, adapted, assert_close, found, problem, reference
from metaplug.testing.strategies import problems

EXACT = {"rtol": 1e-10, "atol": 1e-10}
ROUNDED = {"rtol": 1e-8, "atol": 1e-9}
"""Over drawn models: a feature that hardly varies makes batch norm amplify rounding."""

WAYS = [
    {},
    {"task_batching": "sequential"},
    {"checkpoint_steps": 1},
    {"chunk_size": 2},
]
"""Of computing a step."""


def initialize_parameters(parameters):
    """A start of one parameter that is made of another, which no plugin changes."""
    made = parameters["2.bias"] + parameters["0.weight"][:, :3, 0]
    return {**parameters, "2.bias": made}


@pytest.mark.parametrize("options", [{}, {"checkpoint_steps": 1}, {"task_batching": "sequential"}])
def test_the_inner_gradient_leaves_out_the_way_through_another_start(options):
    case = problem("mlp")
    learner = case.learner(plugins=[initialize_parameters], **options)
    weights = dict(case.model.named_parameters())
    for task in range(case.batch.num_tasks):
        fast = dict(initialize_parameters({name: each[None] for name, each in weights.items()}))
        fast = {name: each[0].detach().requires_grad_() for name, each in fast.items()}
        x, y = case.batch.support_x[task], case.batch.support_y[task]
        for _ in range(case.steps):
            loss = F.cross_entropy(reference.predict(case.model, fast, x), y)
            taken = torch.autograd.grad(loss, list(fast.values()))
            fast = {
                name: fast[name] - case.lr * each for name, each in zip(fast, taken, strict=True)
            }
        ours = found(learner, case.batch).outcome.adapted_parameters
        assert_close({name: each[task].detach() for name, each in ours.items()}, fast, **EXACT)


def straight_line(case, start, values, moved, *, order=2, rates=None, extra=()):
    """Adapt each task from its own start.

    Args:
        start: (x, y) of a task → its first variables by name.
        values: variables → the weights of a forward pass.
        moved: names of the variables that adapt.
        rates: by name of a variable, where it has one of its own.
        extra: leaves whose meta-gradients are wanted beside the model's, by name.
    """
    weights, losses, ends = dict(case.model.named_parameters()), [], []
    loss_of = F.cross_entropy if case.kind == "classification" else F.mse_loss
    for x, y, query_x, query_y in zip(
        case.batch.support_x,
        case.batch.support_y,
        case.batch.query_x,
        case.batch.query_y,
        strict=True,
    ):
        fast = {name: each.view_as(each) for name, each in start(x, y).items()}
        for _ in range(case.steps):
            loss = loss_of(reference.predict(case.model, values(fast), x), y)
            taken = torch.autograd.grad(
                loss, [fast[name] for name in moved], create_graph=order == 2
            )
            for name, each in zip(moved, taken, strict=True):
                fast[name] = fast[name] - (rates or {}).get(name, case.lr) * each
        losses.append(loss_of(reference.predict(case.model, values(fast), query_x), query_y))
        ends.append({name: each.detach() for name, each in fast.items()})
    outer, wanted = torch.stack(losses).mean(), {**weights, **dict(extra)}
    taken = torch.autograd.grad(outer, list(wanted.values()), allow_unused=True)
    gradients = {name: each for name, each in zip(wanted, taken, strict=True) if each is not None}
    return SimpleNamespace(outer=outer.detach(), ends=ends, gradients=gradients)


def compare(learner, case, expected, tolerance=EXACT):
    """The outer loss, adapted variables and all meta-gradients are those of the plain loop."""
    ours = found(learner, case.batch)
    assert_close(ours.outer_loss.detach(), expected.outer, **tolerance)
    gradients = {name: ours.gradients[name] for name in expected.gradients}
    assert_close(gradients, expected.gradients, **tolerance)
    for name in ours.gradients.keys() - expected.gradients.keys():
        assert not ours.gradients[name].any(), name
    if ours.outcome is not None:
        weights = ours.outcome.adapted_parameters
        for task, end in enumerate(expected.ends):
            assert_close({name: weights[name][task].detach() for name in end}, end, **tolerance)


def learner_of(case, name, *, seed=0, noise=0.3, **settings):
    """A learner with the plugin alone, whose meta-parameters have moved; and these, as leaves."""
    options = {key: settings.pop(key) for key in list(settings) if key in OPTIONS}
    torch.manual_seed(seed)
    learner = case.learner(plugins=[plugins.make(name, **settings)], **options)
    own = {}
    for key, each in learner.engine.meta_parameters.items():
        if key.startswith(f"{name}."):
            each.data += noise * torch.randn_like(each)
            own[key] = each.detach().clone().requires_grad_()
    return learner, own


OPTIONS = ("task_batching", "checkpoint_steps", "chunk_size", "preset", "inner_steps")


# LoRA.


def lora(case, own, *, scale=1.0, order=2, rates=None, beside=()):
    weights = dict(case.model.named_parameters())

    def values(fast):
        changed = {name: fast.get(name, each) for name, each in weights.items()}
        for name, weight in weights.items():
            if (key := name.replace(".", "/")) and f"lora.a.{key}" in own:
                product = fast[f"lora.b.{key}"] @ fast[f"lora.a.{key}"]
                changed[name] = changed[name] + scale * product.view_as(weight)
        return changed

    first = {**own, **{name: weights[name] for name in beside}}
    given = {"order": order, "rates": rates, "extra": own.items()}
    return straight_line(case, lambda x, y: first, values, list(first), **given)


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("model", ["mlp", "conv4", "regression"])
def test_lora_equals_a_plain_loop(model, options):
    case = problem(model)
    head = [name for name, _ in case.model.named_parameters()][-2:]
    learner, own = learner_of(
        case,
        "lora",
        rank=2,
        scale=0.5,
        targets=["*weight"] if model == "mlp" else None,
        beside=head,
        inner_lr=0.7,
        **options,
    )
    rates = dict.fromkeys(own, 0.7)
    compare(learner, case, lora(case, own, scale=0.5, rates=rates, beside=head))


@given(
    problems(("mlp", "layer-norm", "max-pool", "tied"), steps=(1, 3)),
    st.sampled_from([1, 2]),
    st.integers(1, 7),
)
def test_lora_equals_a_plain_loop_on_drawn_models(case, order, rank):
    preset = "maml" if order == 2 else "fomaml"
    learner, own = learner_of(case, "lora", rank=rank, preset=preset)
    compare(learner, case, lora(case, own, order=order), ROUNDED)


@given(problems(("mlp", "max-pool", "conv4"), steps=(1, 1), lrs=(0.01, 0.5)))
def test_lora_of_full_rank_from_the_identity_takes_plain_maml_s_step(case):
    """From b = 0: ∂ℓ/∂b = ∂ℓ/∂W aᵀ = ∂ℓ/∂W, and a has no gradient."""
    names = [name for name, each in case.model.named_parameters() if each.dim() > 1]
    plain = adapted(
        case.learner(plugins=[plugins.make("partial-adaptation", head=names)]), case.batch
    )
    for name in names:
        weight = dict(case.model.named_parameters())[name]
        inputs = weight[0].numel()
        one = plugins.make("lora", rank=inputs, targets=[name])
        learner = case.learner(plugins=[one])
        key = name.replace(".", "/")
        one.a[key].data.copy_(torch.eye(inputs))
        values = found(learner, case.batch).outcome.query_parameters
        assert_close(values[name].detach(), plain[name], **ROUNDED)


def test_lora_says_what_it_cannot_change():
    case = problem("mlp")
    texts = {
        (
            "targets",
            "*bias",
        ): "plugin 'lora': the pattern '*bias' matches none of the weights that can "
        "change (0.weight, 2.weight): correct targets",
        (
            "beside",
            "fc.*",
        ): "plugin 'lora': the pattern 'fc.*' matches none of the parameters that may "
        "adapt (0.weight, 0.bias, 2.weight, 2.bias): correct beside",
    }
    for (field, pattern), text in texts.items():
        with pytest.raises(RequestError) as refused:
            case.learner(plugins=[plugins.make("lora", **{field: [pattern]})])
        assert str(refused.value) == text
    with pytest.raises(RequestError) as refused:
        MetaLearner(nn.Conv1d(1, 1, 1), plugins=["lora"])
    assert str(refused.value) == (
        "plugin 'lora' finds no trainable linear layer: name weights by targets"
    )


# CAVIA.


def cavia(case, own, *, order=2, bias=True):
    """In the layers that have maps, written as modulated outputs of each layer."""
    weights = dict(case.model.named_parameters())

    def values(fast):
        changed, context = dict(weights), fast["cavia.context"]
        for key, each in own.items():
            _, kind, name = key.split(".")
            layer = name.replace("/", ".").removesuffix("weight")
            for part in ("weight", "bias"):
                if kind == "scales" and f"{layer}{part}" in weights:
                    gamma, value = 1 + each @ context, changed[f"{layer}{part}"]
                    changed[f"{layer}{part}"] = torch.einsum("o,o...->o...", gamma, value)
            if kind == "shifts":
                changed[f"{layer}bias"] = changed[f"{layer}bias"] + each @ context
        return changed

    size = next(iter(own.values())).shape[1]

    def start(x, y):
        return {"cavia.context": torch.zeros(size, dtype=torch.float64, requires_grad=True)}

    return straight_line(case, start, values, ["cavia.context"], order=order, extra=own.items())


def entering(case, modulation):
    """Settings by which a context enters a model: a shift at its first norm layer, if any."""
    kinds = nn.modules.batchnorm._NormBase
    norms = [name for name, module in case.model.named_modules() if isinstance(module, kinds)]
    layers = {"layers": norms[:1]} if modulation == "shift" and norms else {}
    return {"modulation": modulation, **layers}


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("modulation", ["film", "shift"])
@pytest.mark.parametrize("model", ["mlp", "conv4", "regression"])
def test_cavia_equals_a_plain_loop(model, modulation, options):
    case = problem(model)
    learner, own = learner_of(case, "cavia", size=3, **entering(case, modulation), **options)
    compare(learner, case, cavia(case, own))


@given(problems(steps=(0, 3)), st.sampled_from([1, 2]), st.integers(1, 4))
def test_cavia_equals_a_plain_loop_on_drawn_models(case, order, size):
    preset = "maml" if order == 2 else "fomaml"
    learner, own = learner_of(case, "cavia", size=size, preset=preset)
    compare(learner, case, cavia(case, own, order=order), ROUNDED)


@given(problems(steps=(0, 3)), st.sampled_from(["film", "shift"]))
def test_cavia_without_a_context_is_the_unadapted_model(case, modulation):
    learner, _ = learner_of(case, "cavia", size=0, **entering(case, modulation))
    plain, ours = found(case.learner(inner_steps=0), case.batch), found(learner, case.batch)
    assert_close(ours.outer_loss.detach(), plain.outer_loss.detach(), **EXACT)
    gradients = {name: ours.gradients[name] for name in plain.gradients}
    assert_close(gradients, plain.gradients, **ROUNDED)


def test_cavia_s_shift_is_the_context_beside_the_inputs():
    """Concatenation: the first layer of (inputs + size) with the maps as its further columns."""
    case = problem("regression")
    learner, own = learner_of(case, "cavia", size=4, modulation="shift")
    outcome = found(learner, case.batch).outcome
    first, *rest = case.model
    context = outcome.adapted_parameters["cavia.context"]
    for task, x in enumerate(case.batch.query_x):
        wide = torch.cat([x, context[task].expand(len(x), -1)], 1)
        columns = torch.cat([first.weight, own["cavia.shifts.0/weight"]], 1)
        expected = nn.Sequential(*rest)(F.linear(wide, columns, first.bias))
        assert_close(outcome.query_predictions[task], expected.detach(), **EXACT)


def test_cavia_modulates_norm_layers_if_there_are_any_and_hidden_layers_if_not():
    def modulated(model, **settings):
        plugin = plugins.make("cavia", size=2, **settings)
        MetaLearner(model, plugins=[plugin])
        return [*plugin.scales], [*plugin.shifts]

    layers = nn.Linear(4, 6, bias=False), nn.Conv1d(6, 6, 1), nn.Linear(6, 3)
    assert modulated(nn.Sequential(*layers)) == (["0/weight", "1/weight"], ["1/weight"])
    norms = nn.Sequential(*layers[:2], nn.RMSNorm((6, 2)), nn.LayerNorm((6, 2)), layers[2])
    assert modulated(norms) == (["2/weight", "3/weight"], ["3/weight"])
    assert modulated(nn.Sequential(*layers), layers=["2"]) == (["2/weight"], ["2/weight"])
    assert modulated(nn.Linear(2, 2), layers=["weight"]) == (["weight"], ["weight"])


def test_cavia_says_what_it_cannot_modulate():
    none = (
        "plugin 'cavia' finds no trainable norm, hidden linear or convolution layer to modulate, "
        "with a bias for modulation shift: name others by layers"
    )
    unlike = (
        "plugin 'cavia': the pattern 'body.*' matches none of the layers that it can modulate (0): "
        "correct layers"
    )
    taken_away = (
        "plugin 'cavia': modulation = 'shift' adds to what the first layer makes, and batch norm "
        "takes such shifts away: name layers behind it by layers, as the norm layers, or leave "
        "modulation at film"
    )
    linear, no_bias = (nn.Sequential(nn.Linear(2, 2, bias=bias)) for bias in (True, False))
    normed = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    for text, model, settings in (
        (none, linear, {}),
        (none, no_bias, {"modulation": "shift"}),
        (taken_away, normed, {"modulation": "shift"}),
        (unlike, linear, {"layers": ["body.*"]}),
    ):
        with pytest.raises(RequestError) as refused:
            MetaLearner(model, plugins=[plugins.make("cavia", **settings)])
        assert str(refused.value) == text


# Proto-MAML.


def features(case, weights, x):
    """What the head gets, from a hook on it."""
    kept = []
    head = [layer for layer in case.model.modules() if isinstance(layer, nn.Linear)][-1]
    hook = head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    reference.predict(case.model, weights, x)
    hook.remove()
    return kept[0]


def prototypes(case, weights, x, y):
    """The head of a task: 2 p and −‖p‖², and the model's own row for a class without examples."""
    names = list(weights)[-2:]
    h, weight, bias = features(case, weights, x), *(list(weights[name]) for name in names)
    for label in range(len(bias)):
        if (y == label).any():
            p = h[y == label].mean(0)
            weight[label], bias[label] = 2 * p, -(p * p).sum()
    return {**weights, names[0]: torch.stack(weight), names[1]: torch.stack(bias)}


def proto_maml(case, *, order=2):
    weights = dict(case.model.named_parameters())
    moved = list(weights)
    return straight_line(
        case, lambda x, y: prototypes(case, weights, x, y), lambda fast: fast, moved, order=order
    )


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("model", ["mlp", "conv4"])
def test_proto_maml_equals_a_plain_loop(model, order, options):
    case = problem(model, support=4)  # of three classes, some have no example
    learner, _ = learner_of(
        case, "proto-maml", preset="maml" if order == 2 else "fomaml", **options
    )
    compare(learner, case, proto_maml(case, order=order))


@given(problems(("mlp", "layer-norm", "group-norm", "max-pool", "tied"), lrs=(0.01, 0.2)))
def test_proto_maml_equals_a_plain_loop_on_drawn_models(case):
    learner, _ = learner_of(case, "proto-maml")
    compare(learner, case, proto_maml(case), ROUNDED)


@given(problems(steps=(0, 0)))
def test_proto_maml_without_steps_is_the_prototypical_network(case):
    y = torch.arange(3).repeat(case.batch.num_tasks, 2)[:, : case.batch.support_x.shape[1]]
    case.batch = TaskBatch(case.batch.support_x, y, case.batch.query_x, case.batch.query_y)
    learner, _ = learner_of(case, "proto-maml")
    logits = found(learner, case.batch).outcome.query_predictions
    weights = dict(case.model.named_parameters())
    for task, (x, query_x) in enumerate(zip(case.batch.support_x, case.batch.query_x, strict=True)):
        h, query = features(case, weights, x), features(case, weights, query_x)
        means = torch.stack([h[y[task] == label].mean(0) for label in range(3)])
        distances = (query.unsqueeze(1) - means).square().sum(2)
        assert_close(logits[task].softmax(1), (-distances).softmax(1).detach(), **ROUNDED)


def test_proto_maml_gives_a_task_of_fewer_ways_and_shots_what_it_has_alone():
    """Alone: in a model of as many outputs. The row of the third class stays the model's own."""
    case = problem("mlp", support=6)
    small = TaskBatch(
        case.batch.support_x[:1, :3],
        torch.tensor([[0, 1, 0]]),
        case.batch.query_x[:1, :2],
        torch.tensor([[1, 0]]),
    )
    both = TaskBatch.from_tasks([case.batch.tasks(slice(0, 1)), small], ways=[3, 2])
    narrow = copy.deepcopy(case)
    narrow.model[2].weight, narrow.model[2].bias = (
        nn.Parameter(each.detach()[:2].clone()) for each in case.model[2].parameters()
    )
    together = adapted(learner_of(case, "proto-maml")[0], both)
    assert torch.equal(together["2.weight"][1, 2], case.model[2].weight[2])
    alone = adapted(learner_of(narrow, "proto-maml")[0], small)
    for name, each in alone.items():
        ours = together[name][1]
        assert_close(ours[:2] if name.startswith("2.") else ours, each[0], **EXACT)


def test_proto_maml_weighs_examples_by_soft_labels():
    case = problem("mlp", steps=0)
    batch = case.batch
    sharp = [F.one_hot(y, 3).double() for y in (batch.support_y, batch.query_y)]
    soft = TaskBatch(batch.support_x, sharp[0], batch.query_x, sharp[1])
    learner, _ = learner_of(case, "proto-maml")
    assert_close(adapted(learner, soft), adapted(learner, batch), **EXACT)
    blurred = TaskBatch(batch.support_x, 0.9 * sharp[0] + 0.1 / 3, batch.query_x, sharp[1])
    labels, weights = blurred.support_y[0], dict(case.model.named_parameters())
    h = features(case, weights, batch.support_x[0])
    means = labels.T @ h / labels.sum(0).unsqueeze(1)
    assert_close(adapted(learner, blurred)["2.weight"][0], 2 * means.detach(), **EXACT)


class Answering(nn.Module):
    """A classifier whose output is a function of its head's."""

    def __init__(self, after, head=None):
        super().__init__()
        self.body, self.after = nn.Linear(4, 5), after
        self.head = nn.Linear(5, 3) if head is None else head

    def forward(self, x):
        return self.after(self.head(torch.tanh(self.body(x))))


NEEDS = "plugin 'proto-maml' needs the output of 'head.weight' as it is, and that of the model"
ADVICE = "return logits, or name the last linear layer by head"


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "after",
    [
        lambda z: z.log_softmax(1),
        torch.relu,
        torch.tanh,
        lambda z: F.normalize(z + 1, dim=1),
        lambda z: 0 * z.detach() + 1,
    ],
)
def test_proto_maml_refuses_an_output_that_is_not_the_head_s(after, frozen, batching):
    case = problem("mlp")
    model = Answering(after).double()
    model.body.requires_grad_(not frozen)
    learner = MetaLearner(model, plugins=["proto-maml"], inner_steps=1, task_batching=batching)
    for run in (
        lambda: found(learner, case.batch),
        lambda: learner.evaluate([case.batch.tasks(slice(0, 1))] * 2),
    ):
        with pytest.raises(RequestError) as refused:
            run()
        assert str(refused.value) == f"{NEEDS} is not linear in it: {ADVICE}"


def test_proto_maml_knows_its_features_where_logits_are_scaled_or_added_to():
    case, h = problem("mlp", steps=0), None
    for after in (lambda z: 4 * z, lambda z: z + 1):
        model = Answering(after).double()
        ours = adapted(MetaLearner(model, plugins=["proto-maml"], inner_steps=0), case.batch)
        x, y = case.batch.support_x[0], case.batch.support_y[0]
        h = torch.tanh(model.body(x)).detach()
        for label in y.unique():
            assert_close(ours["head.weight"][0, label], 2 * h[y == label].mean(0), **EXACT)


def test_proto_maml_says_what_it_cannot_start():
    starts = (
        "plugin 'proto-maml' starts a classifier that is a linear layer with a trainable weight "
        "and bias, and '{}' in {} is none: name one by head"
    )
    texts = {
        starts.format("weight", "classification"): (nn.Linear(2, 2, bias=False), {}, {}),
        starts.format("fc", "classification"): (nn.Linear(2, 2), {"head": "fc"}, {}),
        starts.format("the last linear layer", "classification"): (nn.Conv1d(1, 1, 1), {}, {}),
        starts.format("weight", "regression"): (nn.Linear(2, 2), {}, {"kind": "regression"}),
    }
    for text, (model, settings, options) in texts.items():
        with pytest.raises(RequestError) as refused:
            MetaLearner(model, plugins=[plugins.make("proto-maml", **settings)], **options)
        assert str(refused.value) == text
    learner = MetaLearner(
        Answering(lambda z: z.unsqueeze(2).expand(-1, -1, 7)).double(), plugins=["proto-maml"]
    )
    y = torch.zeros(2, 4, 7, dtype=torch.int64)
    with pytest.raises(RequestError) as refused:
        learner.meta_gradients(
            TaskBatch(torch.ones(2, 4, 4).double(), y, torch.ones(2, 4, 4).double(), y)
        )
    assert str(refused.value) == f"{NEEDS} has the form (3, 7): {ADVICE}"


# All three, beside others.


@pytest.mark.parametrize("others", [["gradient-sharing"], ["meta-sgd"], "maml++"], ids=str)
@pytest.mark.parametrize("name", ["lora", "cavia", "proto-maml"])
def test_they_train_beside_others_save_and_leave_no_trace_at_evaluation(name, others):
    case = problem("conv4")
    made = (
        {"plugins": [*others, plugins.make(name)]}
        if isinstance(others, list)
        else {"preset": others, "plugins": [plugins.make(name)]}
    )
    learner = case.learner(**made)
    learner.fit(Stream("conv4"), iterations=2, tasks_per_batch=2)
    before = copy.deepcopy(learner.state_dict())
    learner.evaluate(Stream("conv4", "val"), num_tasks=2)
    again = case.learner(
        **{**made, "plugins": [*(others if isinstance(others, list) else ()), plugins.make(name)]}
    )
    again.load_state_dict(before)
    assert_close(
        again.meta_gradients(case.batch), learner.meta_gradients(case.batch), rtol=0, atol=0
    )
