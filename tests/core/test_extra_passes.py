"""Starts, task parameters, updates and extra passes: their derivatives, and what is refused."""

import copy

import pytest
import torch
from support.plain_loop import predict
from torch import nn
from torch.nn import functional as F

from metaplug import Plugin, RequestError, RunError, hookimpl
from metaplug.testing import Stream, assert_close, found, problem


def plugin(kind="Probe", **hooks):
    """A plugin of these functions, of which a property comes as it is."""
    marked = {n: h if isinstance(h, property) else hookimpl(h) for n, h in hooks.items()}
    return type(kind, (Plugin,), marked)()


def in_loop(function):
    """A plugin that calls `function(step)` in transform_gradients."""

    def transform_gradients(self, gradients, step):
        function(step)

    return plugin(transform_gradients=transform_gradients)


def refused(plugins, *, kind=RequestError, case=None, **settings):
    """The text with which meta-gradients are refused."""
    case = case or problem(tasks=2)
    with pytest.raises(kind) as error:
        case.learner(plugins=plugins, **settings).meta_gradients(case.batch)
    return str(error.value)


def untrained(plugins, case=None):
    """The text with which an evaluation is refused."""
    case = case or problem(tasks=2)
    with pytest.raises(RequestError) as error:
        case.learner(plugins=plugins).engine.evaluate(case.batch, 2)
    return str(error.value)


# What is differentiated.


@pytest.mark.parametrize("order", [1, 2])
def test_a_start_that_is_made_of_another_is_a_variable_of_its_own(order):
    def initialize_parameters(self, parameters):
        return {**parameters, "2.bias": parameters["2.weight"].sum(2)}

    case = problem(tasks=2)
    ours = plugin(initialize_parameters=initialize_parameters)
    ours = case.learner(plugins=[ours, *(["derivative-order"] if order == 1 else [])])
    model = copy.deepcopy(case.model)
    shared, outer = dict(model.named_parameters()), []
    for task in range(2):
        x, y, query_x, query_y = (
            getattr(case.batch, field)[task]
            for field in ("support_x", "support_y", "query_x", "query_y")
        )
        fast = {**shared, "2.bias": shared["2.weight"].sum(1)}
        fast = {name: value.clone() for name, value in fast.items()}
        for _ in range(2):
            loss = F.cross_entropy(predict(model, fast, x), y)
            taken = torch.autograd.grad(loss, list(fast.values()), create_graph=order == 2)
            pairs = zip(fast.items(), taken, strict=True)
            fast = {name: value - case.lr * gradient for (name, value), gradient in pairs}
        outer.append(F.cross_entropy(predict(model, fast, query_x), query_y))
    names = [name for name in shared if name != "2.bias"]
    taken = torch.autograd.grad(sum(outer) / 2, [shared[name] for name in names])
    assert_close(ours.meta_gradients(case.batch), dict(zip(names, taken, strict=True)))


def test_a_start_of_what_is_not_adapted_is_no_way_of_an_inner_gradient():
    """Here the body's start is made of the head, which alone is adapted."""

    def initialize_parameters(self, parameters):
        return {**parameters, "0.bias": parameters["2.weight"][:, 0]}

    case = problem(tasks=2)
    shared, outer = dict(case.model.named_parameters()), []
    for task in range(2):
        fast = {**shared, "0.bias": shared["2.weight"][0]}
        fast = {name: value.expand(2, *value.shape).clone() for name, value in fast.items()}
        for _ in range(2):
            head = {name: fast[name] for name in ("2.weight", "2.bias")}
            loss, _ = by_hand(case, fast, "support", task)
            taken = torch.autograd.grad(loss, list(head.values()), create_graph=True)
            pairs = zip(head.items(), taken, strict=True)
            fast |= {name: value - case.lr * gradient for (name, value), gradient in pairs}
        outer.append(by_hand(case, fast, "query", task)[0])
    names = [name for name in shared if name != "0.bias"]
    taken = torch.autograd.grad(sum(outer) / 2, [shared[name] for name in names])
    for options in ({}, {"checkpoint_steps": 1}, {"task_batching": "sequential"}):
        ours = plugin(initialize_parameters=initialize_parameters)
        learner = case.learner(plugins=["partial-adaptation", ours], **options)
        assert_close(learner.meta_gradients(case.batch), dict(zip(names, taken, strict=True)))


