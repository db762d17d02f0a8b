"""What is installed: plugins, presets, task sources and models, found by entry point. Listing imports nothing."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from metaplug.errors import RequestError, RunError, unknown

GROUPS = {"plugin": "metaplug.plugins", "preset": "metaplug.presets", "task source": "metaplug.tasks", "model": "metaplug.models"}
"""The entry-point group of every kind of part."""


@dataclass(frozen=True)
class Part:
    """One row of a listing: an installed part, or the error that it gives when loaded."""

    kind: str
    name: str
    origin: str
    value: Any = None
    error: str | None = None


def names(kind: str) -> list[str]:
    """The names of the installed parts of a kind ("plugin", "preset", "task source", "model"), sorted. Imports nothing."""
    return sorted({entry.name for entry in entry_points(group=GROUPS[kind])})


def load(kind: str, name: str) -> Any:
    """The part of this kind and name.

    Raises:
        RequestError: nothing of that name is installed (the nearest is offered), or two distributions offer it.
        RunError: it is installed but does not import.
    """
    found = [entry for entry in entry_points(group=GROUPS[kind]) if entry.name == name]
    if not found:
        raise unknown(kind, name, names(kind))
    origins = sorted({_origin(entry) for entry in found})
    if len({entry.value for entry in found}) > 1:
        raise RequestError(f"two installed packages offer the {kind} '{name}': {' and '.join(origins)}; uninstall one of them")
    try:
        return found[0].load()
    except Exception as error:
        raise RunError(f"the {kind} '{name}' of {origins[0]} does not load: {type(error).__name__}: {error}") from error


def name_of(kind: str, part: type) -> str | None:
    """The name under which a class is installed as a part of this kind; None where it is not. Imports nothing."""
    return next((entry.name for entry in entry_points(group=GROUPS[kind]) if entry.value == f"{part.__module__}:{part.__qualname__}"), None)


def parts(kind: str) -> list[Part]:
    """Every installed part of a kind, loaded; a broken one is a row with its error."""
    return [_part(kind, name) for name in names(kind)]


def _part(kind: str, name: str) -> Part:
    origin = ", ".join(sorted({_origin(entry) for entry in entry_points(group=GROUPS[kind]) if entry.name == name}))
    try:
        return Part(kind, name, origin, value=load(kind, name))
    except (RequestError, RunError) as error:
        return Part(kind, name, origin, error=str(error))


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.module
