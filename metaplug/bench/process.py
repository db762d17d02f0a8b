"""What this process holds, as Linux tells it; None on other systems, where it is not known."""

from __future__ import annotations

import os
from pathlib import Path

_SELF = Path("/proc/self")


def resident_mib(proc: Path = _SELF) -> float | None:
    """Return the resident memory, MiB."""
    try:
        pages = int((proc / "statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files(proc: Path = _SELF) -> int | None:
    """Return the number of open file descriptors."""
    return _entries(proc / "fd")


def threads(proc: Path = _SELF) -> int | None:
    """Return the number of threads."""
    return _entries(proc / "task")


def _entries(folder: Path) -> int | None:
    try:
        return len(os.listdir(folder))  # noqa: PTH208 -- a path for each entry is made for nothing
    except OSError:
        return None