def test_a_constant_start_has_a_gradient_in_training_as_at_evaluation():
    seen = []

    def task_parameters(self, context):
        return {"scale": torch.ones((), dtype=context.dtype)}

    def transform_parameters(self, parameters):
        scale = parameters["probe.scale"].view(-1, 1)
        return {**parameters, "2.bias": parameters["2.bias"] * scale}

    def initialize_parameters(self, parameters, step):
        losses, _ = step.forward(parameters)
        seen.append(step.gradients(losses, {"probe.scale": parameters["probe.scale"]}))

    hooks = (task_parameters, transform_parameters, initialize_parameters)
    case = problem(tasks=2)
    learner = case.learner(plugins=[plugin(**{hook.__name__: hook for hook in hooks})])
    found(learner, case.batch)
    learner.engine.evaluate(case.batch, 2)
    training, evaluation = (each["probe.scale"].detach() for each in seen)
    assert bool(training.any())
    assert_close(training, evaluation)


@pytest.mark.parametrize("training", [True, False])
def test_copies_have_every_tasks_own_gradient_of_what_is_not_adapted(training):
    def transform_gradients(self, gradients, step):
        copied = step.parameters["0.weight"].clone().requires_grad_()
        losses, _ = step.forward({"0.weight": copied})
        self.seen = step.gradients(losses, {"0.weight": copied})["0.weight"].detach()

    case, ours = problem(tasks=2, steps=1), plugin(transform_gradients=transform_gradients)
    chain = ["partial-adaptation", ours]
    learner = case.learner(plugins=chain)
    run = found if training else lambda learner, batch: learner.engine.evaluate(batch, 1)
    run(learner, case.batch)
    for task in range(2):
        loss = F.cross_entropy(case.model(case.batch.support_x[task]), case.batch.support_y[task])
        assert_close(ours.seen[task], torch.autograd.grad(loss, case.model[0].weight)[0])


def test_an_outer_loss_from_other_shared_values_is_that_of_another_model():
    def compute_meta_gradients(self, outcome, meta_parameters):
        shared = outcome.model_parameters
        moved = {name: value.detach() + 0.1 for name, value in shared.items()}
        self.seen = outcome.outer_loss({}).detach(), outcome.outer_loss(moved).detach()
        return {name: torch.zeros_like(each) for name, each in meta_parameters.items()}

    case, ours = (
        problem("batch-norm", tasks=2),
        plugin(compute_meta_gradients=compute_meta_gradients),
    )
    here = found(case.learner(plugins=[ours]), case.batch).outer_loss
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter.add_(0.1)
    there = found(case.learner(), case.batch).outer_loss
    assert_close(torch.stack(ours.seen), torch.stack([here, there]))


def by_hand(case, weights, part, task):
    """The loss and predictions of one task with weights of all tasks."""
    own = {name: value[task] for name, value in weights.items()}
    predictions = predict(case.model, own, getattr(case.batch, f"{part}_x")[task])
    return F.cross_entropy(predictions, getattr(case.batch, f"{part}_y")[task]), predictions


@pytest.mark.parametrize("training", [True, False])
def test_a_pass_of_a_step_is_the_model_with_these_values(training):
    def transform_gradients(self, gradients, step):
        moved = {**step.parameters, "0.bias": 1.5 * step.parameters["0.bias"]}
        self.moved, given = moved, {"0.bias": moved["0.bias"]}
        self.seen = *step.forward(given), step.forward(given, "query")

    case = problem("batch-norm", tasks=2)
    transductive = property(lambda self: True)
    ours = plugin(transform_gradients=transform_gradients, transductive=transductive)
    learner = case.learner(plugins=[ours])
    run = found if training else lambda learner, batch: learner.engine.evaluate(batch, 2)
    run(learner, case.batch)
    for task in range(2):
        loss, predictions = by_hand(case, ours.moved, "support", task)
        expected = loss, predictions, by_hand(case, ours.moved, "query", task)[1]
        for one, other in zip(ours.seen, expected, strict=True):
            assert_close(one[task], other)


