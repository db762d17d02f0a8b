"""Every first-party plugin passes the conformance suite, and the suite is what its page says."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import settings as profile
from support import plugins
from torch import nn

from metaplug import Plugin, RequestError, hookimpl
from metaplug.contract import registry
from metaplug.testing import (
    CLAUSES,
    FIRST_PARTY,
    MODELS,
    ConformanceError,
    PluginConformance,
    Stream,
    check,
    problem,
    strategies,
)
from metaplug.testing.clauses import Subject
from metaplug.testing.composing import declaring
from metaplug.testing.suite import verdicts

DOCS = Path(__file__).parents[2] / "docs"

MODELS_OF = {"per-step-batch-norm": ("batch-norm", "conv4")}
DRAWING = ("drop-grad", "gradient-noise", "meta-mix")
DRAWN = {"task-permutation": "its numbers follow a task's place"}
ELSEWHERE = {
    "composes": "tests/experiments/test_compositions.py has every pair in both orders",
    "traced-equals-eager": "tests/properties/test_derivations.py holds each to it, unrefused",
}


def _suite(name):
    fields = {
        "plugin": name,
        "settings": FIRST_PARTY[name],
        "off": plugins.OFF.get(name),
        "models": MODELS_OF.get(name, PluginConformance.models),
        "exceptions": {**ELSEWHERE, **(DRAWN if name in DRAWING else {})},
        "examples": min(profile().max_examples // 3, 25),
    }
    return type(f"Test{registry.load('plugin', name).__name__}", (PluginConformance,), fields)


globals().update({suite.__name__: suite for suite in map(_suite, FIRST_PARTY)})


def test_every_first_party_plugin_is_held_to_it():
    own = [part.name for part in registry.parts("plugin") if part.origin.startswith("metaplug ")]
    assert list(FIRST_PARTY) == own


# What it takes, what it says, and what it leaves out.


def halved(gradients):
    return {name: gradient / 2 for name, gradient in gradients.items()}


@hookimpl(specname="transform_gradients")
def half_the_gradient(gradients):
    return halved(gradients)


MODULE = """
import torch
from metaplug import hookimpl

seen = []

@hookimpl
def transform_gradients(gradients, step):
    return {name: gradient / 2 for name, gradient in gradients.items()}
