"""What this process holds, as Linux tells it: nothing is installed for it, and elsewhere it is not known."""

from __future__ import annotations

import os
from pathlib import Path


def resident_mib(proc: Path = Path("/proc/self")) -> float | None:
    """The resident memory of this process, MiB; None where `proc` does not tell."""
    try:
        pages = int((proc / "statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files(proc: Path = Path("/proc/self")) -> int | None:
    """The file descriptors that this process has open; None where `proc` does not tell."""
    return _entries(proc / "fd")


def threads(proc: Path = Path("/proc/self")) -> int | None:
    """The threads of this process; None where `proc` does not tell."""
    return _entries(proc / "task")


def _entries(folder: Path) -> int | None:
    try:
        return len(os.listdir(folder))  # noqa: PTH208 -- a path for each entry would be made for nothing
    except OSError:
        return None