def test_a_pass_of_an_outcome_is_the_model_with_these_values():
    def transform_outer_losses(self, losses, outcome):
        moved = {**outcome.adapted_parameters, "0.bias": outcome.initial_parameters["0.bias"]}
        self.moved, given = moved, {"0.bias": moved["0.bias"]}
        self.seen = {part: outcome.forward(given, part, index=0) for part in ("support", "query")}

    case, ours = (
        problem("batch-norm", tasks=2),
        plugin(transform_outer_losses=transform_outer_losses),
    )
    found(case.learner(plugins=[ours]), case.batch)
    for part, seen in ours.seen.items():
        for task in range(2):
            for one, other in zip(seen, by_hand(case, ours.moved, part, task), strict=True):
                assert_close(one[task], other)


def test_task_parameters_alone_may_be_adapted():
    """As in CAVIA: the model's weights are meta-learned, and no task changes them."""

    def select_adapted(self, names):
        return ()

    def setup(self, context):
        self.shift = nn.Parameter(torch.full((3,), 0.1, dtype=context.dtype))

    def task_parameters(self, context):
        return {"shift": self.shift}

    def transform_parameters(self, parameters):
        return {**parameters, "2.bias": parameters["2.bias"] + parameters["probe.shift"]}

    hooks = (select_adapted, setup, task_parameters, transform_parameters)
    case = problem(tasks=2)
    ours = case.learner(plugins=[plugin(**{hook.__name__: hook for hook in hooks})])
    shared, outer = dict(case.model.named_parameters()), []
    start = torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True)
    for task in range(2):

        def loss(part, shift, task=task):
            weights = {**shared, "2.bias": shared["2.bias"] + shift}
            stacked = {name: value.expand(2, *value.shape) for name, value in weights.items()}
            return by_hand(case, stacked, part, task)[0]

        shift = start
        for _ in range(2):
            [taken] = torch.autograd.grad(loss("support", shift), shift, create_graph=True)
            shift = shift - case.lr * taken
        outer.append(loss("query", shift))
    wanted = {**shared, "probe.shift": start}
    taken = torch.autograd.grad(sum(outer) / 2, list(wanted.values()))
    assert ours.engine.inner.adapted == ("probe.shift",)
    assert_close(ours.meta_gradients(case.batch), dict(zip(wanted, taken, strict=True)))


@pytest.mark.parametrize("way", ["by transform_parameters", "by step.forward"])
@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
def test_a_task_parameter_may_take_the_place_of_a_weight(batching, way):
    """The first step's gradient is every task's own, though all tasks start from one tensor."""

    def select_adapted(self, names):
        return ()

    def setup(self, context):
        self.rows = nn.Parameter(torch.full((4,), 0.1, dtype=context.dtype))

    def task_parameters(self, context):
        return {"rows": self.rows}

    def transform_parameters(self, parameters):
        return {**parameters, "2.bias": parameters["probe.rows"][:, 1:]}

    def transform_gradients(self, gradients, step):
        rows = step.parameters["probe.rows"]
        if way == "by step.forward":
            losses, _ = step.forward({"0.bias": rows.repeat(1, 2)[:, :6], "2.bias": rows[:, 1:]})
            self.seen = step.gradients(losses, {"probe.rows": rows})["probe.rows"].detach()
        else:
            self.seen = gradients["probe.rows"].detach()

    hooks = (select_adapted, setup, task_parameters, transform_parameters, transform_gradients)
    case = problem(tasks=3, steps=1)
    ours = plugin(**{hook.__name__: hook for hook in hooks})
    found(case.learner(plugins=[ours], task_batching=batching), case.batch)
    rows = torch.full((3, 4), 0.1, dtype=torch.float64, requires_grad=True)
    weights = {n: each.expand(3, *each.shape) for n, each in case.model.named_parameters()}
    weights["2.bias"] = rows[:, 1:]
    if way == "by step.forward":
        weights["0.bias"] = rows.repeat(1, 2)[:, :6]
    losses = [by_hand(case, weights, "support", task)[0] for task in range(3)]
    assert_close(ours.seen, torch.autograd.grad(sum(losses), rows)[0])


