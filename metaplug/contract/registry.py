"""Installed plugins, presets, task sources, models and loggers, found by entry point.

Listing names imports nothing; `load` imports the one part that is asked for, and checks its kind.

>>> "conv4" in names("model"), origin_of("model", "conv4").split()[0]
(True, 'metaplug')
>>> load("preset", "maml").name
'maml'
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from metaplug.errors import RequestError, RunError, unknown

GROUPS = {
    "plugin": "metaplug.plugins",
    "preset": "metaplug.presets",
    "task source": "metaplug.tasks",
    "model": "metaplug.models",
    "logger": "metaplug.loggers",
}
"""The entry-point group of every kind of part."""
ZOOS = ("torchvision", "transformers", "timm")
"""The libraries whose models are asked for as LIBRARY:NAME; other MODULE:NAME are user's code."""

_EXPECTED = {
    "plugin": "a subclass of metaplug.Plugin or a module with hooks",
    "preset": "a metaplug.Preset",
    "task source": "a subclass of metaplug.tasks.TaskSource",
    "model": "a class or function that makes a model",
    "logger": "a subclass of metaplug.Logger",
}


@dataclass(frozen=True)
class Part:
    """One row of a listing: an installed part, or the error that it gives when loaded.

    Without metadata, `distribution` is the module that it comes from, and `version` None.
    """

    kind: str
    name: str
    distribution: str
    version: str | None = None
    value: Any = None
    error: str | None = None

    @property
    def origin(self) -> str:
        """Distribution and version in one."""
        return self.distribution if self.version is None else f"{self.distribution} {self.version}"


def entry_points(group: str) -> list[EntryPoint]:
    """List what installed packages offer in a group; of two copies, the one that Python imports.

    The current folder offers nothing: it may be what somebody sent. Nor does what a build has left
    there hide what is installed.
    """
    places = [place for place in sys.path if place]
    return list(_entry_points(group, tuple((place, _changed(place)) for place in places)))


@lru_cache(maxsize=64)
def _entry_points(group: str, places: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """As above, of folders as they were when they last changed: reading all takes 50 ms."""
    found: dict[str, list[EntryPoint]] = {}
    for distribution in metadata.distributions(path=[place for place, _ in places]):
        if entries := list(distribution.entry_points.select(group=group)):
            found.setdefault(distribution.name, entries)
    return tuple(entry for entries in found.values() for entry in entries)


def _changed(place: str) -> int:
    """When a folder of modules last got or lost an entry, as by an installation."""
    try:
        return Path(place).stat().st_mtime_ns
    except OSError:
        return 0


def names(kind: str) -> list[str]:
    """List the installed parts of a kind, a key of GROUPS, sorted, without importing any."""
    return sorted({entry.name for entry in entry_points(group=GROUPS[kind])})


def load(kind: str, name: str) -> Any:
    """Import the part of this kind and name. A plugin in its shortest form becomes a class.

    Raises:
        RequestError: nothing or two parts of that name are installed, or it breaks the contract.
        RunError: it is installed but does not import, or is no part of its kind.
    """
    found = _found(kind, name)
    if not found:
        raise unknown(kind, name, names(kind))
    if len({entry.value for entry in found}) > 1:
        fault = f"two installed packages offer the {kind} '{name}': {' and '.join(_origins(found))}"
        raise RequestError(f"{fault}; uninstall one of them")
    try:
        value = found[0].load()
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunError(
            f"the {kind} '{name}' of {_origins(found)[0]} does not load: {reason}; "
            "correct it there, or uninstall it"
        ) from error
    part = _checked(kind, name, value)
    if part is None:
        is_class = isinstance(value, type)
        given = f"the class {value.__name__}" if is_class else f"of type {type(value).__name__}"
        raise RunError(
            f"the {kind} '{name}' of {_origins(found)[0]} is {given}, not {_EXPECTED[kind]}: "
            "correct its entry point, or uninstall it"
        )
    return part


def _checked(kind: str, name: str, value: Any) -> Any:
    """The part, a plugin held to the contract; None for something else than its kind asks for."""
    # torch takes seconds to import, and names need none of it.
    from metaplug.contract.function_plugins import is_shortest, plugin_of  # noqa: PLC0415
    from metaplug.contract.logger import Logger  # noqa: PLC0415
    from metaplug.contract.plugin import Plugin  # noqa: PLC0415
    from metaplug.contract.plugin_checks import check_plugin  # noqa: PLC0415
    from metaplug.contract.presets import Preset  # noqa: PLC0415

    if kind == "plugin":
        value = plugin_of(value) if is_shortest(value) else value
        fits = isinstance(value, type) and issubclass(value, Plugin) and value is not Plugin
        if fits:
            check_plugin(value, name)
    elif kind == "task source":
        # TaskSource stands above the contract, so it is known by its mark.
        fits = isinstance(value, type) and getattr(value, "part_kind", None) == kind
    elif kind == "logger":
        fits = isinstance(value, type) and issubclass(value, Logger) and value is not Logger
    else:
        fits = isinstance(value, Preset) if kind == "preset" else callable(value)
    return value if fits else None


def name_of(kind: str, part: type) -> str | None:
    """Find the name under which a class is installed, without importing; None if it is not."""
    # Of a shortest form it is the module or function that the entry point names.
    value = getattr(part, "written_as", f"{part.__module__}:{part.__qualname__}")
    entries = entry_points(group=GROUPS[kind])
    return next((entry.name for entry in entries if entry.value == value), None)


def parts(kind: str) -> list[Part]:
    """Load every installed part of a kind; a broken one is a row with its error."""
    return [_part(kind, name) for name in names(kind)]


def origin_of(kind: str, name: str) -> str:
    """Name the distributions, with versions, that offer a part, without importing it."""
    return ", ".join(_origins(_found(kind, name)))


def module_of(kind: str, name: str) -> str:
    """Name the module that offers an installed part, without importing it."""
    found = _found(kind, name)
    if not found:
        raise unknown(kind, name, names(kind))
    return found[0].module


def versions_of(kind: str, name: str) -> dict[str, str]:
    """Map the distributions that offer a part to their versions, without importing it."""
    packages = map(_package, _found(kind, name))
    return {distribution: version for distribution, version in packages if version}


def _part(kind: str, name: str) -> Part:
    columns = zip(*map(_package, _found(kind, name)), strict=True)
    distributions, versions = (", ".join(sorted({*filter(None, each)})) for each in columns)
    row = Part(kind, name, distributions, versions or None)
    try:
        return replace(row, value=load(kind, name))
    except (RequestError, RunError) as error:
        return replace(row, error=str(error))


def _found(kind: str, name: str) -> list[EntryPoint]:
    return [entry for entry in entry_points(group=GROUPS[kind]) if entry.name == name]


def _origins(found: Iterable[EntryPoint]) -> list[str]:
    """Name their distributions, with versions: read anew from files, so for messages alone."""
    return sorted({" ".join(filter(None, _package(entry))) for entry in found})


def _package(entry: EntryPoint) -> tuple[str, str | None]:
    return (entry.dist.name, entry.dist.version) if entry.dist else (entry.module, None)
