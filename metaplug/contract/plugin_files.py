"""Plugins in a Python file that is not installed, to try an idea: named by the file's path.

Loading one runs it. So it is loaded only where a caller, a command line or a configuration given
there names it, and never because a run's own record or a checkpoint does.
"""

from __future__ import annotations

import hashlib
import sys
import traceback
from pathlib import Path
from types import FunctionType, ModuleType

from metaplug.contract import registry
from metaplug.contract.function_plugins import plugin_of
from metaplug.contract.hookspecs import KINDS
from metaplug.contract.naming import is_kebab, kebab
from metaplug.contract.plugin import Plugin
from metaplug.contract.plugin_checks import check_plugin
from metaplug.contract.registry import Part
from metaplug.errors import RequestError, RunError, one_line, reason, said_by

_LOADED: dict[tuple[Path, str], type[Plugin]] = {}
"""By resolved path and digest: the same file gives the same class, whoever asks."""
_RECORDED: set[str] = set()
"""Digests of the files of runs: a plugin installed since may have the name of one."""


def is_file(plugin: str) -> bool:
    """Whether a plugin is asked for by a path, which no installed one's name can be.

    >>> is_file("./my_idea.py"), is_file("my-idea")
    (True, False)
    """
    return plugin.endswith(".py") or "/" in plugin or "\\" in plugin


def name_in(path: str) -> str:
    """The plugin's name: that of its file, in kebab-case.

    >>> name_in("ideas/my_idea.py")
    'my-idea'
    """
    return kebab(Path(path).stem)


def source_of(path: str, sha256: str | None = None) -> tuple[bytes, str]:
    """The content of a plugin file, which is not run, and its SHA-256.

    Args:
        path: of a .py file.
        sha256: the digest that it has to have; None for any.

    Raises:
        RequestError: there is no such file, or it was changed.
        RunError: it cannot be read.
    """
    source = _read(path)
    digest = hashlib.sha256(source).hexdigest()
    if sha256 not in (None, digest):
        raise changed(path, str(sha256), digest, "it was recorded")
    return source, digest


def changed(path: str, then: str, now: str, since: str, copy: Path | None = None) -> RequestError:
    """The error for a file that is no longer the one of a digest.

    Args:
        copy: of the file as it was, where one is kept.
    """
    other = "or" if copy is None else f"give --with {copy}, the copy of it then, or"
    return RequestError(
        f"the plugin file {path} has changed since {since} (sha256 {then[:12]}… then, {now[:12]}… "
        f"now): bring it back as it was, {other} take it as it is for a new run"
    )


def keep_name(sha256: str) -> None:
    """Let the file of this digest load though a plugin of its name is installed by now.

    A run's record tells the two apart by the digest, so whoever checked it there says so here.
    """
    _RECORDED.add(sha256)


def load(path: str, sha256: str | None = None) -> type[Plugin]:
    """Run a plugin file and return the plugin in it: a class P(Plugin), or marked functions.

    Args:
        path: of a .py file.
        sha256: the digest that it has to have; None for any.

    Raises:
        RequestError: there is no such file; it is not Python, was changed, holds no plugin or
            two, has the name of an installed plugin (`keep_name` allows it), or breaks the
            contract.
        RunError: it fails when it is run.
    """
    (source, digest), place = source_of(path, sha256), Path(path).resolve()
    if (found := _LOADED.get((place, digest))) is not None:
        return found
    name = name_in(path)
    if not is_kebab(name):
        raise RequestError(
            f"the plugin file {path} would give its plugin the name '{name}', which none can have: "
            "rename it with lower-case letters, digits and underscores, as my_idea.py"
        )
    if digest not in _RECORDED:
        _check_free(f"the plugin file {path}", name, "file")
    found = _plugin_in(_run(path, place, source, digest), path)
    if digest not in _RECORDED and not hasattr(found, "written_as"):
        _check_free(f"the class {found.__name__} of the plugin file {path}", found.kind(), "class")
    check_plugin(found, name)
    _LOADED[place, digest] = found
    return found