def test_nothing_to_adapt_is_refused():
    def select_adapted(self, names):
        return ()

    def task_parameters(self, context):
        return None

    text = "the plugins select no parameter to adapt: leave at least one"
    assert refused([plugin(select_adapted=select_adapted)]) == text
    hooks = {"select_adapted": select_adapted, "task_parameters": task_parameters}
    assert refused([plugin(**hooks)]) == text


def test_the_first_value_that_is_not_finite_is_found_in_a_start():
    def initialize_parameters(self, parameters, step):
        return {**parameters, "2.bias": parameters["2.bias"] * float("nan")}

    learner = problem().learner(plugins=[plugin(initialize_parameters=initialize_parameters)])
    with pytest.raises(RunError) as error:
        learner.fit(Stream(), iterations=1, tasks_per_batch=2)
    assert str(error.value) == (
        "iteration 1 stopped, nothing was updated: plugin 'probe' in initialize_parameters "
        "(link 1 of 1, iteration 1, inner step 0) returned NaN or Inf in '2.bias' of all 2 tasks; "
        "see what 'probe' computes there, or leave it out"
    )


# What is refused: passes.

SHARED = (
    "plugin 'probe' asks for every task's gradient of '0.weight', which is one tensor for all "
    "tasks, or takes no gradient: make losses with a copy for each task, as by "
    "parameters[name].clone().requires_grad_()"
)


def test_gradients_of_what_tasks_share_are_refused_in_training_and_at_evaluation():
    def asks(step):
        losses, _ = step.forward(step.parameters)
        step.gradients(losses, {"0.weight": step.parameters["0.weight"]})

    for text in (refused, untrained):
        assert text(["partial-adaptation", in_loop(asks)]) == SHARED


@pytest.mark.parametrize(
    ("hook", "given", "asks", "names"),
    [
        ("transform_parameters", "parameters", lambda step: step.forward({}), "forward"),
        ("transform_parameters", "parameters", lambda step: step.objective({}), "forward"),
        ("transform_inner_losses", "losses", lambda step: step.objective({}), "objective"),
    ],
)
def test_a_pass_is_refused_in_the_hook_that_it_calls(hook, given, asks, names):
    scope = {"asks": asks}
    exec(f"def {hook}(self, {given}, step): asks(step)", scope)
    for text in (refused, untrained):
        assert text([plugin(**{hook: scope[hook]})]) == (
            f"plugin 'probe' calls {names} in {hook}, which {names} itself calls: call it in "
            "another hook"
        )


def test_a_pass_is_refused_where_there_are_no_parameters_yet():
    def derivative_order(self, step):
        step.forward({})

    assert refused([plugin(derivative_order=derivative_order)]) == (
        "plugin 'probe' asks for a pass of the model where none can be made, as in "
        "derivative_order: call it in a hook of the inner loop that has parameters"
    )


def test_values_of_the_support_pass_are_refused_before_it():
    def initialize_parameters(self, parameters, step):
        return step.predictions

    assert refused([plugin(initialize_parameters=initialize_parameters)]) == (
        "plugin 'probe' asks for this step's predictions before the forward pass that makes them: "
        "use them in transform_inner_losses, transform_gradients, transform_learning_rates or "
        "update_parameters, or call step.forward"
    )


def test_query_examples_are_refused_to_a_plugin_that_is_not_transductive():
    for text in (refused, untrained):
        assert text([in_loop(lambda step: step.forward({}, "query"))]) == (
            "plugin 'probe' reads the query examples in the inner loop, but does not say that "
            "results are transductive: give its class the property transductive"
        )


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        (
            lambda p: {"0.wieght": p["0.weight"]},
            "'0.wieght', which is no parameter of it: did you mean '0.weight'?",
        ),
        (
            lambda p: {"0.bias": p["0.bias"][0]},
            "'0.bias' of shape (6,), torch.float64 on cpu, not of shape (2, 6), torch.float64 on "
            "cpu: keep (tasks, *shape), dtype and device",
        ),
        (
            lambda p: {"0.bias": p["0.bias"].float()},
            "'0.bias' of shape (2, 6), torch.float32 on cpu, not of shape (2, 6), torch.float64 "
            "on cpu: keep (tasks, *shape), dtype and device",
        ),
    ],
)
@pytest.mark.parametrize("method", ["forward", "objective"])
def test_a_pass_with_other_values_than_the_steps_is_refused(values, fault, method):
    ours = in_loop(lambda step: getattr(step, method)(values(step.parameters)))
    assert refused([ours]) == f"plugin 'probe' gives a forward pass {fault}"


