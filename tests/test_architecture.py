"""The arrows between the parts, and the promises that every public name makes."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import metaplug
from metaplug import Plugin
from metaplug.contract import hookspecs
from metaplug.contract.chain import Chain
from metaplug.contract.hookspecs import KINDS
from metaplug.contract.return_checks import CHECKS
from metaplug.errors import reason, said_by

ROOT = Path(__file__).parents[1]


def test_imports_run_one_way():
    """The contracts of [tool.importlinter]: layers, no plugin in the core, no plugin in a plugin,
    higher in one place."""
    pytest.importorskip(
        "importlinter", reason="import-linter is not installed: pip install metaplug[lint]"
    )
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_higher_is_imported_in_one_file_of_the_library():
    files = [path for folder in ("metaplug", "plugins") for path in (ROOT / folder).rglob("*.py")]
    importing = {
        path.name
        for path in files
        for line in path.read_text().splitlines()
        if line.startswith(("import higher", "from higher"))
    }
    # The bench measures higher by itself too.
    assert importing - {"contestants.py"} == {"optimizers.py"}


@pytest.mark.parametrize("name", metaplug.__all__)
def test_every_public_name_has_a_docstring(name):
    value = getattr(metaplug, name)
    if inspect.isclass(value):
        assert value.__dict__.get("__doc__"), name
        members = inspect.getmembers(
            value, lambda member: inspect.isfunction(member) or isinstance(member, property)
        )
        own = {
            key: member
            for key, member in members
            if key in value.__dict__ and not key.startswith("_")
        }
        undocumented = [key for key, member in own.items() if not member.__doc__]
        assert undocumented == []


def test_every_module_says_what_it_is():
    for path in (ROOT / "metaplug").rglob("*.py"):
        text = path.read_text()
        assert not text.strip() or text.startswith('"""'), path


def test_the_kinds_cover_every_hook():
    hooks = {name for name, value in vars(hookspecs).items() if hasattr(value, "metaplug_spec")}
    assert hooks == set(KINDS)
    assert set(KINDS.values()) == {"fold", "choose", "collect", "notify"}
    assert all(inspect.getdoc(getattr(hookspecs, name)) for name in hooks)


def test_every_hook_that_answers_is_checked():
    answering = {name for name, kind in KINDS.items() if kind != "notify"}
    assert set(CHECKS) == answering


def test_every_hook_can_be_implemented_with_all_its_arguments():
    def implement(name):
        arguments = ", ".join(["self", *inspect.signature(getattr(hookspecs, name)).parameters])
        scope = {}
        exec(f"def {name}({arguments}): pass", scope)
        return metaplug.hookimpl(scope[name])

    plugin = type("All", (Plugin,), {name: implement(name) for name in KINDS})()
    assert set(Chain([plugin]).order()) == set(KINDS)


@pytest.mark.parametrize(
    ("error", "alone", "with_kind"),
    [
        (KeyError("x"), "'x'", "KeyError: 'x'"),
        (RuntimeError(" one\n\tother "), "one other", "RuntimeError: one other"),
        (ValueError(), "ValueError", "ValueError: no message"),
        (
            FileNotFoundError(2, "No such file", "a.yaml"),
            "No such file",
            "FileNotFoundError: [Errno 2] No such file: 'a.yaml'",
        ),
    ],
)
def test_an_error_of_others_is_one_line(error, alone, with_kind):
    assert (reason(error), said_by(error)) == (alone, with_kind)
