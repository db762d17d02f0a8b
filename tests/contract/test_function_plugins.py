"""The shortest forms: a module of hooks or one function is a plugin like any other."""

import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest
import torch
from support.plugins import placeless

from metaplug import MetaLearner, Plugin, PluginUse, RequestError, RunError, hookimpl
from metaplug.contract import registry
from metaplug.contract.chain import Chain
from metaplug.contract.function_plugins import plugin_of
from metaplug.contract.plugin_checks import VERSION, check_plugin, implementations
from metaplug.contract.presets import make_plugins
from metaplug.report.catalogue import entries
from metaplug.testing import Stream, assert_close, problem

MODULE = '''
"""Half of every gradient.

Twice.
"""

from metaplug import hookimpl

conflicts_with = ("meta-curvature",)


@hookimpl
def transform_gradients(gradients):
    return {name: gradient / 2 for name, gradient in gradients.items()}


@hookimpl(specname="end_meta_step")
def figures(iteration):
    return {"iteration": iteration}


def helper():
    pass
'''


def transform_gradients(gradients):
    return {name: gradient / 2 for name, gradient in gradients.items()}


@hookimpl(specname="transform_gradients")
def halve_them(gradients):
    return {name: gradient / 2 for name, gradient in gradients.items()}


class Halve(Plugin):
    """The full form of the same."""

    @hookimpl
    def transform_gradients(self, gradients):
        return {name: gradient / 2 for name, gradient in gradients.items()}


