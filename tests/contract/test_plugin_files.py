"""A plugin file is run where somebody names it; a wrong one is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metaplug import MetaLearner, RequestError, RunError
from metaplug.contract import plugin_files
from metaplug.contract.presets import PluginUse, Preset, find_preset
from metaplug.testing import CLAUSES, problem
from metaplug.testing.clauses import Subject

CLASS = '''
from __future__ import annotations
from metaplug import Gradients, Plugin, PluginConfig, hookimpl
from pydantic import Field


class MyIdea(Plugin):
    """Inner gradients times a factor."""

    class Config(PluginConfig):
        factor: float = Field(0.5, gt=0, le=1, description="The factor.")

    config: Config

    @hookimpl
    def transform_gradients(self, gradients: Gradients) -> Gradients:
        return {name: each * self.config.factor for name, each in gradients.items()}
'''
FUNCTIONS = """
from metaplug import hookimpl


@hookimpl
def transform_gradients(gradients):
    return {name: each * 0.5 for name, each in gradients.items()}
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("source", [CLASS, FUNCTIONS], ids=["class", "functions"])
def test_a_file_is_a_plugin(source: str) -> None:
    Path("my_idea.py").write_text(source)
    case = problem("mlp", tasks=2, steps=2)
    learner = case.learner(plugins=["./my_idea.py"])
    assert learner.chain.order() == {"transform_gradients": ("my-idea",)}
    halved = MetaLearner(case.model, plugins=[], inner_lr=case.lr / 2, inner_steps=2)
    expected = halved.meta_gradients(case.batch)
    for name, gradient in learner.meta_gradients(case.batch).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-10)


def test_the_same_content_is_the_same_class_and_a_changed_one_another() -> None:
    file = Path("my_idea.py")
    file.write_text(CLASS)
    first = plugin_files.load("./my_idea.py")
    assert plugin_files.load("my_idea.py") is first
    origin = plugin_files.origin_of(first)
    assert origin == {
        "path": str(file.resolve()),
        "sha256": plugin_files.source_of("my_idea.py")[1],
    }
    file.write_text(CLASS.replace("0.5", "0.25"))
    second = plugin_files.load("./my_idea.py")
    assert (first().config.factor, second().config.factor) == (0.5, 0.25)
    with pytest.raises(RequestError) as error:
        PluginUse(plugin="my_idea.py", sha256=origin["sha256"]).make()
    now = plugin_files.source_of("my_idea.py")[1]
    assert str(error.value) == (
        f"the plugin file my_idea.py has changed since it was recorded (sha256 "
        f"{origin['sha256'][:12]}… then, {now[:12]}… now): bring it back as it was, or take it as "
        "it is for a new run"
    )


def test_a_use_is_called_as_its_file_unless_it_has_a_name() -> None:
    Path("my_idea.py").write_text(CLASS)
    assert PluginUse(plugin="./my_idea.py").make().name == "my-idea"
    use = PluginUse(plugin="./my_idea.py", name="other", settings={"factor": 0.1})
    assert (use.make().name, use.label) == ("other", "other")
    assert PluginUse(plugin="gradient-noise").model_dump() == {
        "plugin": "gradient-noise",
        "name": None,
        "settings": {},
    }


def test_a_fault_names_the_line_of_the_file() -> None:
    Path("my_idea.py").write_text(FUNCTIONS.replace("each * 0.5", "each * {}"))
    case = problem("mlp", tasks=1, steps=1)
    with pytest.raises(RunError, match=r"failed at my_idea.py:7: TypeError: "):
        case.learner(plugins=["my_idea.py"]).meta_gradients(case.batch)


def test_the_conformance_suite_takes_a_path() -> None:
    Path("my_idea.py").write_text(CLASS)
    subject = Subject("./my_idea.py", {"factor": 0.3}, models=("mlp",), examples=1)
    assert (subject.name, subject.hooks) == ("my-idea", ("transform_gradients",))
    CLAUSES["strict-config"].hold(subject)


