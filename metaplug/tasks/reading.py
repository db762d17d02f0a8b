"""Files of others, opened so that neither their kind nor their size nor their words do harm."""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from metaplug.errors import RequestError, one_line

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Breaks a line, a terminal or the order of words; surrogates are bytes that are not UTF-8."""


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading, without waiting.

    Raises:
        OSError: it cannot be opened, or it is no regular file: a pipe would wait for ever, a
            device never end.
    """
    # Without O_NONBLOCK, opening a pipe waits for a writer. Windows has no such pipes.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, most: int) -> bytes:
    """Read all of a file.

    Raises:
        OSError: as `open_regular` raises; or the file has more than `most` bytes, or changes in
            size while it is read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            fault = f"it has {size} bytes, more than the {most} that are read"
            raise OSError(errno.EFBIG, fault, str(path))
        data = file.read(size + 1)
    if len(data) != size:
        raise OSError(errno.EIO, "it changes while it is read", str(path))
    return data


def no_number(name: str) -> NoReturn:
    """Refuse NaN and Infinity for `json.loads`, which takes them although JSON has none."""
    raise ValueError(f"{name} is no number in JSON")


def keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that stands twice for `json.loads`, which takes the last in silence."""
    given: dict[str, Any] = {}
    for key, value in pairs:
        if key in given:
            raise ValueError(f"the key '{one_line(key, 80)}' stands twice")
        given[key] = value
    return given


class Names:
    """Names of classes or tasks, of which no two look alike.

    Args:
        what: they are of, for errors.

    >>> names = Names("class")
    >>> for name in ("cat", "dog", "cat"):
    ...     names.add(name, "row 1")
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._by_looks: dict[str, str] = {}
        self._known: set[str] = set()

    def add(self, name: str, where: str) -> None:
        """Take a name, which may be known already.

        Raises:
            RequestError: it differs from another in outer spaces, or in how Unicode composes its
                letters, alone: they would be two classes, of which one may be trained on and the
                other tested.
        """
        if name in self._known:
            return
        self._known.add(name)
        looks = unicodedata.normalize("NFC", name).strip()
        if (other := self._by_looks.setdefault(looks, name)) != name:
            raise RequestError(
                f"{where}: the {self._what} {name!a} looks as {other!a} does, and would "
                "be another one: write both alike"
            )


def cache_folder() -> Path:
    """The folder of what is kept to be read again: letters, decoded images, downloads.

    $METAPLUG_CACHE, else $XDG_CACHE_HOME/metaplug, else ~/.cache/metaplug.
    """
    if chosen := os.environ.get("METAPLUG_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metaplug"
