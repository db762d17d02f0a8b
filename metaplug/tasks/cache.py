"""Checksummed files in the cache folder: read whole or not at all, and written whole.

A cache is never needed. So nothing here raises: a file that is missing or damaged reads as None,
one that cannot be written is done without, and a line in the log says so.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path

from metaplug.errors import RunError
from metaplug.files import replacing
from metaplug.tasks.reading import open_regular

_DIGEST_BYTES = 32
"""The checksum at the start of a file: BLAKE2b of the file's name and of all that follows."""

_log = logging.getLogger(__name__)


def read_cached(path: Path, most_bytes: int, noun: str) -> bytearray | None:
    """Read what `write_cached` put at `path`.

    A file that is read counts as used now, which `make_room` goes by.

    Args:
        path: of the file. Its name belongs to the checksum, so a renamed file reads as damaged.
        most_bytes: bound on the content; a larger file is not read.
        noun: the content in the plural, such as "letters", for the log.

    Returns:
        The content, or None where the file is missing, damaged, too large or cannot be read.
    """
    try:
        with open_regular(path) as file:
            size = max(os.fstat(file.fileno()).st_size - _DIGEST_BYTES, 0)
            if size > most_bytes:
                fault = f"they have {size} bytes, more than the {most_bytes} that are read"
                raise OSError(errno.EFBIG, fault, str(path))
            checksum = file.read(_DIGEST_BYTES)
            content = bytearray(size)  # not `read`, whose bytes would have to be copied to write on
            whole = file.readinto(content) == size
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.info("the cached %s in %s cannot be read (%s): making them anew", noun, path, error)
        return None
    if not whole or _checksum(path, content) != checksum:
        _log.info("the cached %s in %s fail their checksum: making them anew", noun, path)
        return None
    with suppress(OSError):  # others' folders may be read, but not touched
        os.utime(path)
    return content


def write_cached(path: Path, *parts: bytes | bytearray | memoryview, noun: str) -> None:
    """Put the parts, one after the other, in a file that appears whole or not at all.

    Other processes may be reading the file, or writing the same.

    Args:
        path: of the file; its folder is made where it is missing.
        parts: bytes, or one-dimensional views of bytes.
        noun: as for `read_cached`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(_checksum(path, *parts))
            for part in parts:
                file.write(part)
    except (OSError, RunError) as error:
        _log.info("the %s are not cached (%s): they are made at every start", noun, error)


def make_room(folder: Path, new_bytes: int, most_bytes: int) -> None:
    """Remove files of a cache folder, the longest unused first, until `new_bytes` more fit in.

    Args:
        folder: that holds cached files and nothing else; it may be missing.
        new_bytes: about to be written.
        most_bytes: bound on all files together.
    """
    try:
        found = [(path, path.stat()) for path in folder.iterdir() if path.is_file()]
    except OSError:  # no such folder; or another process removes files of it at this moment
        return
    left = sum(status.st_size for _, status in found) + new_bytes
    for path, status in sorted(found, key=lambda pair: pair[1].st_mtime_ns):
        if left <= most_bytes:
            return
        with suppress(OSError):
            path.unlink()
            left -= status.st_size


def _checksum(path: Path, *parts: bytes | bytearray | memoryview) -> bytes:
    hashed = hashlib.blake2b(path.name.encode(errors="surrogateescape"), digest_size=_DIGEST_BYTES)
    for part in parts:
        hashed.update(part)
    return hashed.digest()
