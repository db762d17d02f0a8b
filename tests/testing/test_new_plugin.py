"""`metaplug new-plugin`: its packages install, are listed, pass their own tests, are clean."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from metaplug.cli.main import main
from metaplug.templates import SCAFFOLDS
from metaplug.testing import PluginConformance, check

NAMES = {kind: f"{kind}-of-mine" for kind in SCAFFOLDS}
FILES = [
    ".github/workflows/test.yml",
    ".gitignore",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "{}.py",
    "tests/test_{}.py",
]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def metaplug(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        return (int(stopped.value.code or 0), *capfd.readouterr())

    return run


def tell(*command: str, folder: Path = Path(), path: str = "") -> str:
    """What a process prints that has to end well, with `path` on its import path."""
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install(folder: Path) -> str:
    """Install a package by hand, as pip may want the network; its import path."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    metadata = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in each.items())
        for group, each in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("".join(groups))
    return str(folder.resolve())


@pytest.mark.parametrize("kind", SCAFFOLDS)
def test_it_says_what_it_wrote_and_how_to_go_on(metaplug: Any, kind: str) -> None:
    name = NAMES[kind]
    module = name.replace("-", "_")
    status, out, err = metaplug("new-plugin", name, "--kind", kind)
    expected = sorted(file.format(module) for file in FILES)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"{name} has a {SCAFFOLDS[kind].words}, as a package:",
        *(f"- {file}" for file in expected),
        "next:",
        f"- cd {name} && pip install -e '.[test]'",
        "- pytest",
        f"- metaplug {'tasks' if kind == 'tasks' else 'plugins'} {name}",
    ]
    assert (
        sorted(
            path.relative_to(name).as_posix() for path in Path(name).rglob("*") if path.is_file()
        )
        == expected
    )
    text = "".join(path.read_text() for path in Path(name).rglob("*") if path.is_file())
    assert not [
        word
        for word in (
            "my-idea",
            "my_idea",
            "MyIdea",
            "MY_IDEA",
            "GROUP",
            "OBJECT",
            "VERSION",
            "YEAR",
        )
        if word in text
    ]
    project = tomllib.loads((Path(name) / "pyproject.toml").read_text())["project"]
    assert (project["name"], project["license"], project["dependencies"]) == (
        f"metaplug-{name}",
        "MIT",
        ["metaplug>=0.1.0"],
    )
    assert (
        f"Copyright (c) {date.today().year} The authors of metaplug-{name}"
        in (Path(name) / "LICENSE").read_text()
    )


@pytest.mark.parametrize("name", ["ab", "the-longest-name-that-there-is-has-forty"])
@pytest.mark.parametrize("kind", SCAFFOLDS)
def test_it_is_clean_whatever_its_name(metaplug: Any, kind: str, name: str) -> None:
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("ruff is not installed: pip install metaplug[lint]")
    assert metaplug("new-plugin", name, "--kind", kind, "--out", "here/made")[0] == 0
    tell(str(ruff), "check", folder=Path("here/made"))
    tell(str(ruff), "format", "--check", folder=Path("here/made"))


@pytest.mark.slow
def test_it_is_typed(metaplug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip(
        "mypy.api", reason="mypy is not installed: pip install metaplug[lint]"
    )
    for kind, name in NAMES.items():
        assert metaplug("new-plugin", name, "--kind", kind)[0] == 0
    monkeypatch.setenv("MYPYPATH", str(Path(__file__).parents[2]))
    out, err, status = api.run(["--strict", "--follow-imports=silent", *NAMES.values()])
    assert status == 0, out + err


SLOW = [kind for kind in SCAFFOLDS if kind not in ("gradient", "tasks")]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in SCAFFOLDS],
)
def test_it_is_listed_and_passes_its_own_tests(metaplug: Any, kind: str) -> None:
    name = NAMES[kind]
    assert metaplug("new-plugin", name, "--kind", kind)[0] == 0
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "error::UserWarning",
    ]
    assert " passed" in tell(*command, folder=Path(name))
    listed = tell(
        sys.executable,
        "-m",
        "metaplug",
        "tasks" if kind == "tasks" else "plugins",
        "--json",
        path=install(Path(name)),
    )
    (row,) = (row for row in json.loads(listed) if row["name"] == name)
    assert (row["kind"], row["distribution"], row["version"], row["error"]) == (
        SCAFFOLDS[kind].part,
        f"metaplug-{name}",
        "0.1.0",
        None,
    )
    assert row["summary"]
    assert all(setting["description"] for setting in row["settings"])
    assert bool(row["settings"]) == (kind != "preset")


