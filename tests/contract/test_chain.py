"""The chain: its order is the list, and every fault names plugin, hook, link and step."""

import math
import re
from typing import ClassVar

import pytest
import torch
from metaplug_plugins.derivative_order import DerivativeOrder
from metaplug_plugins.gradient_clipping import GradientClipping
from metaplug_plugins.gradient_sharing import GradientSharing
from support.plugins import placeless
from torch import nn

import metaplug
from metaplug import MetaLearner, Plugin, RequestError, RunError, TaskBatch, hookimpl
from metaplug.contract import hookspecs
from metaplug.contract.chain import Chain
from metaplug.contract.hookspecs import KINDS
from metaplug.testing import Stream, adapted, assert_close, found, problem


def refused(plugins, error=RequestError):
    """The error of a learner with these plugins when made, or in its first iteration."""
    with pytest.raises(error) as caught:
        problem().learner(plugins=plugins).fit(Stream(), iterations=1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Log(Plugin):
    """Writes every hook that is called into one list."""

    calls: ClassVar[list] = []

    def note(self, hook):
        self.calls.append((self.name, hook))

    @hookimpl
    def select_adapted(self):
        self.note("select_adapted")

    @hookimpl
    def setup(self):
        self.note("setup")

    @hookimpl
    def task_parameters(self):
        self.note("task_parameters")

    @hookimpl
    def transform_tasks(self):
        self.note("transform_tasks")

    @hookimpl
    def initialize_parameters(self):
        self.note("initialize_parameters")

    @hookimpl
    def transform_parameters(self):
        self.note("transform_parameters")

    @hookimpl
    def transform_inner_losses(self):
        self.note("transform_inner_losses")

    @hookimpl
    def derivative_order(self):
        self.note("derivative_order")

    @hookimpl
    def transform_gradients(self, step):
        step.keep("seen", torch.ones(()))
        self.note("transform_gradients")

    @hookimpl
    def transform_learning_rates(self):
        self.note("transform_learning_rates")

    @hookimpl
    def update_parameters(self):
        self.note("update_parameters")

    @hookimpl
    def outer_step_weights(self):
        self.note("outer_step_weights")

    @hookimpl
    def transform_outer_losses(self):
        self.note("transform_outer_losses")

    @hookimpl
    def compute_meta_gradients(self):
        self.note("compute_meta_gradients")

    @hookimpl
    def transform_meta_gradients(self):
        self.note("transform_meta_gradients")

    @hookimpl
    def scale_meta_learning_rate(self):
        self.note("scale_meta_learning_rate")

    @hookimpl
    def commit(self):
        self.note("commit")

    @hookimpl
    def end_meta_step(self):
        self.note("end_meta_step")


# Order.


def test_hooks_are_called_in_the_documented_order_and_plugins_in_the_order_of_the_list():
    names = ("third", "first", "second")
    Log.calls.clear()
    learner = problem(steps=1).learner(plugins=[Log(name=name) for name in names])
    # A plugin's task parameters come right after its setup, so that the next one finds them.
    made = [(name, hook) for name in names for hook in ("setup", "task_parameters")]
    assert Log.calls == [*((name, "select_adapted") for name in names), *made]
    Log.calls.clear()
    learner.fit(Stream(), iterations=1)
    hooks = (
        "transform_tasks",
        "outer_step_weights",
        "derivative_order",
        "initialize_parameters",
        "transform_parameters",
        "transform_inner_losses",
        "transform_gradients",
        "transform_learning_rates",
        "update_parameters",
        "transform_parameters",
        "transform_outer_losses",
        "compute_meta_gradients",
        "transform_meta_gradients",
        "scale_meta_learning_rate",
        "commit",
        "end_meta_step",
    )
    assert Log.calls == [(name, hook) for hook in hooks for name in names]


def test_evaluation_asks_only_for_what_belongs_to_the_inner_loop():
    learner = problem(steps=1).learner(plugins=[Log()])
    learner.meta_gradients(problem().batch)
    Log.calls.clear()
    learner.evaluate(Stream(), num_tasks=1)
    inside = [
        "initialize_parameters",
        "transform_parameters",
        "transform_inner_losses",
        "transform_gradients",
        "transform_learning_rates",
        "update_parameters",
        "transform_parameters",
    ]
    assert [hook for _, hook in Log.calls] == inside


def test_order_names_the_plugins_of_every_hook():
    chain = Chain(
        [
            GradientClipping(max_norm=1.0),
            GradientSharing(),
            GradientClipping(name="outer", max_meta_norm=1.0),
            DerivativeOrder(),
        ]
    )
    order = chain.order()
    assert order["transform_gradients"] == ("gradient-clipping", "gradient-sharing", "outer")
    assert order["transform_meta_gradients"] == ("gradient-clipping", "outer")
    assert order["derivative_order"] == ("derivative-order",)
    assert "transform_tasks" not in order


def test_none_means_unchanged_and_the_first_of_a_fold_gets_the_engines_value():
    class Scale(Plugin):
        class Config(Plugin.Config):
            factor: float

        @hookimpl
        def scale_meta_learning_rate(self, factor, iteration, total):
            self.given = factor, iteration, total
            return None if self.config.factor == 0 else factor * self.config.factor

    plugins = [Scale(name="a", factor=2), Scale(name="b", factor=0), Scale(name="c", factor=3)]
    assert Chain(plugins).fold("scale_meta_learning_rate", 1.0, iteration=4, total=9) == 6
    assert [plugin.given for plugin in plugins] == [(1.0, 4, 9), (2.0, 4, 9), (2.0, 4, 9)]


# What is refused when a chain is made.


def test_an_unmarked_hook_is_refused():
    class Forgetful(Plugin):
        def transform_gradients(self, gradients):
            return gradients

    class Classy(Plugin):
        @classmethod
        def commit(cls, kept):
            pass

    text = (
        "plugin '{}': method {} overrides a hook but is not marked: put @hookimpl above it, "
        "or rename it"
    )
    assert refused([Forgetful()]) == text.format("forgetful", "transform_gradients")
    assert refused([Classy()]) == text.format("classy", "commit")


def test_a_misspelt_hook_is_refused_with_the_nearest_name():
    class Misspelt(Plugin):
        @hookimpl
        def transform_gradient(self, gradients):
            return gradients

    expected = (
        "plugin 'misspelt': method transform_gradient is marked @hookimpl, but metaplug "
        f"{metaplug.__version__} has no hook "
        "'transform_gradient' (did you mean 'transform_gradients'?): rename it, or install a "
        "newer metaplug, which may have it"
    )
    assert refused([Misspelt()]) == expected


def test_a_default_argument_is_refused():
    class Default(Plugin):
        @hookimpl
        def transform_gradients(self, gradients, step=None):
            return gradients

    expected = (
        "plugin 'default': method transform_gradients gives an argument a default, so that the "
        "hook would never fill it: "
        "take the default out"
    )
    assert refused([Default()]) == expected


def test_an_unknown_argument_is_refused():
    class Unknown(Plugin):
        @hookimpl
        def transform_gradients(self, grads):
            return grads

    expected = (
        "plugin 'unknown': method transform_gradients asks for 'grads', which "
        "transform_gradients does not have in metaplug "
        f"{metaplug.__version__} (did you mean 'gradients'?): rename it, or install a newer "
        "metaplug, which may have it"
    )
    assert refused([Unknown()]) == expected


@pytest.mark.parametrize("place", ["tryfirst", "trylast", "wrapper", "hookwrapper"])
def test_a_place_of_ones_own_is_refused(place):
    class Pushy(Plugin):
        @hookimpl(**{place: True})
        def transform_gradients(self, gradients):
            yield

    expected = (
        "plugin 'pushy': method transform_gradients asks for a place of its own: the order is "
        "the configured list; "
        "take tryfirst, trylast and wrapper out"
    )
    assert refused([Pushy()]) == expected


class First(Plugin):
    pass


class After(Plugin):
    runs_after = ("first",)


class Rival(Plugin):
    conflicts_with = ("first",)


def test_the_list_is_checked_and_never_reordered():
    assert (
        refused([First(), First()])
        == "plugin 'first' stands twice in the list: give one of them a name of its own, or "
        "leave it out"
    )
    assert (
        refused([After(), First()])
        == "plugin 'after' must run after 'first': move it after that in the list of plugins"
    )
    assert (
        refused([After(), First(name="other")])
        == "plugin 'after' must run after 'first': move it after that in the list of plugins"
    )
    for rivals in ([First(), Rival()], [Rival(), First()]):
        assert refused(rivals) == "plugin 'rival' conflicts with 'first': leave one of them out"
    assert (
        refused([First(), After(), First(name="again")])
        == "plugin 'after' must run after 'first': move it after that in the list of plugins"
    )
    assert [plugin.name for plugin in Chain([First(), First(name="again"), After()]).plugins] == [
        "first",
        "again",
        "after",
    ]
    assert Chain([After()]).order() == {}


def test_what_is_no_plugin_is_refused():
    expected = (
        "Linear(in_features=1, out_features=1, bias=True) is not a plugin: give its name, an "
        "instance of a subclass of metaplug.Plugin, "
        "or a function named as a hook"
    )
    assert refused([nn.Linear(1, 1)]) == expected
    assert (
        refused(["gradient-shering"])
        == "unknown plugin 'gradient-shering': did you mean 'gradient-sharing'?"
    )


def test_a_plugin_is_final_and_well_named():
    with pytest.raises(TypeError) as error:
        type("Second", (First,), {})
    assert (
        str(error.value)
        == "Second extends the plugin First: a plugin is final; subclass metaplug.Plugin instead"
    )
    with pytest.raises(RequestError) as error:
        First(name="My Plugin")
    assert (
        str(error.value)
        == "'My Plugin' cannot name a plugin: use lower-case letters, digits and single "
        "hyphens, as in 'my-plugin'"
    )
    assert [
        type(name, (Plugin,), {}).kind()
        for name in ("MetaSGD", "Anil", "PerStepBatchNorm", "L2Penalty")
    ] == ["meta-sgd", "anil", "per-step-batch-norm", "l2-penalty"]


def test_one_instance_serves_one_learner():
    sharing = GradientSharing()
    problem().learner(plugins=[sharing])
    expected = (
        "plugin 'gradient-sharing' already belongs to another learner: make a new "
        "instance for each learner"
    )
    assert refused([sharing]) == expected


# What a link may return.


def link(hook, answer):
    """A plugin whose one hook answers what the function `answer` makes of the hook's own value."""
    first = {
        "derivative_order": "step",
        "outer_step_weights": "inner_steps",
        "compute_meta_gradients": "outcome",
        "end_meta_step": None,
    }
    value = first.get(
        hook,
        {
            "transform_tasks": "batch",
            "scale_meta_learning_rate": "factor",
            "select_adapted": "names",
        }.get(hook, ""),
    )
    if value == "":
        value = {
            "transform_parameters": "parameters",
            "transform_learning_rates": "learning_rates",
            "transform_inner_losses": "losses",
            "transform_outer_losses": "losses",
        }.get(hook, "gradients")
    scope = {"answer": answer}
    arguments = f"self, {value}" if value else "self"
    exec(f"def {hook}({arguments}): return answer({value or ''})", scope)
    return type("Bad", (Plugin,), {hook: hookimpl(scope[hook])})()


def changed(name, change):
    return lambda values: {**values, name: change(values[name])}


def soft(labels):
    return nn.functional.one_hot(labels, 3).float()


FAULTS = [
    ("transform_gradients", lambda g: 3, "returned int, not a mapping from names to tensors"),
    (
        "transform_gradients",
        lambda g: {"0.wieght": g["0.weight"], **{n: v for n, v in g.items() if n != "0.weight"}},
        "returned other names than it was given: missing '0.weight', not known '0.wieght'",
    ),
    (
        "transform_gradients",
        changed("0.bias", lambda g: g.mean(0)),
        "returned shape (6,), torch.float64 on cpu; it was given shape (1, 6), torch.float64 on "
        "cpu, which it must keep (for '0.bias')",
    ),
    (
        "transform_gradients",
        changed("0.bias", lambda g: g.float()),
        "returned shape (1, 6), torch.float32 on cpu; it was given shape (1, 6), torch.float64 "
        "on cpu, which it must keep (for '0.bias')",
    ),
    (
        "transform_parameters",
        changed("0.bias", lambda g: g.to("meta")),
        "returned shape (1, 6), torch.float64 on meta; it was given shape (1, 6), torch.float64 "
        "on cpu, which it must keep (for '0.bias')",
    ),
    (
        "transform_parameters",
        changed("0.bias", lambda g: 1.0),
        "returned float, not a tensor (for '0.bias')",
    ),
    (
        "transform_inner_losses",
        lambda losses: losses.mean(),
        "returned shape (), torch.float64 on cpu; it was given shape (1,), torch.float64 on "
        "cpu, which it must keep",
    ),
    ("transform_inner_losses", lambda losses: 0.5, "returned float, not a tensor"),
    (
        "transform_learning_rates",
        changed("0.bias", lambda r: 0.1),
        "returned float for '0.bias', not a tensor of torch.float64 on cpu",
    ),
    (
        "transform_learning_rates",
        changed("0.bias", lambda r: r.float()),
        "returned shape (), torch.float32 on cpu for '0.bias', not a tensor of torch.float64 on "
        "cpu",
    ),
    (
        "transform_learning_rates",
        changed("0.bias", lambda r: r.expand(5)),
        "returned shape (5,) for '0.bias', which does not broadcast to (tasks, *shape) = (1, 6)",
    ),
    (
        "transform_learning_rates",
        changed("0.bias", lambda r: r.expand(1, 1, 6)),
        "returned shape (1, 1, 6) for '0.bias', which does not broadcast to (tasks, *shape) = "
        "(1, 6)",
    ),
    ("transform_tasks", lambda batch: batch.support_x, "returned Tensor, not a TaskBatch"),
    (
        "transform_tasks",
        lambda batch: TaskBatch(
            batch.support_x.float(), batch.support_y, batch.query_x.float(), batch.query_y
        ),
        "returned a batch whose support_x is torch.float32 on cpu; it must be torch.float64 on cpu",
    ),
    (
        "transform_tasks",
        lambda batch: batch.to("meta"),
        "returned a batch whose support_x is torch.float64 on meta; it must be torch.float64 on "
        "cpu",
    ),
    (
        "transform_tasks",
        lambda batch: TaskBatch(
            batch.support_x, batch.support_y.int(), batch.query_x, batch.query_y
        ),
        "returned a batch whose support_y is torch.int32 on cpu; it must be torch.int64 on cpu",
    ),
    (
        "transform_tasks",
        lambda batch: TaskBatch(
            batch.support_x, soft(batch.support_y), batch.query_x, soft(batch.query_y)
        ),
        "returned a batch whose support_y is torch.float32 on cpu; it must be torch.float64 on cpu",
    ),
    ("derivative_order", lambda step: 3, "answered 3: the derivative order is 0, 1 or 2"),
    (
        "outer_step_weights",
        lambda steps: [1.0],
        "answered [1.0]: give 2 finite weights, one for each inner step, not all of them 0",
    ),
    (
        "outer_step_weights",
        lambda steps: [0, 0],
        "answered [0, 0]: give 2 finite weights, one for each inner step, not all of them 0",
    ),
    (
        "outer_step_weights",
        lambda steps: [1, math.nan],
        "answered [1, nan]: give 2 finite weights, one for each inner step, not all of them 0",
    ),
    (
        "outer_step_weights",
        lambda steps: 1.0,
        "answered 1.0: give 2 finite weights, one for each inner step, not all of them 0",
    ),
    ("transform_outer_losses", lambda losses: losses.sum().item(), "returned float, not a tensor"),
    (
        "transform_meta_gradients",
        changed("0.bias", lambda g: g[:1]),
        "returned shape (1,), torch.float64 on cpu; it was given shape (6,), torch.float64 on "
        "cpu, which it must keep (for '0.bias')",
    ),
    (
        "scale_meta_learning_rate",
        lambda factor: -0.5,
        "returned -0.5, not a finite factor of at least 0",
    ),
    (
        "scale_meta_learning_rate",
        lambda factor: math.inf,
        "returned inf, not a finite factor of at least 0",
    ),
    (
        "select_adapted",
        lambda names: ["0.wieght"],
        "selects '0.wieght', not among what it was given: did you mean '0.weight'?",
    ),
    ("select_adapted", lambda names: "0.weight", "returned '0.weight', not a tuple of names"),
    ("select_adapted", lambda names: 7, "returned 7, not a tuple of names"),
    ("end_meta_step", lambda: 0.5, "returned 0.5, not numbers by name"),
    ("end_meta_step", lambda: {"gate": "open"}, "returned {'gate': 'open'}, not numbers by name"),
]


@pytest.mark.parametrize(("hook", "answer", "fault"), FAULTS)
def test_a_wrong_answer_names_plugin_hook_link_and_step(hook, answer, fault):
    class Quiet(Plugin):
        pass

    with pytest.raises(RunError) as error:
        problem().learner(plugins=[Quiet(), link(hook, answer)]).fit(
            Stream(), iterations=1, tasks_per_batch=1
        )
    inside = ", iteration 1, inner step 0"
    at = {
        "transform_tasks": ", iteration 1",
        "outer_step_weights": ", iteration 1",
        "transform_meta_gradients": ", iteration 1",
        "scale_meta_learning_rate": ", iteration 1",
        "transform_outer_losses": ", iteration 1",
        "select_adapted": "",
        "end_meta_step": ", iteration 1",
    }.get(hook, inside)
    assert str(error.value) == f"plugin 'bad' in {hook} (link 1 of 1{at}) {fault}"


def test_an_exception_inside_a_plugin_names_the_place_and_keeps_the_cause():
    class Fine(Plugin):
        @hookimpl
        def transform_gradients(self):
            return None

    class Later(Plugin):
        @hookimpl
        def transform_gradients(self, gradients, step):
            return gradients if step.meta_iteration < 2 or step.index < 1 else {}[step.index]

    learner = problem(steps=3).learner(plugins=[Fine(), Later()])
    learner.fit(Stream(), iterations=2)
    weights = [parameter.detach().clone() for parameter in learner.model.parameters()]
    with pytest.raises(RunError) as error:
        learner.fit(Stream(), iterations=1)
    assert (
        placeless(error.value)
        == "plugin 'later' in transform_gradients (link 2 of 2, iteration 3, inner step 1) "
        "failed: KeyError: 1"
    )
    assert isinstance(error.value.__cause__, KeyError)
    assert all(torch.equal(*pair) for pair in zip(weights, learner.model.parameters(), strict=True))


PLACES = {
    "select_adapted": "",
    "setup": "",
    "task_parameters": "",
    "transform_tasks": ", iteration 2",
    "initialize_parameters": ", iteration 2, inner step 0",
    "outer_step_weights": ", iteration 2",
    "transform_parameters": ", iteration 2, inner step 0",
    "transform_inner_losses": ", iteration 2, inner step 0",
    "derivative_order": ", iteration 2, inner step 0",
    "transform_gradients": ", iteration 2, inner step 0",
    "transform_learning_rates": ", iteration 2, inner step 0",
    "update_parameters": ", iteration 2, inner step 0",
    "transform_outer_losses": ", iteration 2",
    "compute_meta_gradients": ", iteration 2",
    "transform_meta_gradients": ", iteration 2",
    "scale_meta_learning_rate": ", iteration 2",
    "commit": ", iteration 2",
    "end_meta_step": ", iteration 2",
}


@pytest.mark.parametrize("hook", KINDS)
def test_an_exception_in_any_hook_names_its_place(hook):
    def keep(self, step):
        step.keep("seen", torch.ones(()))

    def fail(self):
        if self.broken:
            raise KeyError("lost")

    frail = type(
        "Frail",
        (Plugin,),
        {"broken": not PLACES[hook], "transform_gradients": hookimpl(keep), hook: hookimpl(fail)},
    )()
    with pytest.raises(RunError) as error:
        learner = problem().learner(plugins=[Log(), frail])
        learner.fit(Stream(), iterations=1)
        frail.broken = True
        learner.fit(Stream(), iterations=1)
    assert (
        placeless(error.value)
        == f"plugin 'frail' in {hook} (link 2 of 2{PLACES[hook]}) failed: KeyError: 'lost'"
    )
    assert isinstance(error.value.__cause__, KeyError)


def test_two_answers_to_one_question_are_refused():
    class Order(Plugin):
        @hookimpl
        def derivative_order(self):
            return 1

    expected = (
        "plugins 'one' and 'two' both answer derivative_order, which only one may: leave "
        "one of them out"
    )
    assert refused([Order(name="one"), Order(name="two")]) == expected


def test_none_is_no_answer():
    class Shy(Plugin):
        @hookimpl
        def derivative_order(self):
            return None

    class Order(Plugin):
        @hookimpl
        def derivative_order(self):
            return 1

    assert (
        Chain([Shy(), Order(), Shy(name="shy-too")]).choose("derivative_order", 2, step=_step())
        == 1
    )
    assert Chain([Shy()]).choose("derivative_order", 2, step=_step()) == 2


def _step():
    steps = []

    class Catch(Plugin):
        @hookimpl
        def transform_gradients(self, step):
            steps.append(step)

    problem(steps=1).learner(plugins=[Catch()]).meta_gradients(problem().batch)
    return steps[0]


def test_coupling_tasks_must_be_declared():
    class Sly(Plugin):
        @hookimpl
        def transform_inner_losses(self, losses, step):
            return step.task_mean(losses).expand_as(losses)

    expected = (
        "plugin 'sly' takes a mean over tasks but does not say so: set couples_tasks = "
        "True on its class, or in its module"
    )
    assert refused([Sly()]) == expected


def test_losses_are_not_known_before_the_forward_pass():
    class Early(Plugin):
        @hookimpl
        def transform_parameters(self, step):
            return step.losses

    expected = (
        "plugin 'early' asks for this step's losses before the forward pass that makes them: use "
        "them in transform_inner_losses, transform_gradients, transform_learning_rates or "
        "update_parameters, or call step.forward"
    )
    assert refused([Early()]) == expected


def test_values_per_step_need_a_step():
    learner = problem(steps=0).learner(plugins=[GradientSharing()])
    learner.evaluate(Stream(), num_tasks=1)
    with (
        pytest.warns(UserWarning, match="adapting for 1 inner steps, trained with 0"),
        pytest.raises(RequestError) as error,
    ):
        learner.evaluate(Stream(), num_tasks=1, inner_steps=1)
    assert str(error.value) == (
        "plugin 'gradient-sharing' keeps a value for each inner step, but the model is trained "
        "with none: "
        "train with inner_steps of at least 1, or leave the plugin out"
    )


# What a plugin is given.


class Vandal(Plugin):
    """Tries to write into whatever mapping it is given."""

    class Config(Plugin.Config):
        hook: str

    def _write(self, hook, values):
        if self.config.hook == hook:
            values["0.bias"] = values["0.bias"] * 0

    @hookimpl
    def transform_parameters(self, parameters, step):
        self._write("parameters", parameters)
        self._write("step.parameters", step.parameters)
        self._write("step.initial_parameters", step.initial_parameters)

    @hookimpl
    def transform_gradients(self, gradients):
        self._write("gradients", gradients)

    @hookimpl
    def transform_learning_rates(self, learning_rates):
        self._write("learning_rates", learning_rates)

    @hookimpl
    def transform_meta_gradients(self, gradients):
        self._write("meta_gradients", gradients)

    @hookimpl
    def transform_outer_losses(self, outcome):
        self._write("adapted", outcome.adapted_parameters)


@pytest.mark.parametrize(
    "hook",
    [
        "parameters",
        "step.parameters",
        "step.initial_parameters",
        "gradients",
        "learning_rates",
        "meta_gradients",
        "adapted",
    ],
)
def test_mappings_are_read_only(hook):
    class Copy(Plugin):
        """A link before, which returns an ordinary dict."""

        @hookimpl
        def transform_gradients(self, gradients):
            return dict(gradients)

    text = refused([Copy(), Vandal(hook=hook)], RunError)
    assert re.search(
        r"failed at test_chain\.py:\d+: TypeError: 'mappingproxy' object does not support item "
        r"assignment$",
        text,
    )


def test_a_step_says_where_it_is():
    seen = []

    class Look(Plugin):
        @hookimpl
        def transform_gradients(self, gradients, step):
            seen.append(
                (
                    step.index,
                    step.slot,
                    step.count,
                    step.trained_steps,
                    step.meta_iteration,
                    step.training,
                    step.losses.shape,
                )
            )

    learner = problem(steps=2).learner(plugins=[Look()])
    learner.fit(Stream(), iterations=2, tasks_per_batch=3)
    expected = [(k, k, 2, 2, iteration, True, (3,)) for iteration in range(2) for k in range(2)]
    assert seen == expected
    seen.clear()
    with pytest.warns(
        UserWarning,
        match="adapting for 4 inner steps, trained with 2: later steps use the last step's values",
    ):
        learner.evaluate(Stream(), num_tasks=1, inner_steps=4)
    assert seen == [(k, min(k, 1), 4, 2, 2, False, (1,)) for k in range(4)]


def test_setup_knows_the_run():
    class Look(Plugin):
        @hookimpl
        def select_adapted(self, names):
            return reversed_except_first(names)

        @hookimpl
        def setup(self, context):
            self.context = context

    def reversed_except_first(names):
        return tuple(reversed(names[1:]))

    case = problem()
    case.model[0].bias.requires_grad_(False)
    look = Look()
    case.learner(plugins=[look], kind="classification")
    context = look.context
    assert dict(context.shapes) == {"0.weight": (6, 4), "2.weight": (3, 6), "2.bias": (3,)}
    assert context.adapted == ("2.weight", "2.bias")
    assert (
        context.dtype,
        str(context.device),
        context.inner_steps,
        context.inner_lr,
        context.kind,
    ) == (torch.float64, "cpu", 2, 0.3, "classification")


# Keep and commit.


class Count(Plugin):
    """Counts commits, and keeps the sum of the losses of every step."""

    @hookimpl
    def setup(self, context):
        self.register_buffer("commits", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sums", torch.zeros(context.inner_steps, dtype=context.dtype))

    @hookimpl
    def transform_gradients(self, step):
        step.keep(f"{step.slot}", step.losses.sum())

    @hookimpl
    def commit(self, kept):
        assert not any(tensor.requires_grad for tensor in kept.values())
        self.commits += 1
        for slot, value in kept.items():
            self.sums[int(slot)] = value


def test_statistics_are_committed_after_a_meta_update_and_only_then():
    case, count = problem(), Count()
    learner = case.learner(plugins=[count])
    learner.meta_gradients(case.batch)
    learner.evaluate(Stream(), num_tasks=3)
    assert (int(count.commits), count.sums.tolist()) == (0, [0, 0])
    support_losses = found(learner, Stream().batch(0, range(3))).outcome.support_losses
    learner.fit(Stream(), iterations=1, tasks_per_batch=3)
    assert int(count.commits) == 1
    assert_close(count.sums, torch.stack([losses.detach().sum() for losses in support_losses]))
    learner.evaluate(Stream(), num_tasks=3)
    assert int(count.commits) == 1


def test_a_failed_update_commits_nothing():
    class Fail(Plugin):
        @hookimpl
        def transform_meta_gradients(self, gradients, iteration):
            return {name: gradient * math.nan for name, gradient in gradients.items()}

    count = Count()
    learner = problem().learner(plugins=[count, Fail()])
    with pytest.raises(RunError):
        learner.fit(Stream(), iterations=1)
    assert (int(count.commits), learner.iteration) == (0, 0)


def test_two_instances_keep_apart():
    counts = [Count(name=name) for name in ("one", "two")]
    learner = problem().learner(plugins=counts)
    learner.fit(Stream(), iterations=2)
    assert [int(count.commits) for count in counts] == [2, 2]
    assert {"one.commits", "two.commits"} <= {
        f"{plugin.name}.{name}"
        for plugin in learner.chain.plugins
        for name, _ in plugin.named_buffers()
    }


# 12. Order matters where plugins share a hook, and nowhere else.


class Halve(Plugin):
    """Half the learning rate."""

    @hookimpl
    def transform_learning_rates(self, learning_rates):
        return {name: rate / 2 for name, rate in learning_rates.items()}


class Penalise(Plugin):
    """An outer regulariser with a meta-parameter of its own."""

    @hookimpl
    def setup(self, context):
        self.scale = nn.Parameter(torch.tensor(0.3, dtype=context.dtype))

    @hookimpl
    def transform_outer_losses(self, losses, outcome):
        return losses + self.scale * sum(
            weight.square().flatten(1).sum(1) for weight in outcome.adapted_parameters.values()
        )


def test_plugins_with_disjoint_hooks_commute():
    makers = [
        Halve,
        Penalise,
        lambda: GradientSharing(gate=0.3),
        lambda: GradientClipping(max_meta_norm=0.01),
    ]
    case = problem()
    results = [
        case.learner(plugins=[make() for make in order]).meta_gradients(case.batch)
        for order in (makers, makers[::-1])
    ]
    for name in results[0]:
        # Clipping sums the squares of the meta-gradients in the order of the plugins' parameters.
        assert_close(results[0][name], results[1][name], rtol=1e-12, atol=1e-15)


def test_clipping_and_sharing_do_not_commute_and_equal_hand_computed_values():
    """Two tasks on a plane, g = (3, 4) and (0, −10), rate 1, gate ½, no momentum, bound 1.

    Sharing first: ū = ((0.6, 0.8) + (0, −1)) / 2 = (0.3, −0.1);
    d = g / 2 + ‖g‖ ū / 2 = (2.25, 1.75) and (1.5, −5.5); then clipped.
    Clipping first: g = (0.6, 0.8) and (0, −1); ū as before;
    d = (0.45, 0.35) and (0.15, −0.55), which is shorter than 1.
    """
    batch = TaskBatch(
        torch.zeros(2, 1, 1),
        torch.tensor([[[-3.0, -4.0]], [[0.0, 10.0]]], dtype=torch.float64),
        torch.zeros(2, 1, 1),
        torch.zeros(2, 1, 2, dtype=torch.float64),
    )

    def moved(plugins):
        return -adapted(learner_of(plugins), batch)["weight"]

    def learner_of(plugins):
        return MetaLearner(
            Point(),
            plugins=plugins,
            inner_lr=1.0,
            inner_steps=1,
            kind="regression",
            loss=half_square,
        )

    sharing = {"gate": 0.5, "momentum": 0.0}
    after = torch.tensor([[2.25, 1.75], [1.5, -5.5]], dtype=torch.float64)
    clipped = after / after.norm(dim=1, keepdim=True)
    before = torch.tensor([[0.45, 0.35], [0.15, -0.55]], dtype=torch.float64)
    assert_close(moved([GradientSharing(**sharing)]), after)
    assert_close(moved([GradientSharing(**sharing), GradientClipping(max_norm=1.0)]), clipped)
    assert_close(moved([GradientClipping(max_norm=1.0), GradientSharing(**sharing)]), before)


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        return self.weight.expand(len(x), -1)


def half_square(prediction, target):
    return (prediction - target).square().sum(1).mean() / 2


# Replacing differentiation.


def test_replaced_meta_gradients_are_used_and_checked():
    """Reptile: the direction from the initial to the adapted weights."""

    class Reptile(Plugin):
        @hookimpl
        def compute_meta_gradients(self, outcome):
            pairs = {
                name: (outcome.initial_parameters[name], weight)
                for name, weight in outcome.adapted_parameters.items()
            }
            return {name: (start - end).detach().mean(0) for name, (start, end) in pairs.items()}

    case = problem()
    learner = case.learner(plugins=[Reptile()])
    expected = {
        name: parameter.detach() - adapted(learner, case.batch)[name].mean(0)
        for name, parameter in case.model.named_parameters()
    }
    assert_close(learner.meta_gradients(case.batch), expected)
    text = refused([Reptile(), GradientSharing()], RunError)
    assert text == (
        "plugin 'reptile' in compute_meta_gradients (link 1 of 1, iteration 1) left out a plugin's "
        "parameters ('gradient-sharing.gate', 'gradient-sharing.momentum'), which would then never "
        "learn: answer for them too or, where nothing leads to them, leave their plugin out"
    )
    text = refused(
        [link("compute_meta_gradients", lambda outcome: {"0.wieght": torch.zeros(1)})], RunError
    )
    assert "answered names that are not meta-learned ('0.wieght'): answer by the names of" in text
    text = refused(
        [link("compute_meta_gradients", lambda outcome: {"0.bias": torch.zeros(3)})], RunError
    )
    assert text == (
        "plugin 'bad' in compute_meta_gradients (link 1 of 1, iteration 1) returned shape (3,), "
        "torch.float32 on cpu; "
        "the parameter is shape (6,), torch.float64 on cpu, which it must keep (for '0.bias')"
    )
    text = refused([link("compute_meta_gradients", lambda outcome: [])], RunError)
    assert text.endswith(
        "(link 1 of 1, iteration 1) answered list, not a mapping from names to tensors"
    )


# A contract that grows.


class Old(Plugin):
    """Written for hooks that are deprecated since."""

    @hookimpl
    def transform_gradients(self, gradients, step):
        return None


def line_of_old():
    """Where Python says that the hook begins: at its decorator."""
    return Old.transform_gradients.__code__.co_firstlineno


@pytest.mark.parametrize(
    "what",
    [
        {"warn_on_impl": FutureWarning("gone soon")},
        {"warn_on_impl_args": {"step": FutureWarning("gone soon")}},
    ],
)
def test_a_deprecation_is_reported_at_the_plugins_own_line(what, monkeypatch):
    for key, value in what.items():
        monkeypatch.setitem(hookspecs.transform_gradients.metaplug_spec, key, value)
    with pytest.warns(FutureWarning, match="^gone soon$") as caught:
        problem().learner(plugins=[Old()])
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, line_of_old())]
    problem().learner(plugins=[DerivativeOrder()])


