"""Scaffolds of new parts: packages made of the folders here, one for each kind.

Its name stands in place of my-idea; `common` has what every package gets.
"""

from __future__ import annotations

import keyword
import re
import sys
from dataclasses import dataclass
from datetime import date
from importlib.machinery import PathFinder
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import metaplug
from metaplug.contract import registry
from metaplug.contract.naming import camel, is_kebab, kebab
from metaplug.errors import RequestError, RunError

LONGEST = 40
"""Letters of a name, so that the lines of the templates stay within their bound."""


@dataclass(frozen=True)
class Scaffold:
    """A kind of package: its kind in the registry, its name for people, the command to list it."""

    part: str
    words: str
    listed: str = "metaplug plugins"


SCAFFOLDS = {
    "gradient": Scaffold("plugin", "plugin that transforms inner gradients"),
    "inner-loss": Scaffold("plugin", "plugin that regularises the inner loss"),
    "outer-loss": Scaffold("plugin", "plugin that regularises the outer loss"),
    "learning-rate": Scaffold("plugin", "plugin that changes inner learning rates"),
    "initialisation": Scaffold("plugin", "plugin that gives every task a start of its own"),
    "task-variables": Scaffold("plugin", "plugin with variables that every task adapts"),
    "update-rule": Scaffold("plugin", "plugin that replaces the inner update"),
    "tasks": Scaffold("task source", "task source", "metaplug tasks"),
    "model": Scaffold("model", "model"),
    "preset": Scaffold("preset", "preset"),
    "logger": Scaffold("logger", "logger"),
}
"""By kind; each has a folder of its name in `metaplug/templates`."""


@dataclass(frozen=True)
class FilePlugin:
    """What a package has of a plugin's file, in place of a scaffold.

    Attributes:
        source: the content of the file.
        class_name: of the plugin in it; None where its marked functions are the plugin.
        readme: its beginning, before the common part.
        test: of the contract.
    """

    source: str
    class_name: str | None
    readme: str
    test: str


_PLACES = {
    "test_my_idea.py": "tests/test_my_idea.py",
    "gitignore": ".gitignore",
    "test.yml": ".github/workflows/test.yml",
}
"""Where a file goes that does not stay at the top."""


def write_package(
    name: str, kind: str, folder: Path, of_file: FilePlugin | None = None
) -> list[Path]:
    """Write a package that is ready to be installed, tested and published.

    Args:
        name: of the part, in kebab-case, at most 40 letters; kind: one of SCAFFOLDS.
        folder: made here, with those above it; an empty one may exist.
        of_file: the plugin of the package, which takes the place of the scaffold's.

    Returns the files, sorted, relative to the folder.

    Raises:
        RequestError: the name is not valid, or taken; or there is something in the folder.
        RunError: the folder cannot be written.
    """
    scaffold = SCAFFOLDS[kind]
    _check_name(name, scaffold.part)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RequestError(
            f"{folder} already exists, and nothing is written over: "
            "give another --out, or another name"
        )
    written = _filled(name, kind, scaffold.part, of_file)
    try:
        for place, text in written.items():
            path = folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"cannot write {error.filename}: {error.strerror}; give another --out"
        ) from error
    return sorted(map(Path, written))


def _filled(name: str, kind: str, part: str, of_file: FilePlugin | None) -> dict[str, str]:
    """The files by place."""
    module, found = _module(name), dict[str, str]()
    sources = [kind, "common"]
    own: str | None = module.upper() if part == "preset" else camel(name)
    if of_file is not None:
        sources, own = ["common"], of_file.class_name
        found = {f"{module}.py": of_file.source, f"tests/test_{module}.py": of_file.test}
        found["README.md"] = of_file.readme
    words = {
        "my_idea:OBJECT": f"{module}:{own}" if own else module,  # before the name alone
        "my-idea": name,
        "my_idea": module,
        "MyIdea": camel(name),
        "MY_IDEA": module.upper(),
        "GROUP": registry.GROUPS[part],
        "VERSION": metaplug.__version__,
        "YEAR": str(date.today().year),
    }
    pattern = re.compile("|".join(words))
    for source in sources:
        folder = files("metaplug") / "templates" / source
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            if not file.is_file():
                continue  # the cache of a linter, or what pip compiled
            place = _PLACES.get(file.name, file.name).replace("my_idea", module)
            text = pattern.sub(lambda match: words[match[0]], file.read_text(encoding="utf-8"))
            # The README begins with what the kind has to say, and goes on with the common part.
            found[place] = found.get(place, "") + text
    return found


def _check_name(name: str, part: str) -> None:
    module, back = _module(name), kebab(camel(name))
    where, another = f"'{name}' cannot name a {part}", "choose another name"
    if not is_kebab(name):
        fault = f"{where}: use lower-case letters, digits and single hyphens, as in 'my-idea'"
    elif len(name) > LONGEST:
        fault = f"{where}: it has {len(name)} letters; use at most {LONGEST}"
    elif keyword.iskeyword(module) or keyword.issoftkeyword(module):
        fault = f"{where}, as its module would be called {module}, a keyword of Python: {another}"
    elif back != name:
        advice = "begin every part of the name with a letter, and give it two or more"
        fault = f"{where}, as its class {camel(name)} would be read as '{back}': {advice}"
    elif name in registry.names(part):
        origin = registry.origin_of(part, name)
        fault = f"the {part} '{name}' is installed already, by {origin}: {another}"
    elif _is_module(module):
        why = f"there is a module {module} already, and one of the two would hide the other"
        fault = f"{where}, as {why}: {another}"
    else:
        return
    raise RequestError(fault)


def _is_module(module: str) -> bool:
    """Whether a module of this name can be imported from elsewhere than the current folder.

    A file there is the idea that becomes a package. It is looked for last, so it hides nothing.
    """
    here = Path.cwd()
    if PathFinder.find_spec(module, [str(here)]) is None:
        return find_spec(module) is not None
    elsewhere = [place for place in sys.path if Path(place).resolve() != here.resolve()]
    return module in sys.stdlib_module_names or PathFinder.find_spec(module, elsewhere) is not None


def _module(name: str) -> str:
    return name.replace("-", "_")
