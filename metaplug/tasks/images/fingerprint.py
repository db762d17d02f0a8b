"""A digest of a folder of images by its listing, without opening an image."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from metaplug.tasks.identities import digest
from metaplug.tasks.images.class_files import SUFFIXES
from metaplug.tasks.images.walking import walk
from metaplug.tasks.reading import open_regular

_TAIL_BYTES = 8 * 2**20
"""Read from the end of a zip, where the names, sizes and CRC sums of its members stand."""


def fingerprint(root: Path) -> str:
    """The digest of everything that a change of the images below `root` would change.

    For each image and each zip: its path, size, and times of the last change to its content
    (mtime) and to its inode (ctime); for a zip also its list of members, as far as it stands in
    the last 8 MiB.

    The limit of it: an image that is overwritten by another one of the same size stays unnoticed
    where both times stay the same too. On Linux and macOS that takes a clock that was set back, or
    a file system with times too coarse to tell; on Windows, where ctime is when the file was made,
    setting mtime back is enough.

    Args:
        root: a folder, or a zip.

    Raises:
        OSError, RecursionError: it cannot be listed.
        RequestError: two links in it lead to one folder.
    """
    return digest(*(part for path in sorted(_paths(root)) for part in _described(path)))


def _paths(root: Path) -> Iterator[str]:
    """The images below a folder, hidden ones included, and the zips in it; or the zip itself."""
    top = str(root.absolute())
    if root.is_file():
        yield top
        return
    for folder, _, names in walk(top, _raise):
        suffixes = (*SUFFIXES, ".zip") if folder == top else SUFFIXES
        for name in names:
            if name.lower().endswith(suffixes):
                yield os.path.join(folder, name)  # noqa: PTH118  (a Path takes longer than stat)


def _raise(error: OSError) -> NoReturn:
    raise error


def _described(path: str) -> Iterator[bytes]:
    status = os.stat(path)  # noqa: PTH116
    yield os.fsencode(path)
    yield b"%d %d %d" % (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if not path.lower().endswith(SUFFIXES) and stat.S_ISREG(status.st_mode):
        with open_regular(Path(path)) as file:
            file.seek(max(status.st_size - _TAIL_BYTES, 0))
            yield hashlib.file_digest(file, "sha256").digest()  # in small blocks