def part_of(path: str) -> Part:
    """Load a plugin file as a part beside the installed ones; for the errors see `load`."""
    return Part("plugin", name_in(path), path, value=load(path))


def origin_of(plugin: type[Plugin]) -> dict[str, str] | None:
    """The path and the SHA-256 of the file that a plugin's class is from; None for other ones."""
    places = (place for place, known in _LOADED.items() if known is plugin)
    return next(({"path": str(path), "sha256": digest} for path, digest in places), None)


def _read(path: str) -> bytes:
    place = Path(path)
    if place.suffix != ".py":
        raise RequestError(
            f"the plugin file {path} does not end in .py: give a Python file, or the name of an "
            "installed plugin"
        )
    if not place.exists():
        raise RequestError(f"there is no plugin file {path}: give the path of a Python file")
    if not place.is_file():  # a pipe or device may have no end
        raise RequestError(f"the plugin file {path} is no regular file: give a Python file")
    try:
        return place.read_bytes()
    except OSError as error:
        raise RunError(
            f"cannot read the plugin file {path}: {reason(error)}; see to its permissions"
        ) from error


def _run(path: str, place: Path, source: bytes, digest: str) -> ModuleType:
    """Run the file as a module, which dataclasses and pydantic find by its name."""
    try:
        code = compile(source, str(place), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:  # ValueError: of a null byte, in older Pythons
        line = getattr(error, "lineno", None)
        said = one_line(getattr(error, "msg", None) or error)
        raise RequestError(
            f"the plugin file {path} is not Python ({said}{f', line {line}' if line else ''}): "
            "correct it there"
        ) from error
    # The digest keeps two files of one name apart, and two states of one file.
    module = ModuleType(f"plugin_file_{digest[:12]}.{place.stem}")
    module.__file__ = str(place)
    sys.modules[module.__name__] = module
    try:
        exec(code, vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == str(place)]
        where = f", line {lines[-1]}" if lines else ""
        raise RunError(
            f"the plugin file {path} does not load ({said_by(error)}{where}): correct it there"
        ) from error
    return module


def _plugin_in(module: ModuleType, path: str) -> type[Plugin]:
    """The one plugin that a module defines."""
    where, named = f"the plugin file {path}", module.__name__
    own = [each for each in vars(module).values() if getattr(each, "__module__", None) == named]
    classes = [each for each in own if isinstance(each, type) and issubclass(each, Plugin)]
    functions = [each for each in own if isinstance(each, FunctionType)]
    marked = [each.__name__ for each in functions if hasattr(each, "metaplug_impl")]
    if len(classes) > 1:
        names = " and ".join(each.__name__ for each in classes[:2])
        raise RequestError(
            f"{where} holds {len(classes)} plugins, {names}: leave one in it, and give each other "
            "one a file of its own"
        )
    if classes and marked:
        raise RequestError(
            f"{where} holds the class {classes[0].__name__} and beside it the marked function "
            f"{marked[0]}, which are two plugins: leave one of them in it"
        )
    if classes:
        return classes[0]
    if marked:
        return plugin_of(module)
    if unmarked := [each.__name__ for each in functions if each.__name__ in KINDS]:
        raise RequestError(
            f"{where} holds no plugin, as its function {unmarked[0]} is not marked: put @hookimpl "
            "above it"
        )
    raise RequestError(
        f"{where} holds no plugin: write a class P(Plugin) in it, or functions marked @hookimpl"
    )


def _check_free(what: str, name: str, rename: str) -> None:
    if name in registry.names("plugin"):
        origin = registry.origin_of("plugin", name)
        raise RequestError(
            f"{what} has the name of the installed plugin '{name}' ({origin}), and no record could "
            f"tell the two apart: rename the {rename}, or give the name without a path"
        )
