"""Which commit of a checkout a folder is."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path


@cache
def commit_of(folder: Path) -> str | None:
    """The commit of the checkout that tracks a folder, with "-dirty" where tracked files differ."""
    if not _git(folder, "ls-tree", "HEAD", "./"):
        return None
    head = _git(folder, "rev-parse", "--verify", "HEAD")
    is_dirty = head and _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if is_dirty else head


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of git, or None where it fails; it writes nothing there, and starts no monitor."""
    options = ["--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(folder)]
    try:
        done = subprocess.run(
            ["git", *options, *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