SECOND = "\n\nclass Other(Plugin):\n    pass\n"
WRONG = {
    "missing": (
        "./no_idea.py",
        None,
        "there is no plugin file ./no_idea.py: give the path of a Python file",
    ),
    "not .py": (
        "./my_idea.txt",
        "",
        "the plugin file ./my_idea.txt does not end in .py: give a Python file, or the name of an "
        "installed plugin",
    ),
    "no Python": (
        "my_idea.py",
        "\0",
        "the plugin file my_idea.py is not Python (source code string cannot contain null bytes): "
        "correct it there",
    ),
    "syntax": (
        "my_idea.py",
        "\nclass MyIdea(Plugin)\n    pass\n",
        "the plugin file my_idea.py is not Python (expected ':', line 2): correct it there",
    ),
    "none": (
        "my_idea.py",
        "from metaplug import Plugin\n",
        "the plugin file my_idea.py holds no plugin: write a class P(Plugin) in it, or functions "
        "marked @hookimpl",
    ),
    "unmarked": (
        "my_idea.py",
        "def transform_gradients(gradients):\n    return gradients\n",
        "the plugin file my_idea.py holds no plugin, as its function transform_gradients is not "
        "marked: put @hookimpl above it",
    ),
    "two": (
        "my_idea.py",
        CLASS + SECOND,
        "the plugin file my_idea.py holds 2 plugins, MyIdea and Other: leave one in it, and give "
        "each other one a file of its own",
    ),
    "two forms": (
        "my_idea.py",
        CLASS + FUNCTIONS,
        "the plugin file my_idea.py holds the class MyIdea and beside it the marked function "
        "transform_gradients, which are two plugins: leave one of them in it",
    ),
    "taken by the file": (
        "meta_sgd.py",
        CLASS,
        "the plugin file meta_sgd.py has the name of the installed plugin 'meta-sgd' (metaplug "
        "0.1.0), and no record could tell the two apart: rename the file, or give the name "
        "without a path",
    ),
    "taken by the class": (
        "my_idea.py",
        CLASS.replace("MyIdea", "MetaSgd"),
        "the class MetaSgd of the plugin file my_idea.py has the name of the installed plugin "
        "'meta-sgd' (metaplug 0.1.0), and no record could tell the two apart: rename the class, "
        "or give the name without a path",
    ),
    "no name": (
        "2nd.py",
        CLASS,
        "the plugin file 2nd.py would give its plugin the name '2nd', which none can have: rename "
        "it with lower-case letters, digits and underscores, as my_idea.py",
    ),
    "contract": (
        "my_idea.py",
        CLASS.replace("    @hookimpl\n", ""),
        "plugin 'my-idea': method transform_gradients overrides a hook but is not marked: put "
        "@hookimpl above it, or rename it",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_file_is_refused_in_one_line(fault: str) -> None:
    path, content, text = WRONG[fault]
    if content is not None:
        Path(path).write_text(content)
    with pytest.raises(RequestError) as error:
        plugin_files.load(path)
    assert str(error.value) == text


def test_a_folder_is_no_file() -> None:
    Path("my_idea.py").mkdir()
    with pytest.raises(RequestError) as error:
        plugin_files.load("my_idea.py")
    assert str(error.value) == "the plugin file my_idea.py is no regular file: give a Python file"


def test_a_file_that_fails_names_the_line() -> None:
    Path("my_idea.py").write_text("\n\nimport no_such_module_at_all\n")
    with pytest.raises(RunError) as error:
        plugin_files.load("my_idea.py")
    assert str(error.value) == (
        "the plugin file my_idea.py does not load (ModuleNotFoundError: No module named "
        "'no_such_module_at_all', line 3): correct it there"
    )


def test_a_preset_in_a_file_may_name_one_and_an_installed_preset_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("my_idea.py").write_text(CLASS)
    Path("mine.yaml").write_text("plugins: [{plugin: ./my_idea.py, settings: {factor: 0.1}}]\n")
    (use,) = find_preset("mine.yaml").plugins
    assert use.make().name == "my-idea"
    monkeypatch.setattr(
        "metaplug.contract.registry.load",
        lambda kind, name: Preset(name=name, plugins=["./my_idea.py"]),
    )
    with pytest.raises(RequestError) as error:
        find_preset("maml")
    assert str(error.value) == (
        "the preset 'maml' of metaplug 0.1.0 names the plugin file ./my_idea.py, which nobody "
        "lets run because a package says so: install that plugin, or write the preset into a file "
        "of your own"
    )
