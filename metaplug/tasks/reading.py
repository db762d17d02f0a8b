"""Files of others: read so that neither their kind nor their size nor their words do harm."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO, NoReturn

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What breaks a line, a terminal or the order of words in it; surrogates are bytes that are not UTF-8."""


def open_regular(path: Path) -> BinaryIO:
    """A file, opened for reading without waiting.

    Raises:
        OSError: it cannot be opened, or it is no regular file: a pipe would wait for ever, a device never end.
    """
    # Without O_NONBLOCK, opening a pipe waits for somebody to write into it. Windows has no such pipes.
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, most: int) -> bytes:
    """All of a file.

    Raises:
        OSError: as `open_regular` raises, or the file has more than `most` bytes, or changes in size while it is read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(
                errno.EFBIG, f"it has {size} bytes, more than the {most} that are read", str(path)
            )
        data = file.read(size + 1)
    if len(data) != size:
        raise OSError(errno.EIO, "it changes while it is read", str(path))
    return data


def no_number(name: str) -> NoReturn:
    """What `json.loads` is to do with NaN and Infinity, which Python reads although JSON does not have them."""
    raise ValueError(f"{name} is no number in JSON")
