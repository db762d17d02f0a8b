"""What authors of plugins ask the command line: does it keep the contract, and which hooks are
there."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from pathlib import Path

import pytest

from metaplug.cli.main import main
from metaplug.contract import hookspecs
from metaplug.contract.hookspecs import KINDS, WHEN
from metaplug.testing import CLAUSES, suite

GOOD = """
from metaplug import Plugin, PluginConfig, hookimpl
from pydantic import Field


class MyIdea(Plugin):
    class Config(PluginConfig):
        factor: float = Field(0.5, gt=0, le=1, description="The factor; 1 is off.")

    @hookimpl
    def transform_gradients(self, gradients):
        if self.config.factor == 1:
            return None
        return {name: each * self.config.factor for name, each in gradients.items()}
"""
BAD = GOOD.replace("each * self.config.factor", "each.mul_(self.config.factor)")
QUICK = ["--models", "regression", "--examples", "1"]


@pytest.fixture
def answer(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        return (int(stopped.value.code or 0), *capfd.readouterr())

    return run


def test_a_file_is_held_to_the_contract_a_line_for_each_clause(answer, monkeypatch):
    """By the quick clauses: all of them take ten seconds."""
    quick = ("strict-config", "config-round-trip", "no-mutation", "off-is-baseline")
    monkeypatch.setattr(suite, "CLAUSES", {name: CLAUSES[name] for name in quick})
    Path("my_idea.py").write_text(GOOD)
    status, out, err = answer("test-plugin", "./my_idea.py", "--off", "factor=1", *QUICK)
    assert (status, err) == (0, "")
    *lines, last = out.splitlines()
    assert lines == [f"passed     {clause}" for clause in quick]
    assert last.startswith("plugin 'my-idea' keeps the contract: 4 clauses passed, ")


def test_it_ends_at_the_first_broken_clause(answer):
    Path("my_idea.py").write_text(BAD)
    why = "composes=it stands alone"
    status, out, err = answer("test-plugin", "./my_idea.py", "--except", why, "--json", *QUICK)
    *lines, last = err.splitlines()
    assert status == 1
    place = list(CLAUSES).index("no-mutation")
    assert lines[:place] == [f"passed     {clause}" for clause in list(CLAUSES)[:place]]
    assert lines[place].startswith(
        "broken     no-mutation: transform_gradients (iteration 1, inner step 0) wrote into "
        "gradients["
    )
    assert lines[place + 1] == "not tried  no-state-in-loop: no-mutation is broken"
    assert "left out   off-is-baseline: no settings at which it does nothing" in "\n".join(lines)
    assert lines[-1] == "left out   composes: it stands alone"
    assert last == (
        "metaplug: plugin 'my-idea' breaks no-mutation, so the clauses after it were not tried: "
        "correct that first (docs/conformance.md#no-mutation)"
    )
    values = json.loads(out)
    assert (values["plugin"], values["conforms"]) == ("my-idea", False)
    assert [each["clause"] for each in values["clauses"]] == list(CLAUSES)
    broken = values["clauses"][place]
    assert broken["outcome"] == "broken"
    assert broken["text"].startswith("plugin 'my-idea' breaks no-mutation: ")
    assert broken["page"] == "docs/conformance.md#no-mutation"


def test_some_clauses_alone(answer):
    Path("my_idea.py").write_text(BAD)
    only = ["--only", "off-is-baseline", "--only", "strict-config"]
    status, out, err = answer("test-plugin", "./my_idea.py", *only, "--json", *QUICK)
    *lines, last = err.splitlines()
    assert status == 0
    assert lines == [
        "passed     strict-config",
        "left out   off-is-baseline: no settings at which it does nothing are given: off = None",
    ]
    asked = f"2 of {len(CLAUSES)} clauses were asked"
    said = f"plugin 'my-idea' breaks none of these; {asked}: 1 clause passed, 1 left out, "
    assert last.startswith(said)
    values = json.loads(out)
    assert values["conforms"] is None
    assert [each["clause"] for each in values["clauses"]] == ["strict-config", "off-is-baseline"]
    status, out, err = answer("test-plugin", "./my_idea.py", "--only", "no-mutation", *QUICK)
    assert (status, out.partition(":")[0]) == (1, "broken     no-mutation")
    assert err.startswith("metaplug: plugin 'my-idea' breaks no-mutation")


WRONG = {
    ("./no.py",): "there is no plugin file ./no.py: give the path of a Python file",
    ("gradient-nois",): "unknown plugin 'gradient-nois': did you mean 'gradient-noise'?",
    ("gradient-noise", "--settings", "scales=1"): "plugin 'gradient-noise': unknown field "
    "'scales': did you mean 'scale'?",
    ("gradient-noise", "--off", "scales=1"): "plugin 'gradient-noise': unknown field 'scales': "
    "did you mean 'scale'?",
    ("gradient-noise", "--settings", "scale"): "--settings scale: no value is given; write "
    "--settings FIELD=VALUE",
    ("gradient-noise", "--models", "conv5"): "unknown model of metaplug.testing 'conv5': did you "
    "mean 'conv4'?",
    ("gradient-noise", "--except", "finite"): "--except finite: a clause is left out for a "
    "reason: write --except CLAUSE=REASON",
    ("gradient-noise", "--except", "infinite=yes"): "unknown clause 'infinite': did you mean "
    "'finite'?",
    ("gradient-noise", "--only", "infinite"): "unknown clause 'infinite': did you mean 'finite'?",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_request_is_one_line(answer, words):
    assert answer("test-plugin", *words) == (2, "", f"metaplug: {WRONG[words]}\n")


def test_without_pytest_it_says_what_to_install(answer, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("metaplug.testing")]:
        monkeypatch.delitem(sys.modules, name)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "hypothesis" else found(name, *rest),
    )
    assert answer("test-plugin", "gradient-noise") == (
        2,
        "",
        "metaplug: metaplug.testing needs hypothesis, which is not installed: pip install "
        "'metaplug[testing]'\n",
    )


def test_the_plugin_in_a_file_is_described_as_an_installed_one(answer):
    Path("my_idea.py").write_text(GOOD)
    status, out, _ = answer("plugins", "./my_idea.py", "--json")
    (page,) = json.loads(out)
    assert (status, page["name"], page["kind"]) == (0, "my-idea", "plugin")
    assert (page["distribution"], page["version"]) == ("./my_idea.py", None)
    assert page["facts"]["hooks"] == "transform_gradients (fold)"
    assert page["settings"][0]["description"] == "The factor; 1 is off."
    status, out, err = answer("plugins", "./my_idea.py")
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "my-idea: a plugin of ./my_idea.py"
    for more in ([], ["--compose"]):
        *_, last = answer("plugins", "./your_idea.py", *more)[2].splitlines()
        assert last == (
            "metaplug: there is no plugin file ./your_idea.py: give the path of a Python file"
        )


def test_every_hook_is_in_the_reference(answer):
    status, out, _ = answer("hooks", "--json")
    assert status == 0
    found = {hook["name"]: hook for hook in json.loads(out)}
    assert list(found) == list(KINDS) == list(WHEN)
    for name, hook in found.items():
        assert (hook["kind"], hook["when"]) == (KINDS[name], WHEN[name])
        assert hook["documentation"] == inspect.getdoc(getattr(hookspecs, name))
    assert found["transform_learning_rates"]["plugins"] == [
        "aruba",
        "lora",
        "meta-sgd",
        "per-step-learning-rates",
    ]
    assert found["transform_gradients"]["signature"] == (
        "transform_gradients(\n    gradients: Gradients,\n    step: InnerStep,\n"
        ") -> Gradients | None"
    )


def test_hooks_are_listed_and_one_is_shown(answer):
    _, out, err = answer("hooks")
    assert (
        err
        == "metaplug hooks HOOK shows one with its arguments and the plugins that implement it\n"
    )
    assert all(name in out for name in KINDS)
    _, out, err = answer("hooks", "setup")
    assert err == ""
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0] == "setup: notify, once, when a learner is made"
    assert "context: Context," in lines
    _, out, _ = answer("hooks", "transform_gradients", "setup")
    heads = [line for line in out.splitlines() if ": notify, " in line or ": fold, " in line]
    assert [head.partition(":")[0] for head in heads] == ["transform_gradients", "setup"]
    assert answer("hooks", "setup", "transform_gradient") == (
        2,
        "",
        "metaplug: unknown hook 'transform_gradient': did you mean 'transform_gradients'?\n",
    )