"""


def module_of(source):
    module = ModuleType("my_package.half_it")
    exec(source, vars(module))
    return module


def test_a_module_is_held_to_it_too():
    check(module_of(MODULE), models=("mlp",), examples=1)
    with pytest.raises(
        ConformanceError,
        match=r"^plugin 'half-it' breaks no-state-in-loop: .* changed my_package.half_it.seen, ",
    ):
        check(
            module_of(MODULE.replace("    return", "    seen.append(step.index)\n    return")),
            models=("mlp",),
            examples=1,
        )


class TestAFunction(PluginConformance):
    plugin = half_the_gradient
    examples = 1
    models = ("regression",)


class Outer(Plugin):
    """What only changes outer losses, the tasks and the schedule has hooks enough."""

    @hookimpl
    def transform_tasks(self, batch, generator):
        noise = 0.1 * torch.randn(
            batch.support_x[0].shape, generator=generator, dtype=batch.support_x.dtype
        )
        return replace(batch, support_x=batch.support_x + noise)

    @hookimpl
    def transform_outer_losses(self, losses, outcome):
        moved = sum(
            (outcome.adapted_parameters[name] - each).flatten(1).square().sum(1)
            for name, each in outcome.initial_parameters.items()
        )
        return losses + 0.1 * moved

    @hookimpl
    def scale_meta_learning_rate(self, factor, iteration):
        return factor / (1 + iteration)


class TestOuterHooks(PluginConformance):
    plugin = Outer
    examples = 1


class WritesIntoGradients(Plugin):
    @hookimpl
    def transform_gradients(self, gradients):
        return {name: gradient.mul_(0.9) for name, gradient in gradients.items()}


def test_a_failure_reads_as_the_docs_have_it():
    with pytest.raises(ConformanceError) as error:
        check(WritesIntoGradients)
    text = str(error.value)
    page = (DOCS / "conformance.md").read_text(encoding="utf-8")
    shown = (
        page.split("```text\n")[1]
        .split("```")[0]
        .replace("plugin 'my-idea'", "plugin 'writes-into-gradients'")
    )
    assert text.split() == shown.split()
    assert len(text.splitlines()) == 3


def test_the_smallest_example_can_be_built_by_hand():
    """As the page says: the same learner, the same fault."""
    case = problem("mlp", tasks=1, support=3, query=3, steps=1, lr=0.1, seed=0)
    assert (
        str(case)
        == "model mlp, 1 task of 3 support and 3 query examples, 1 inner step of rate 0.1, seed 0"
    )
    taken = case.learner(plugins=[WritesIntoGradients()]).meta_gradients(case.batch)
    assert taken.keys() == dict(case.model.named_parameters()).keys()


def test_every_clause_is_explained_where_its_link_says():
    page = (DOCS / "conformance.md").read_text(encoding="utf-8")
    sections = re.findall(r"^### (\S+)\n\n\*(.+?)\*\n", page, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in sections] == list(CLAUSES)
    for name, statement in sections:
        said = CLAUSES[name].statement
        assert statement.replace("`", "") == f"{said[0].upper()}{said[1:]}."
        assert CLAUSES[name].link == f"docs/conformance.md#{name}"


def test_a_clause_that_is_left_out_is_skipped_with_its_reason():
    class Suite(PluginConformance):
        plugin = WritesIntoGradients
        exceptions = {"no-mutation": "it is a joke"}

    with pytest.raises(pytest.skip.Exception, match=r"^it is a joke$"):
        Suite().test_clause("no-mutation")
    with pytest.raises(
        pytest.skip.Exception, match=r"^no settings at which it does nothing are given: off = None$"
    ):
        Suite().test_clause("off-is-baseline")
    with pytest.raises(
        ConformanceError, match=r"^plugin 'writes-into-gradients' breaks composes: "
    ):
        check(
            WritesIntoGradients,
            exceptions=dict.fromkeys([name for name in CLAUSES if name != "composes"], "not asked"),
        )


class Unnamed(PluginConformance):
    pass


REFUSED = {
    "clause": (
        lambda: check(Outer, exceptions={"no-mutations": "why"}),
        "unknown clause 'no-mutations': did you mean 'no-mutation'?",
    ),
    "reason": (
        lambda: check(Outer, exceptions={"composes": ""}),
        "exceptions: the clause 'composes' is left out without a reason: say why it does not hold",
    ),
    "model": (
        lambda: check(Outer, models=("conv",)),
        "unknown model of metaplug.testing 'conv': did you mean 'conv4'?",
    ),
    "no model": (
        lambda: check(Outer, models=()),
        "models = (): a plugin that fits no model cannot be tried; give names of "
        "metaplug.testing.MODELS",
    ),
    "settings": (
        lambda: check(half_the_gradient, settings={"strength": 1}),
        "a plugin in the shortest form has no configuration: leave settings out, or write it as "
        "a class with a Config",
    ),
    "instance": (
        lambda: check(Outer()),
        "Outer(...) is an instance, which serves one learner: give the class, with its settings "
        "beside it",
    ),
    "no plugin": (
        lambda: Unnamed().test_clause("composes"),
        "Unnamed names no plugin: set plugin = MyPlugin in it",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_asked_is_refused_with_the_mend(fault):
    ask, text = REFUSED[fault]
    with pytest.raises(RequestError) as error:
        ask()
    assert str(error.value) == text


def test_a_wrong_setting_is_told_as_a_learner_tells_it():
    with pytest.raises(
        ConformanceError,
        match=r"plugin 'gradient-noise': unknown field 'scales': did you mean 'scale'\?",
    ):
        check("gradient-noise", settings={"scales": 1})


class Second(Plugin):
    """Declares that it must stand after one plugin, and cannot be beside another."""

    runs_after = ("gradient-clipping",)
    conflicts_with = ("imaml", "reptile", "sharp-maml", "warp-grad")

    @hookimpl
    def transform_gradients(self, gradients):
        return halved(gradients)

    @hookimpl
    def compute_meta_gradients(self, outer_loss, meta_parameters):
        taken = torch.autograd.grad(
            outer_loss, list(meta_parameters.values()), allow_unused=True, materialize_grads=True
        )
        return dict(zip(meta_parameters, taken, strict=True))


def test_declared_refusals_are_no_fault():
    CLAUSES["composes"].hold(Subject(Second))


@pytest.mark.parametrize("name", ["first-order", "tasks-apart"])
def test_figures_of_replaced_derivatives_may_differ_with_their_order(name):
    CLAUSES[name].hold(Subject("sharp-maml", {"level": "both"}, models=("mlp",)))


def test_all_partners_that_do_not_fit_are_declared_in_the_lines_to_paste():
    faults = {
        "lora": ["before lora: no", "after lora: no"],
        "taml": ["before taml: no"],
        "alfa": ["after alfa: no"],
    }
    assert declaring(faults) == (
        "before lora: no; nor does it go with 'taml', 'alfa': fix it, or declare "
        'conflicts_with = ("lora", "alfa") and runs_after = ("taml",)'
    )


# Its parts, alone.


@given(strategies.chains(), strategies.models(), strategies.tasks("conv4"))
def test_strategies_draw_what_they_promise(chain, model, batch):
    uses, case = chain
    learner = case.learner(plugins=uses)
    assert learner.meta_gradients(case.batch).keys() >= learner.chain.named_parameters().keys()
    assert isinstance(model, nn.Module)
    assert batch.support_x.shape[2:] == (1, 8, 8)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns_its_problem(name):
    case = problem(name, dtype=torch.float32)
    assert case.kind == ("regression" if name == "regression" else "classification")
    double = case.to(torch.float64)
    assert double.batch.support_x.dtype == next(double.model.parameters()).dtype == torch.float64
    for each in (case, double):
        learner = each.learner()
        learner.fit(Stream(name, dtype=each.batch.support_x.dtype), iterations=1, tasks_per_batch=2)
        assert all(
            bool(torch.isfinite(gradient).all())
            for gradient in learner.meta_gradients(each.batch).values()
        )


@pytest.mark.parametrize(
    "module",
    ["metaplug", "metaplug.learner", "metaplug.cli.main", "metaplug_plugins.gradient_sharing"],
)
def test_nothing_else_needs_pytest_or_hypothesis(module):
    program = f"import sys, {module}; sys.exit(bool({{'pytest', 'hypothesis'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_without_them_it_says_what_to_install():
    program = (
        "import importlib.util as util\n"
        "found = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name in ('pytest', 'hypothesis') else "
        "found(name, *rest)\n"
        "import metaplug.testing\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: metaplug.testing needs pytest and hypothesis, which are not "
        "installed: pip install 'metaplug[testing]'"
    )


# One fault is reported once, by the clause that it breaks first.


def outcomes(suite, names=tuple(CLAUSES)):
    """By clause, what pytest would say of it, in the order of `names`."""
    found = {}
    for name in names:
        try:
            suite().test_clause(name)
            found[name] = "passed"
        except pytest.skip.Exception as skipped:
            found[name] = str(skipped)
        except ConformanceError:
            found[name] = "failed"
    return found


def _broken_suite():
    fields = {"plugin": WritesIntoGradients, "models": ("mlp",), "examples": 1}
    return type("TestBroken", (PluginConformance,), fields)


def test_later_clauses_are_skipped_after_a_broken_one():
    found = outcomes(_broken_suite())
    first = [name for name, text in found.items() if text == "failed"]
    assert first == ["no-mutation"]
    later = list(CLAUSES)[list(CLAUSES).index("no-mutation") + 1 :]
    left_out = "no settings at which it does nothing are given: off = None"
    assert {name: found[name] for name in later} == dict.fromkeys(
        later, "not tried: no-mutation is broken"
    ) | {"off-is-baseline": left_out}


def test_a_clause_that_is_chosen_alone_or_first_is_tried():
    names = ("composes", "names-and-shapes", "no-mutation", "composes")
    suite = _broken_suite()
    assert outcomes(suite, names[:1]) == {"composes": "failed"}
    found = outcomes(suite, names[1:])
    assert found["no-mutation"] == "failed"
    assert found["composes"] == "not tried: no-mutation is broken"
    assert outcomes(_broken_suite(), names[1:2]) == {"names-and-shapes": found["names-and-shapes"]}


def test_a_clause_that_is_tried_again_and_holds_is_forgotten():
    suite = _broken_suite()
    assert outcomes(suite, ("no-mutation",)) == {"no-mutation": "failed"}
    suite.plugin = "gradient-noise"
    assert outcomes(suite, ("finite",)) == {"finite": "not tried: no-mutation is broken"}
    assert outcomes(suite, ("no-mutation", "finite")) == {
        "no-mutation": "passed",
        "finite": "passed",
    }


def test_a_subject_is_tried_up_to_the_first_broken_clause():
    subject = Subject(WritesIntoGradients, models=("mlp",), examples=1)
    found = list(verdicts(subject, {"composes": "it is a joke"}))
    assert [verdict.clause for verdict in found] == list(CLAUSES)
    said = {verdict.clause: (verdict.outcome, verdict.text) for verdict in found}
    assert said["future-arguments"] == ("passed", "")
    assert said["no-mutation"][0] == "broken"
    assert said["finite"] == ("not tried", "not tried: no-mutation is broken")
    assert said["composes"] == ("left out", "it is a joke")