def module_of(source, name="my_package.half_gradients"):
    module = ModuleType(name)
    exec(source, vars(module))
    return module


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that installs a module of this source as the plugin "half-gradients"."""

    def install(source, value="half_gradients", name="half-gradients"):
        (tmp_path / "half_gradients.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "half_gradients", raising=False)
        real, entry = registry.entry_points, EntryPoint(name, value, "metaplug.plugins")
        monkeypatch.setattr(
            registry,
            "entry_points",
            lambda group: [*real(group=group), *([entry] if group == entry.group else [])],
        )

    yield install
    sys.modules.pop("half_gradients", None)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (transform_gradients, "transform-gradients"),
        (halve_them, "halve-them"),
        (
            hookimpl(specname="transform_gradients")(
                lambda gradients: {name: each / 2 for name, each in gradients.items()}
            ),
            "transform-gradients",
        ),
        (module_of(MODULE), "half-gradients"),
    ],
    ids=["function", "marked", "lambda", "module"],
)
def test_it_is_the_plugin_that_its_full_form_is(part, name):
    case = problem()
    learner = case.learner(plugins=[part])
    assert [plugin.name for plugin in learner.chain.plugins] == [name]
    assert learner.chain.order()["transform_gradients"] == (name,)
    assert_close(
        learner.meta_gradients(case.batch),
        case.learner(plugins=[Halve()]).meta_gradients(case.batch),
        rtol=0,
        atol=0,
    )


def test_it_stands_anywhere_in_a_list_and_serves_many_learners():
    case = problem()
    for _ in range(2):
        learner = case.learner(
            preset="fomaml", plugins=["gradient-sharing", halve_them, module_of(MODULE)]
        )
        assert learner.chain.order()["transform_gradients"] == (
            "gradient-sharing",
            "halve-them",
            "half-gradients",
        )
    history = learner.fit(Stream(), iterations=2)
    assert history.records[-1].step.figures["half-gradients.iteration"] == 1


def test_a_module_declares_what_a_class_does():
    plugin = plugin_of(module_of(MODULE))
    assert (plugin.conflicts_with, plugin.couples_tasks, plugin.__doc__) == (
        ("meta-curvature",),
        False,
        "Half of every gradient.\n\nTwice.",
    )
    assert list(implementations(plugin)) == ["transform_gradients", "end_meta_step"]
    with pytest.raises(RequestError) as error:
        problem().learner(plugins=[module_of(MODULE), "meta-curvature"])
    assert (
        str(error.value)
        == "plugin 'half-gradients' conflicts with 'meta-curvature': leave one of them out"
    )

    def sharing(gradients, step):
        return {
            name: step.task_mean(gradient).expand_as(gradient)
            for name, gradient in gradients.items()
        }

    sharing = hookimpl(specname="transform_gradients")(sharing)
    case = problem()
    with pytest.raises(RequestError) as error:
        case.learner(plugins=[sharing]).meta_gradients(case.batch)
    assert str(error.value) == (
        "plugin 'sharing' takes a mean over tasks but does not say so: set couples_tasks = True "
        "on its class, or in its module"
    )
    sharing.couples_tasks = True
    case.learner(plugins=[sharing]).meta_gradients(case.batch)


def test_a_fault_names_it_as_any_other():
    @hookimpl(specname="transform_gradients")
    def broken(gradients, step):
        return {}[step.index]

    with pytest.raises(RunError) as error:
        problem().learner(plugins=[halve_them, broken]).fit(Stream(), iterations=1)
    assert (
        placeless(error.value)
        == "plugin 'broken' in transform_gradients (link 2 of 2, iteration 1, inner step 0) "
        "failed: KeyError: 0"
    )
    assert isinstance(error.value.__cause__, KeyError)


def refused(part):
    with pytest.raises(RequestError) as error:
        Chain(make_plugins(None, [part]))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_function_that_is_no_hook_is_refused_with_the_nearest():
    def transform_gradient(gradients):
        return gradients

    assert refused(transform_gradient) == (
        "the function transform_gradient is no plugin, as no hook has its name (did you mean "
        "'transform_gradients'?): "
        "name it as a hook, or mark it @hookimpl(specname=HOOK)"
    )
    hookimpl(transform_gradient)
    assert refused(transform_gradient) == (
        "plugin 'transform-gradient': function transform_gradient is marked @hookimpl, but "
        f"metaplug {VERSION} has no hook "
        "'transform_gradient' (did you mean 'transform_gradients'?): rename it, or install a "
        "newer metaplug, which may have it"
    )


def test_arguments_are_those_of_the_hook():
    def transform_gradients(grads):
        return grads

    assert refused(transform_gradients) == (
        "plugin 'transform-gradients': function transform_gradients asks for 'grads', which "
        "transform_gradients does not have in metaplug "
        f"{VERSION} (did you mean 'gradients'?): rename it, or install a newer metaplug, which "
        "may have it"
    )


@pytest.mark.parametrize("hook", ["setup", "commit"])
def test_there_is_no_place_for_state(hook):
    scope = {}
    exec(f"def {hook}(): pass", scope)
    expected = (
        "plugin '{0}': function {0} is for meta-parameters and statistics, for which a "
        "{1} has no place: "
    )
    expected += "write a subclass of metaplug.Plugin"
    assert refused(scope[hook]) == expected.format(hook, "function")
    module = module_of(f"from metaplug import hookimpl\n@hookimpl\ndef {hook}(): pass\n", hook)
    assert refused(module) == expected.format(hook, "module")


def test_a_module_without_a_marked_function_is_refused():
    assert refused(module_of("def transform_gradients(gradients): pass")) == (
        "the module my_package.half_gradients is no plugin, as no function of it is marked "
        "@hookimpl: mark its hooks, "
        "or name a class as my_package.half_gradients:CLASS"
    )


def test_a_forgotten_mark_beside_others_is_refused():
    source = (
        "from metaplug import hookimpl\n@hookimpl\ndef transform_gradients(gradients): "
        "pass\ndef transform_inner_losses(losses): pass\n"
    )
    assert refused(module_of(source)) == (
        "plugin 'half-gradients': function transform_inner_losses overrides a hook but is not "
        "marked: put @hookimpl above it, or rename it"
    )


def test_two_functions_for_one_hook_are_refused():
    source = MODULE + "\n@hookimpl(specname='transform_gradients')\ndef again(gradients): pass\n"
    assert refused(module_of(source)) == (
        "plugin 'half-gradients': functions transform_gradients and again both implement "
        "transform_gradients: make one of the two"
    )


def test_what_is_neither_is_refused():
    import functools

    assert (
        refused(Halve)
        == "Halve is the class of a plugin, not one of its instances: write Halve(...), with "
        "its settings"
    )
    text = refused(functools.partial(transform_gradients))
    assert text.endswith(
        " is not a plugin: give its name, an instance of a subclass of metaplug.Plugin, or a "
        "function named as a hook"
    )


# By entry point.


@pytest.mark.parametrize("value", ["half_gradients", "half_gradients:transform_gradients"])
def test_an_entry_point_may_name_a_module_or_a_function(installed, value):
    installed(MODULE, value)
    assert registry.name_of("plugin", registry.load("plugin", "half-gradients")) == "half-gradients"
    assert problem().learner(plugins=["half-gradients"]).chain.order()["transform_gradients"] == (
        "half-gradients",
    )


def test_settings_are_refused(installed):
    installed(MODULE)
    with pytest.raises(RequestError) as error:
        PluginUse(plugin="half-gradients", settings={"strength": 1}).make()
    assert str(error.value) == "plugin 'half-gradients': unknown field 'strength': known: none"


def test_it_is_listed(installed):
    installed(MODULE)
    (row,) = (entry for entry in entries("plugin") if entry.name == "half-gradients")
    assert (row.error, row.summary, row.hooks, row.fields) == (
        None,
        "Half of every gradient.",
        ("transform_gradients", "end_meta_step"),
        (),
    )
    assert row.facts["hooks"] == "transform_gradients (fold), end_meta_step (collect)"


def test_a_saved_learner_finds_a_module_by_its_name_and_is_given_a_function(installed, tmp_path):
    installed(MODULE)
    case = problem()
    learner = case.learner(plugins=["half-gradients"])
    learner.fit(Stream(), iterations=1)
    learner.save(tmp_path / "module.pt")
    loaded = MetaLearner.load(tmp_path / "module.pt", model=problem().model)
    assert [plugin.name for plugin in loaded.chain.plugins] == ["half-gradients"]
    gradients = loaded.meta_gradients(case.batch)
    assert all(
        torch.equal(gradients[name], expected)
        for name, expected in learner.meta_gradients(case.batch).items()
    )

    case.learner(plugins=[halve_them]).save(tmp_path / "function.pt")
    with pytest.raises(RequestError) as error:
        MetaLearner.load(tmp_path / "function.pt", model=problem().model)
    assert str(error.value) == (
        f"{tmp_path / 'function.pt'} was trained with the plugin 'halve-them', which is not an "
        "installed part: "
        "give MetaLearner.load(..., plugins=...)"
    )
    loaded = MetaLearner.load(tmp_path / "function.pt", model=problem().model, plugins=[halve_them])
    assert [plugin.name for plugin in loaded.chain.plugins] == ["halve-them"]


# What every class keeps to.


def check(**members):
    with pytest.raises(RequestError) as error:
        check_plugin(type("Mine", (Plugin,), members), "mine")
    return str(error.value)


def test_a_class_whose_only_method_is_a_misspelt_and_unmarked_hook_is_refused():
    assert check(transform_gradint=lambda self, gradients: gradients) == (
        "plugin 'mine' implements no hook, so that nothing would call its method "
        "transform_gradint (did you mean 'transform_gradients'?): "
        "name it as a hook and put @hookimpl above it"
    )


def test_a_star_is_refused():
    @hookimpl
    def starred(self, gradients, **rest):
        return gradients

    @hookimpl
    def keyword(self, *, gradients):
        return gradients

    text = (
        "plugin 'mine': method transform_gradients has the argument {} after a star, which "
        "the hook would never fill: "
    )
    text += "name those that you need of gradients, step"
    assert check(transform_gradients=starred) == text.format("rest")
    assert check(transform_gradients=keyword) == text.format("gradients")


def test_a_method_without_self_is_refused():
    expected = (
        "plugin 'mine': method transform_gradients has no self, so that it would get the "
        "plugin as its first argument: "
    )
    expected += "write self before the others"
    assert check(transform_gradients=hookimpl(lambda gradients: gradients)) == expected
    assert check(transform_gradients=hookimpl(lambda: None)) == expected


def test_methods_may_have_names_of_their_own_but_not_share_a_hook():
    class Named(Plugin):
        @hookimpl(specname="transform_gradients")
        def halve(self, gradients):
            return {name: gradient / 2 for name, gradient in gradients.items()}

    case = problem()
    assert_close(
        case.learner(plugins=[Named()]).meta_gradients(case.batch),
        case.learner(plugins=[Halve()]).meta_gradients(case.batch),
        rtol=0,
        atol=0,
    )
    assert list(implementations(Named)) == ["transform_gradients"]
    text = check(
        halve=vars(Named)["halve"], transform_gradients=hookimpl(lambda self, gradients: gradients)
    )
    assert (
        text == "plugin 'mine': method halve and method transform_gradients both implement "
        "transform_gradients: make one of the two"
    )


def test_a_hook_that_may_be_missing_is_passed_over():
    class Ahead(Plugin):
        @hookimpl(optionalhook=True)
        def transform_everything(self, everything):
            return everything

    assert Chain([Ahead()]).order() == {}


@pytest.mark.parametrize("declared", ["runs_after", "conflicts_with"])
def test_declarations_are_tuples_of_names(declared):
    assert check(**{declared: "gradient-sharing"}) == (
        f"plugin 'mine': {declared} = 'gradient-sharing' is no tuple of names: write it as in "
        "('gradient-sharing',)"
    )