def test_losses_whose_graph_is_gone_are_refused():
    ours = in_loop(lambda step: step.gradients(step.losses, {"0.bias": step.parameters["0.bias"]}))
    assert refused(["derivative-order", ours]) == (
        "plugin 'probe' differentiates losses whose graph is gone, as that of step.losses is in a "
        "step of first order once gradients are taken: make new ones by "
        "step.forward(step.parameters)"
    )


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        (
            lambda p: {"0.wieght": p["0.weight"]},
            "'0.wieght', which is no parameter of the model: did you mean '0.weight'?",
        ),
        (
            lambda p: {"0.bias": p["0.bias"].expand(2, 6)},
            "'0.bias' of shape (2, 6), torch.float64 on cpu, not of shape (6,), torch.float64 on "
            "cpu: give it without a task axis",
        ),
    ],
)
def test_an_outer_loss_from_other_forms_is_refused(values, fault):
    def compute_meta_gradients(self, outcome):
        outcome.outer_loss(values(outcome.model_parameters))

    ours = plugin(compute_meta_gradients=compute_meta_gradients)
    assert refused([ours]) == f"an outer loss is asked for at {fault}"


# What is refused: answers.


def test_an_update_beside_another_inner_optimizer_is_refused():
    def update_parameters(self, parameters):
        return parameters

    momentum = {"inner_optimizer": "sgd", "inner_optimizer_settings": {"momentum": 0.9}}
    for name, settings in (("sgd", momentum), ("adam", {"inner_optimizer": "adam"})):
        ours = plugin(update_parameters=update_parameters)
        assert refused([ours], **settings) == (
            "plugin 'probe' makes the inner update itself, so the inner optimizer "
            f"'{name}' and its settings would do nothing: leave them out"
        )


def test_two_updates_are_refused():
    def update_parameters(self, parameters):
        return parameters

    two = [plugin(kind, update_parameters=update_parameters) for kind in ("One", "Other")]
    assert refused(two) == (
        "plugins 'one' and 'other' both answer update_parameters, which only one may: leave one "
        "of them out"
    )


def test_order_zero_is_refused_without_a_plugin_that_makes_meta_gradients():
    def derivative_order(self):
        return 0

    assert refused([plugin(derivative_order=derivative_order)], kind=RunError) == (
        "derivative order 0 leaves no way from the outer loss to what tasks start from, so it "
        "would never learn: add a plugin that makes meta-gradients itself, such as reptile or "
        "imaml, or use order 1 or 2"
    )


def values_of(hook, change):
    """A plugin whose `hook` answers what `change` makes of the parameters."""
    scope = {"change": change}
    exec(f"def {hook}(self, parameters): return change(parameters)", scope)
    return plugin(**{hook: scope[hook]})


@pytest.mark.parametrize("hook", ["initialize_parameters", "update_parameters"])
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda p: 3, "returned int, not a mapping from names to tensors"),
        (
            lambda p: {name: value for name, value in p.items() if name != "0.bias"},
            "returned other names than it was given: missing '0.bias', not known none",
        ),
        (
            lambda p: {**p, "0.bias": p["0.bias"].sum(0)},
            "returned shape (6,), torch.float64 on cpu; it was given shape (2, 6), torch.float64 "
            "on cpu, which it must keep (for '0.bias')",
        ),
        (
            lambda p: {**p, "0.bias": p["0.bias"].float()},
            "returned shape (2, 6), torch.float32 on cpu; it was given shape (2, 6), torch.float64 "
            "on cpu, which it must keep (for '0.bias')",
        ),
    ],
)
def test_starts_and_updates_keep_names_shapes_and_dtypes(hook, change, fault):
    assert refused([values_of(hook, change)], kind=RunError) == (
        f"plugin 'probe' in {hook} (link 1 of 1, iteration 1, inner step 0) {fault}"
    )


