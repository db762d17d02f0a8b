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


def one_line(text: object, most: int = 200) -> str:
    """What somebody else wrote, such as the content of a file, fit for a message: printable, without line breaks, of bounded length."""
    line = "".join(
        letter if letter.isprintable() else "?"
        for letter in " ".join(str(text)[: 4 * most].split())
    )
    return line if len(line) <= most else f"{line[:most]}..."


def reason(error: BaseException) -> str:
    """What another library or the system says in an error, in one line, for a message that names the file or part itself."""
    return one_line(
        (error.strerror if isinstance(error, OSError) else None)
        or str(error)
        or type(error).__name__
    )


def said_by(error: BaseException) -> str:
    """What somebody else's code says in an error, in one line, with the error's kind: the words alone may be no more than a key."""
    return f"{type(error).__name__}: {one_line(error, 300) or 'no message'}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name as a hint, or the known names, a hundred at most, where none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    more = f" and {len(known) - 100} more" if len(known) > 100 else ""
    return f"did you mean '{near[0]}'?" if near else f"known: {quoted(known[:100])}{more}"


def unknown(kind: str, name: str, known: Iterable[str]) -> RequestError:
    """The error for a name that is not known, with the nearest one offered."""
    return RequestError(f"unknown {kind} '{one_line(name)}': {did_you_mean(name, known)}")
