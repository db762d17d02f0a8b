"""The errors that metaplug raises on purpose, and how their texts are made."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MetaplugError(Exception):
    """The base of every error that metaplug raises on purpose."""

    exit_status = 1


class RequestError(MetaplugError, ValueError):
    """A wrong name, field, file, shape or combination: it cannot be done as asked (status 2)."""

    exit_status = 2


class RunError(MetaplugError, RuntimeError):
    """A failure on the way: non-finite values, a plugin's fault, a broken file (status 1)."""


class RankError(RunError):
    """Another process of the run has ended, or does not answer."""


def quoted(names: Iterable[str]) -> str:
    """List names for a message, in single quotes and separated by commas."""
    return ", ".join(f"'{name}'" for name in names) or "none"


def one_line(text: object, most: int = 200) -> str:
    """Make a foreign text fit for a message: printable, in one line, of bounded length."""
    words = " ".join(str(text)[: 4 * most].split())
    line = "".join(letter if letter.isprintable() else "?" for letter in words)
    return line if len(line) <= most else f"{line[:most]}..."


def reason(error: BaseException) -> str:
    """Quote the error of another library or the system, in a message that names the file itself."""
    said = error.strerror if isinstance(error, OSError) else None
    return one_line(said or str(error) or type(error).__name__)


def said_by(error: BaseException) -> str:
    """Quote an error of foreign code with its kind, as its words may be no more than a key."""
    return f"{type(error).__name__}: {one_line(error, 300) or 'no message'}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Hint at the nearest known name, or at the known names, a hundred at most."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    more = f" and {len(known) - 100} more" if len(known) > 100 else ""
    return f"did you mean '{near[0]}'?" if near else f"known: {quoted(known[:100])}{more}"


def unknown(kind: str, name: str, known: Iterable[str]) -> RequestError:
    """Make the error for a name that is not known, with the nearest one offered.

    >>> str(unknown("model", "con4", ["conv4", "mlp"]))
    "unknown model 'con4': did you mean 'conv4'?"
    """
    return RequestError(f"unknown {kind} '{one_line(name)}': {did_you_mean(name, known)}")


def at_least_one(**counts: int | None) -> None:
    """Refuse a count below 1, by its name; None is none."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise RequestError(f"{name} = {count}: give at least 1")


def names_code(file: object, name: str, what: str = "model", option: str = "--model") -> str:
    """Say that a file names one's own code for a part of a run, with how to let it run.

    >>> names_code("a.yaml", "./my_idea.py", "plugin", "--with").partition(": ")[2]
    'if it is your own, give --with ./my_idea.py'
    """
    name = one_line(name)
    return (
        f"{file} names code for its {what}, '{name}', which nobody lets run because a file says "
        f"so: if it is your own, give {option} {name}"
    )
