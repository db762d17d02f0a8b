"""Every Python block of the pages runs, in order, and every metaplug command parses."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from support.tiny_language_models import save_language_models
from support.tiny_tokenizer import write_texts

from metaplug.cli.main import app, main
from metaplug.cli.options import SHARED
from metaplug.cli.resolving import resolve_options
from metaplug.contract import hookspecs, registry
from metaplug.contract.presets import PluginUse, find_preset
from metaplug.experiments.variant_texts import parse_plugin, parse_variant

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in DOCS.rglob("*.md") if DOCS / "examples" not in page.parents),
]
EXAMPLE = "docs/examples/conflict-projection/conflict_projection.py"
THEIR_OWN = {"conflict-projection", EXAMPLE}
"""A plugin that pages name and that is not installed here, by its name and its file."""
WHOLE = ["how-to/language-models.md", "how-to/own-text.md", "how-to/task-sizes.md"]
"""Pages that run as they are read: shell and Python in one folder, and tables of errors."""
FEW = {
    "train": "--iterations 1 --set training.validation_tasks=2 --set training.test_tasks=2",
    "evaluate": "--num-tasks 2",
}
"""Options that make the commands of such a page quick."""


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page not in [DOCS / name for name in WHOLE]],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_python_blocks_run(page: Path) -> None:
    namespace: dict[str, object] = {}
    for block in re.findall(
        r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # the libraries' own
@pytest.mark.parametrize("name", WHOLE)
def test_pages_run_as_they_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With what they name made small; a message in a table is the whole line that is printed."""
    monkeypatch.chdir(tmp_path)
    text = (DOCS / name).read_text(encoding="utf-8")
    if "path/to/model" in text:
        save_language_models(tmp_path / "path" / "to")
    for table in ("utterances", "banking"):
        write_texts(tmp_path / f"{table}.csv", classes=32, count=11)
    namespace: dict[str, object] = {}
    trained: list[str] = []
    for language, block in re.findall(
        r"^```(sh|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE
    ):
        if language == "python":
            exec(compile(block, name, "exec"), namespace)
            continue
        for words in _commands(f"```sh\n{block}```"):
            assert _run(*words) == 0, capfd.readouterr().err
            trained = trained or (words if words[0] == "train" else [])
    refused = _errors(text, "you add")
    assert bool(refused) == ("| it says |" in text)
    for row, (given, message) in enumerate(refused):
        assert _run(*trained, "--name", f"refused-{row}", *shlex.split(given)) == 2
        assert capfd.readouterr().err.splitlines()[-1] == f"metaplug: {message}"
    for given, message in _errors(text, "the row"):
        (tmp_path / "rows.csv").write_text(f"text,intent,domain\n{given}\n")
        assert (
            _run("tasks", "text:rows.csv", "--set", "tasks.settings.tokenizer=path/to/model") == 2
        )
        assert capfd.readouterr().err == f"metaplug: {message}\n"


def _run(*words: str) -> int:
    """Run a command of a page in this process, with few iterations; return its status."""
    with pytest.raises(SystemExit) as stopped:
        main([*words, *shlex.split(FEW.get(words[0], ""))])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def _errors(text: str, given: str) -> list[tuple[str, str]]:
    """Find the rows of a page's tables of what is given and what is said then."""
    head = rf"^\| {given} \| it says \|\n((?:\|.*\n)+)"
    tables = "".join(re.findall(head, text, re.MULTILINE))
    return re.findall(r"^\| `(.+?)` \| (.+) \|$", tables, re.MULTILINE)


def test_every_page_is_in_the_site_and_every_link_is_a_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f": {page.relative_to(DOCS).as_posix()}\n" in navigation
    for target in re.findall(
        r"\]\((docs/[^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")
    ):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("name", registry.names("plugin"))
def test_every_installed_plugin_has_a_page_that_the_code_fills_in(name: str) -> None:
    assert f"<!-- plugin {name} -->" in (DOCS / "plugins" / f"{name}.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_metaplug_commands_parse(page: Path) -> None:
    """Options, values, presets, plugins and paths of fields; nothing is run."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in _commands(page.read_text(encoding="utf-8")):
        name, *arguments = words
        given = commands[name].make_context(name, arguments).params
        if name not in ("train", "tune", "explain", "compare") or given.get("config") is not None:
            continue
        options = {
            path: value
            for path in SHARED
            if (value := given.get(path.replace(".", "_"))) is not None
        }
        variants = given.get("variant") or [given.get("preset") or "maml"]
        if any(".yaml" in variant for variant in variants):
            continue
        for variant in variants:
            preset, behind = parse_variant(variant)
            uses: list[PluginUse] = [*behind, *map(parse_plugin, given.get("use") or ())]
            resolve_options(options, given["sets"] or (), preset=preset, uses=uses)
            for use in (*find_preset(preset).plugins, *uses):
                assert use.plugin in {*registry.names("plugin"), *THEIR_OWN}


def _commands(text: str) -> list[list[str]]:
    """Split each metaplug command of a block of shell into words, variables left out."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = (
                shlex.split(line, comments=True)
                if "$" not in line and line.count('"') % 2 == 0
                else []
            )
            if words[:1] == ["metaplug"] or words[:1] == ["torchrun"]:
                found.append(words[words.index("metaplug") + 1 :])
    return found


def test_the_picture_of_a_meta_step_has_every_hook_that_it_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(DOCS)
    drawn = re.findall(r"hooks/#(\w+)", importlib.import_module("meta_step").pictures())
    assert set(drawn) == hookspecs.KINDS.keys() - {"select_adapted", "setup", "task_parameters"}


def test_every_file_that_a_page_includes_is_there() -> None:
    included = {
        path
        for page in PAGES
        for path in re.findall("<!-- include (.+?) -->", page.read_text(encoding="utf-8"))
    }
    assert included == {"examples/conflict-projection/conflict_projection.py"}
    assert all((DOCS / path).is_file() for path in included)
