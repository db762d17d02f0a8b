"""A new part as a package of its own: the files of `metaplug/templates`, with its name in place of my-idea."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass
from datetime import date
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import metaplug
from metaplug.contract import registry
from metaplug.contract.naming import camel, is_kebab, kebab
from metaplug.errors import RequestError, RunError

LONGEST = 40
"""Letters of a name, so that the lines of the templates stay within their bound."""


@dataclass(frozen=True)
class Scaffold:
    """What can be made.

    Attributes:
        part: the kind of part, as the registry has it.
        words: what it is, for people.
        listed: the command that lists it, without its name.
    """

    part: str
    words: str
    listed: str = "metaplug plugins"


SCAFFOLDS = {
    "gradient": Scaffold("plugin", "plugin that transforms inner gradients"),
    "inner-loss": Scaffold("plugin", "plugin that regularises the inner loss"),
    "outer-loss": Scaffold("plugin", "plugin that regularises the outer loss"),
    "learning-rate": Scaffold("plugin", "plugin that changes inner learning rates"),
    "tasks": Scaffold("task source", "task source", "metaplug tasks"),
    "model": Scaffold("model", "model"),
    "preset": Scaffold("preset", "preset"),
}
"""By kind; each has a folder of its name in `metaplug/templates`."""

_PLACES = {
    "my_idea.py": "my_idea.py",
    "test_my_idea.py": "tests/test_my_idea.py",
    "gitignore": ".gitignore",
    "test.yml": ".github/workflows/test.yml",
}
"""Where a file goes that does not stay at the top."""


def write_package(name: str, kind: str, folder: Path) -> list[Path]:
    """Write a package that is ready to be installed, tested and published.

    Args:
        name: of the part, in kebab-case, at most 40 letters.
        kind: one of SCAFFOLDS.
        folder: made here, with those above it; an empty one may exist.

    Returns:
        The files, sorted, relative to the folder.

    Raises:
        RequestError: the name is not valid, or taken; or there is something in the folder.
        RunError: the folder cannot be written.
    """
    scaffold = SCAFFOLDS[kind]
    _check_name(name, scaffold.part)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RequestError(
            f"{folder} already exists, and nothing is written over: give another --out, or another name"
        )
    written = _filled(name, kind, scaffold.part)
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


def _filled(name: str, kind: str, part: str) -> dict[str, str]:
    """The files by place."""
    words = {
        "my-idea": name,
        "my_idea": _module(name),
        "MyIdea": camel(name),
        "MY_IDEA": _module(name).upper(),
        "GROUP": registry.GROUPS[part],
        "OBJECT": _module(name).upper() if part == "preset" else camel(name),
        "VERSION": metaplug.__version__,
        "YEAR": str(date.today().year),
    }
    pattern = re.compile("|".join(words))
    found: dict[str, str] = {}
    for source in (kind, "common"):
        for file in sorted(
            (files("metaplug") / "templates" / source).iterdir(), key=lambda file: file.name
        ):
            if not file.is_file():
                continue  # the cache of a linter, or what pip compiled
            place = _PLACES.get(file.name, file.name).replace("my_idea", _module(name))
            # The README is what the kind has to say, and behind it what holds of every package.
            found[place] = found.get(place, "") + pattern.sub(
                lambda match: words[match[0]], file.read_text(encoding="utf-8")
            )
    return found


def _check_name(name: str, part: str) -> None:
    module = _module(name)
    where = f"'{name}' cannot name a {part}"
    if not is_kebab(name):
        raise RequestError(
            f"{where}: use lower-case letters, digits and single hyphens, as in 'my-idea'"
        )
    if len(name) > LONGEST:
        raise RequestError(f"{where}: it has {len(name)} letters; use at most {LONGEST}")
    if keyword.iskeyword(module) or keyword.issoftkeyword(module):
        raise RequestError(
            f"{where}, as its module would be called {module}, a keyword of Python: choose another name"
        )
    if kebab(camel(name)) != name:
        raise RequestError(
            f"{where}, as its class {camel(name)} would be read as '{kebab(camel(name))}': "
            "begin every part of the name with a letter, and give it two or more"
        )
    if name in registry.names(part):
        raise RequestError(
            f"the {part} '{name}' is installed already, by {registry.origin_of(part, name)}: choose another name"
        )
    if find_spec(module) is not None:
        raise RequestError(
            f"{where}, as there is a module {module} already, and one of the two would hide the other: choose another name"
        )


def _module(name: str) -> str:
    return name.replace("-", "_")