def of_start(make):
    """A plugin whose task parameters are what `make(plugin, context)` gives."""

    def setup(self, context):
        self.shift = nn.Parameter(torch.zeros(3, dtype=context.dtype))

    def task_parameters(self, context):
        return make(self, context)

    return plugin(setup=setup, task_parameters=task_parameters)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda own, _: [own.shift], "answered list, not a mapping from names to tensors"),
        (lambda own, _: {"shift": 0.0}, "answered 'shift': float, not a tensor by name"),
        (
            lambda own, _: {"code": torch.zeros(3)},
            "answered 'code' of shape (3,), torch.float32 on cpu; make it torch.float64 on cpu, by "
            "context.dtype and device",
        ),
        (
            lambda own, _: {"code": own.shift},
            "answered 'code', a parameter that the plugin does not have by this name: call it "
            "'shift'",
        ),
        (
            lambda own, context: {"code": nn.Parameter(torch.zeros(3, dtype=context.dtype))},
            "answered 'code', a parameter that the plugin does not have by this name: register it "
            "with the plugin in setup",
        ),
        (
            lambda own, _: {"code": own.shift * 2},
            "answered 'code', which requires a gradient but is no nn.Parameter: nothing learns it",
        ),
    ],
)
def test_task_parameters_are_tensors_under_the_names_by_which_they_learn(make, fault):
    with pytest.raises(RunError) as error:
        problem().learner(plugins=[of_start(make)])
    text = f"plugin 'probe' in task_parameters (link 1 of 1) {fault}"
    assert str(error.value) == text


# Names.


class Named(nn.Module):
    """A model with a module called as the plugin."""

    def __init__(self):
        super().__init__()
        self.probe = nn.Linear(4, 3)
        self.probe.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.probe(x) * self.probe.scale


@pytest.mark.parametrize("frozen", [False, True])
def test_a_parameter_of_a_plugin_under_a_name_of_the_models_is_refused(frozen):
    def setup(self, context):
        self.scale = nn.Parameter(torch.zeros((), dtype=context.dtype))

    case = problem()
    case.model = Named().double()
    case.model.probe.scale.requires_grad_(not frozen)
    with pytest.raises(RequestError) as error:
        case.learner(plugins=[plugin(setup=setup)])
    assert str(error.value) == (
        "plugin 'probe' has a parameter 'probe.scale', and so has the model: give the plugin "
        "another name, by name='...'"
    )


def test_a_task_parameter_under_a_name_of_the_models_is_refused():
    case = problem()
    case.model = Named().double()
    start = of_start(lambda own, context: {"bias": torch.zeros(3, dtype=context.dtype)})
    with pytest.raises(RunError) as error:
        case.learner(plugins=[start])
    assert str(error.value) == (
        "plugin 'probe' in task_parameters (link 1 of 1) answered 'bias', but 'probe.bias' is a "
        "parameter of the model: rename one"
    )


class Penalty(Plugin):
    """The squared length of the support gradient as a regulariser: a third derivative."""

    @hookimpl
    def transform_inner_losses(self, losses, step):
        gradients = step.gradients(losses, dict(step.parameters))
        return losses + 0.1 * sum(each.square().flatten(1).sum(1) for each in gradients.values())


def test_a_third_derivative_through_layer_norm_is_refused():
    """torch's is not that of central differences, and says nothing."""
    case = problem("layer-norm", steps=2)
    assert refused([Penalty()], case=case) == (
        "plugin 'penalty' takes a gradient in transform_inner_losses, so that the meta-gradient is "
        "of third order, which torch gets wrong for layer norm: add the gradient of the term in "
        "transform_gradients, or use the plugin derivative-order"
    )
    first = case.learner(plugins=[Penalty(), "derivative-order"])
    first.meta_gradients(case.batch)
    problem("mlp").learner(plugins=[Penalty()]).meta_gradients(problem("mlp").batch)
