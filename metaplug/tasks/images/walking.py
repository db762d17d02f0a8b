"""The folders below a root, those behind symbolic links too, each of them once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from metaplug.errors import RequestError


def walk(
    root: str | Path, onerror: Callable[[OSError], object]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, with the folders elsewhere that symbolic links lead to.

    A link into the root, whose folders are read in their own place, is passed over; so is one to a
    folder around the root, and a hidden one.

    Args:
        root: a folder.
        onerror: called with what forbids to list a folder.

    Raises:
        RequestError: two links lead to one folder, whose images would then count twice.
    """
    top, home = os.fspath(root), os.path.realpath(root)
    outside: dict[str, str] = {}
    """By true path, the folders behind links, as they were reached."""
    for folder, below, names in os.walk(top, onerror=onerror, followlinks=True):
        is_outside = not _is_within(os.path.realpath(folder), home)
        kept = []
        for name in below:
            path = os.path.join(folder, name)  # noqa: PTH118  (as os.walk has them)
            if not is_outside and not os.path.islink(path):  # noqa: PTH114
                kept.append(name)
                continue
            target = os.path.realpath(path)
            if name.startswith(".") or _is_within(target, home) or _is_within(home, target):
                continue
            if (first := outside.setdefault(target, path)) != path:
                raise RequestError(
                    f"the folders {first} and {path} are one by links, whose images would count "
                    "twice: remove a link"
                )
            kept.append(name)
        below[:] = kept
        yield folder, below, names


def _is_within(path: str, other: str) -> bool:
    """Whether a true path is another one, or below it."""
    return path == other or path.startswith(os.path.join(other, ""))  # noqa: PTH118