@pytest.mark.parametrize("kind", [kind for kind in SCAFFOLDS if SCAFFOLDS[kind].part == "plugin"])
def test_its_plugin_keeps_every_clause(
    metaplug: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one model and one example: its own tests, which are slow, take three models and five."""
    name = NAMES[kind]
    assert metaplug("new-plugin", name, "--kind", kind)[0] == 0
    for folder in (Path(name), Path(name) / "tests"):
        monkeypatch.syspath_prepend(str(folder.resolve()))
    tests = importlib.import_module(f"test_{name.replace('-', '_')}")
    (suite,) = (
        each
        for each in vars(tests).values()
        if isinstance(each, type) and issubclass(each, PluginConformance) and each.plugin
    )
    check(
        suite.plugin,
        settings=suite.settings,
        off=suite.off,
        models=("mlp",),
        exceptions=suite.exceptions,
        examples=1,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gradient", "tasks"])
def test_pip_installs_it(metaplug: Any, kind: str) -> None:
    """As a user does, but for the network: with what builds packages here."""
    from importlib.metadata import version

    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip(
            "setuptools is older than the package asks for, and a newer one would need the network"
        )
    name = NAMES[kind]
    assert metaplug("new-plugin", name, "--kind", kind)[0] == 0
    options = [
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--disable-pip-version-check",
        "--target",
        "site",
    ]
    tell(sys.executable, "-m", "pip", "install", *options, f"./{name}")
    listed = tell(
        sys.executable,
        "-m",
        "metaplug",
        "tasks" if kind == "tasks" else "plugins",
        name,
        "--json",
        path=str(Path("site").resolve()),
    )
    page = json.loads(listed)
    page = page if kind == "tasks" else page[0]
    assert (page["distribution"], page["error"]) == (f"metaplug-{name}", None)


WRONG = [
    (
        "My-Idea",
        "'My-Idea' cannot name a plugin: use lower-case letters, digits and single hyphens, as "
        "in 'my-idea'",
    ),
    (
        "my_idea",
        "'my_idea' cannot name a plugin: use lower-case letters, digits and single hyphens, as "
        "in 'my-idea'",
    ),
    (
        "../idea",
        "'../idea' cannot name a plugin: use lower-case letters, digits and single hyphens, as "
        "in 'my-idea'",
    ),
    ("a" * 41, f"'{'a' * 41}' cannot name a plugin: it has 41 letters; use at most 40"),
    (
        "lambda",
        "'lambda' cannot name a plugin, as its module would be called lambda, a keyword of "
        "Python: choose another name",
    ),
    (
        "statistics",
        "'statistics' cannot name a plugin, as there is a module statistics already, and one of "
        "the two would hide the other: "
        "choose another name",
    ),
    (
        "torch",
        "'torch' cannot name a plugin, as there is a module torch already, and one of the two "
        "would hide the other: choose another name",
    ),
    (
        "a-b-step",
        "'a-b-step' cannot name a plugin, as its class ABStep would be read as 'ab-step': "
        "begin every part of the name with a letter, and give it two or more",
    ),
    (
        "adam-2nd",
        "'adam-2nd' cannot name a plugin, as its class Adam2nd would be read as 'adam2nd': "
        "begin every part of the name with a letter, and give it two or more",
    ),
    (
        "meta-sgd",
        "the plugin 'meta-sgd' is installed already, by metaplug 0.1.0: choose another name",
    ),
]


@pytest.mark.parametrize(("name", "text"), WRONG, ids=[name for name, _ in WRONG])
def test_names_that_are_not_valid_are_refused(metaplug: Any, name: str, text: str) -> None:
    assert metaplug("new-plugin", name) == (2, "", f"metaplug: {text}\n")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "name", "part"),
    [
        ("tasks", "glyphs", "task source"),
        ("model", "conv4", "model"),
        ("preset", "maml", "preset"),
        ("inner-loss", "reptile", "plugin"),
    ],
)
def test_names_that_are_taken_are_refused_by_kind(
    metaplug: Any, kind: str, name: str, part: str
) -> None:
    text = (
        f"metaplug: the {part} '{name}' is installed already, by metaplug 0.1.0: choose "
        "another name\n"
    )
    assert metaplug("new-plugin", name, "--kind", kind) == (2, "", text)


def test_the_file_of_an_idea_may_lie_beside_its_package(metaplug: Any) -> None:
    Path("latent_head.py").write_text("idea = 1\n")
    Path("statistics.py").write_text("idea = 1\n")
    assert metaplug("new-plugin", "latent-head")[0] == 0
    assert Path("latent_head.py").read_text() == "idea = 1\n"
    assert metaplug("new-plugin", "statistics")[0] == 2  # it would hide that of Python


HALF = '''"""Inner gradients times a half.

    g ← g / 2

Of every task.
"""

from metaplug import hookimpl


@hookimpl
def transform_gradients(gradients):
    return {name: gradient / 2 for name, gradient in gradients.items()}
'''
POWER = '''from typing import Literal

from metaplug import Plugin, PluginConfig, hookimpl
from pydantic import Field


class MyIdea(Plugin):
    """Scale inner gradients; my-idea is kept as it is."""

    class Config(PluginConfig):
        mode: Literal["half", "none"] = Field("none", examples=["half"], description="How much.")

    @hookimpl
    def transform_gradients(self, gradients):
        if self.config.mode == "none":
            return None
        return {name: gradient / 2 for name, gradient in gradients.items()}
'''


def test_a_file_becomes_a_package(metaplug: Any) -> None:
    Path("my_idea.py").write_text(POWER)
    status, out, err = metaplug("new-plugin", "power-of-two", "--from", "./my_idea.py")
    assert (status, err) == (0, "")
    files = sorted(file.format("power_of_two") for file in FILES)
    assert out.splitlines() == [
        "power-of-two has the plugin of ./my_idea.py, as a package:",
        *(f"- {file}" for file in files),
        "next:",
        "- cd power-of-two && pip install -e '.[test]'",
        "- pytest",
        "- metaplug plugins power-of-two",
    ]
    made = Path("power-of-two")
    assert (made / "power_of_two.py").read_text() == POWER
    assert (made / "tests/test_power_of_two.py").read_text() == (
        '"""What every plugin promises."""\n\nfrom metaplug.testing import PluginConformance\n\n'
        "from power_of_two import MyIdea\n\n\nclass TestMyIdea(PluginConformance):\n"
        "    plugin = MyIdea\n    settings = {'mode': 'half'}\n"
    )
    assert (
        (made / "README.md")
        .read_text()
        .startswith(
            "# power-of-two\n\nA plugin for metaplug.\n\nScale inner gradients; my-idea is kept "
            "as it is.\n\n| setting | bounds | default | what it is |\n|---|---|---|---|\n"
            "| `mode` | half \\| none | none | How much. |\n\n## Use\n"
        )
    )
    project = tomllib.loads((made / "pyproject.toml").read_text())["project"]
    entry = {"metaplug.plugins": {"power-of-two": "power_of_two:MyIdea"}}
    assert project["entry-points"] == entry


def test_a_file_of_functions_becomes_a_package_that_is_found(metaplug: Any) -> None:
    Path("half_of_it.py").write_text(HALF)
    assert metaplug("new-plugin", "half-of-it", "--from", "half_of_it.py", "--out", "made")[0] == 0
    test = Path("made/tests/test_half_of_it.py").read_text()
    assert "import half_of_it\n" in test and "    plugin = half_of_it\n" in test
    found = "-m", "metaplug", "plugins", "half-of-it", "--json"
    (page,) = json.loads(tell(sys.executable, *found, path=install(Path("made"))))
    said = "Inner gradients times a half.\n\n    g ← g / 2\n\nOf every task."
    assert page["documentation"] == said
    assert page["hooks"] == ["transform_gradients"]


def test_a_file_and_a_kind_are_two_requests(metaplug: Any) -> None:
    text = (
        "metaplug: --kind preset and --from my_idea.py: the file is the plugin already, of "
        "whatever kind: leave one of them out\n"
    )
    given = ["new-plugin", "an-idea", "--kind", "preset", "--from", "my_idea.py"]
    assert metaplug(*given) == (2, "", text)
    text = "metaplug: there is no plugin file no.py: give the path of a Python file\n"
    assert metaplug("new-plugin", "an-idea", "--from", "no.py") == (2, "", text)
    Path("coded.py").write_bytes(
        b"# coding: latin-1\n" + POWER.replace("much", "m\xfcch").encode("l1")
    )
    text = "metaplug: the plugin file coded.py is not in UTF-8: save it so\n"
    assert metaplug("new-plugin", "an-idea", "--from", "coded.py") == (2, "", text)
    assert not Path("an-idea").exists()


def test_nothing_is_written_over(metaplug: Any) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("years of work")
    text = (
        "metaplug: mine already exists, and nothing is written over: give another --out, or "
        "another name\n"
    )
    assert metaplug("new-plugin", "an-idea", "--out", "mine") == (2, "", text)
    assert metaplug("new-plugin", "an-idea", "--out", "mine/thesis.tex") == (
        2,
        "",
        text.replace("mine", "mine/thesis.tex"),
    )
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.tex"]
    Path("empty").mkdir()
    assert metaplug("new-plugin", "an-idea", "--out", "empty")[0] == 0
    assert metaplug("new-plugin", "an-idea", "--out", "empty") == (
        2,
        "",
        text.replace("mine", "empty"),
    )


def test_an_unknown_kind_is_refused(metaplug: Any) -> None:
    status, out, err = metaplug("new-plugin", "an-idea", "--kind", "gradients")
    assert (status, out) == (2, "")
    assert (
        "Invalid value for '--kind': 'gradients' is not one of 'gradient', 'inner-loss', 'outer-"
        in err
    )


def test_a_folder_that_cannot_be_written_is_one_line(metaplug: Any) -> None:
    Path("file").write_text("")
    assert metaplug("new-plugin", "an-idea", "--out", "file/inside") == (
        1,
        "",
        "metaplug: cannot write file/inside: Not a directory; give another --out\n",
    )
