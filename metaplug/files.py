"""Files that outlive a crash: written whole or not at all, in an order that survives it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from metaplug.errors import RunError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which then takes the place of `path`.

    At every moment `path` is the whole old file or the whole new one. A pipe or a character device,
    as /dev/null, is written into, since nothing can take its place.

    Raises:
        RunError: the disk is full, or the folder cannot be written or is gone; an older file at
            `path` is as it was.
    """
    if _is_stream(path):
        with _into(path) as file:
            yield file
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        kept = (
            "the one that stood there is untouched" if path.exists() else "nothing was left there"
        )
        raise RunError(
            f"cannot write {path}: {_reason(error)}; {kept}; make room or give another place, then "
            "do it again"
        ) from error
    else:
        try:
            sync_folder(path.parent)
        except OSError as error:
            raise RunError(
                f"{path} is written, but may be gone if the machine fails now: {_reason(error)}; "
                "see to the disk"
            ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _is_stream(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


@contextmanager
def _into(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("wb") as file:
            yield file
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {_reason(error)}; give another place, then do it again"
        ) from error


def append(path: Path, text: str, *, durable: bool) -> None:
    """Add to a file that is there.

    Args:
        path: of the file.
        text: to add.
        durable: whether all that was ever added is on the disk when this returns.

    Raises:
        RunError: the disk is full, or the file cannot be written or is gone.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "ab") as file:
            file.write(text.encode())
            file.flush()
            if durable:
                os.fsync(descriptor)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {_reason(error)}; make room, or bring back what is gone, then "
            "go on with --resume"
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, durably.

    Raises:
        OSError: the file system's own.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make durable what was named, renamed or removed in a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # folders cannot be opened everywhere
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems do not know how to make a folder durable.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    """The file system's own words, which torch hides behind an error of its own."""
    cause = error if isinstance(error, OSError) else error.__context__
    return (isinstance(cause, OSError) and cause.strerror) or str(error)
