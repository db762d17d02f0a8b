"""What is installed: plugins, presets, task sources and models, found by entry point. Listing names imports nothing."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.metadata import EntryPoint
from typing import Any

from metaplug.errors import RequestError, RunError, unknown

GROUPS = {
    "plugin": "metaplug.plugins",
    "preset": "metaplug.presets",
    "task source": "metaplug.tasks",
    "model": "metaplug.models",
}
"""The entry-point group of every kind of part."""


@dataclass(frozen=True)
class Part:
    """One row of a listing: an installed part, or the error that it gives when loaded.

    Attributes:
        distribution, version: of the package that it comes from; of one without metadata the module, and None.
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
    """What installed packages offer in a group; of one that is found twice, what Python would import counts.

    The current folder offers nothing: it may be what somebody sent. Nor does what a build has left there hide what is installed.
    """
    found: dict[str, list[EntryPoint]] = {}
    for distribution in metadata.distributions(path=[place for place in sys.path if place]):
        if entries := list(distribution.entry_points.select(group=group)):
            found.setdefault(distribution.name, entries)
    return [entry for entries in found.values() for entry in entries]


def names(kind: str) -> list[str]:
    """The names of the installed parts of a kind ("plugin", "preset", "task source", "model"), sorted. Imports nothing."""
    return sorted({entry.name for entry in entry_points(group=GROUPS[kind])})


def load(kind: str, name: str) -> Any:
    """The part of this kind and name. A plugin in its shortest form, a module or function, is its class.

    Raises:
        RequestError: nothing of that name is installed (the nearest is offered), two distributions offer it, or it breaks the contract.
        RunError: it is installed but does not import, or is no part of its kind.
    """
    from metaplug.contract.parts import checked

    found = _found(kind, name)
    if not found:
        raise unknown(kind, name, names(kind))
    origins = sorted({_origin(entry) for entry in found})
    if len({entry.value for entry in found}) > 1:
        raise RequestError(
            f"two installed packages offer the {kind} '{name}': {' and '.join(origins)}; uninstall one of them"
        )
    try:
        value = found[0].load()
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunError(
            f"the {kind} '{name}' of {origins[0]} does not load: {reason}; correct it there, or uninstall it"
        ) from error
    return checked(kind, name, value, origins[0])


def name_of(kind: str, part: type) -> str | None:
    """The name under which a class is installed as a part of this kind; None where it is not. Imports nothing."""
    value = getattr(
        part, "written_as", f"{part.__module__}:{part.__qualname__}"
    )  # what a shortest form is made of, or the class itself
    return next(
        (entry.name for entry in entry_points(group=GROUPS[kind]) if entry.value == value), None
    )


def parts(kind: str) -> list[Part]:
    """Every installed part of a kind, loaded; a broken one is a row with its error."""
    return [_part(kind, name) for name in names(kind)]


def origin_of(kind: str, name: str) -> str:
    """The distribution, with its version, that a part comes from; several where several offer it. Imports nothing."""
    return ", ".join(sorted({_origin(entry) for entry in _found(kind, name)}))


def versions_of(kind: str, name: str) -> dict[str, str]:
    """The version of the distribution that a part comes from, by its name. Imports nothing."""
    return {
        distribution: version
        for distribution, version in map(_package, _found(kind, name))
        if version
    }


def _part(kind: str, name: str) -> Part:
    found = _found(kind, name)
    distributions, versions = (
        ", ".join(sorted({each for each in column if each}))
        for column in zip(*map(_package, found), strict=True)
    )
    try:
        return Part(kind, name, distributions, versions or None, value=load(kind, name))
    except (RequestError, RunError) as error:
        return Part(kind, name, distributions, versions or None, error=str(error))


def _found(kind: str, name: str) -> list[EntryPoint]:
    return [entry for entry in entry_points(group=GROUPS[kind]) if entry.name == name]


def _origin(entry: EntryPoint) -> str:
    return " ".join(filter(None, _package(entry)))


def _package(entry: EntryPoint) -> tuple[str, str | None]:
    return (entry.dist.name, entry.dist.version) if entry.dist else (entry.module, None)
