"""The two ways in which metaplug fails, and the one way in which it offers the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MetaplugError(Exception):
    """The base of every error that metaplug raises on purpose."""

    exit_status = 1


class RequestError(MetaplugError, ValueError):
    """What was asked cannot be done as asked: a wrong name, field, file, shape or combination (exit status 2)."""

    exit_status = 2


class RunError(MetaplugError, RuntimeError):
    """A run that was rightly asked for failed on the way: non-finite numbers, a plugin's fault, a broken file (exit status 1)."""


class RankError(RunError):
    """Another process of the run has ended, or does not answer."""


def quoted(names: Iterable[str]) -> str:
    """Names for a message, in single quotes and separated by commas."""
    return ", ".join(f"'{name}'" for name in names) or "none"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name as a hint, or every known name where none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"known: {quoted(known)}"


def unknown(kind: str, name: str, known: Iterable[str]) -> RequestError:
    """The error for a name that is not known, with the nearest one offered."""
    return RequestError(f"unknown {kind} '{name}': {did_you_mean(name, known)}")