def test_a_new_argument_behind_the_others_changes_nothing_for_an_old_plugin(monkeypatch):
    def transform_gradients(gradients, step, future):
        """As it may become."""

    transform_gradients.metaplug_spec = hookspecs.transform_gradients.metaplug_spec
    monkeypatch.setattr(hookspecs, "transform_gradients", transform_gradients)

    class New(Plugin):
        @hookimpl
        def transform_gradients(self, gradients, future):
            assert future == 3

    chain = Chain([Old(), New()])
    gradients = {"w": torch.ones(1, 2)}
    assert (
        chain.fold("transform_gradients", gradients, step=_step(), future=3)["w"] is gradients["w"]
    )


class Loose(Plugin.Config, extra="ignore"):
    """A Config that would take a misspelt field for nothing."""


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            dict,
            "Mine.Config is no subclass of metaplug.PluginConfig, so that settings would go "
            "unchecked: write class Config(PluginConfig)",
        ),
        (
            Loose,
            "Mine.Config lets unknown fields pass, or its fields be changed, which no run could "
            "tell: "
            "take extra and frozen out of its model_config",
        ),
    ],
)
def test_a_config_that_checks_nothing_is_refused(config, text):
    with pytest.raises(TypeError) as error:
        type("Mine", (Plugin,), {"Config": config})
    assert str(error.value) == text
