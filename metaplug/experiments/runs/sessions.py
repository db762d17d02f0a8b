"""What repeating a run takes beside its configuration: commands, versions, commits and devices."""

from __future__ import annotations

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import metaplug
from metaplug.errors import RunError
from metaplug.experiments.build import Experiment
from metaplug.experiments.json_values import environment
from metaplug.experiments.runs.layout import RECORD


def session(experiment: Experiment) -> dict[str, Any]:
    """Plain values that describe this process, which goes on from the learner's iteration."""
    surroundings = environment(experiment.learner)
    del surroundings["batching"]  # not known before a batch
    return {
        "command": _command(),
        "folder": str(Path.cwd()),
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "iteration": experiment.learner.iteration,
        "seed": experiment.config.seed,
        "process": {"pid": os.getpid(), "host": socket.gethostname()},
        "platform": platform.platform(),
        "commits": {
            "metaplug": _commit(Path(metaplug.__file__).parent),
            "folder": _commit(Path.cwd()),
        },
        **surroundings,
    }


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """The sessions of the run in a folder, the oldest first; none where it has no run.json yet.

    Raises:
        RunError: the file cannot be read, or is not one of metaplug's.
    """
    path = folder / RECORD
    try:
        sessions: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["sessions"]
        if isinstance(sessions, list) and all(isinstance(one, dict) for one in sessions):
            return sessions
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    mend = "remove it, and the run goes on with a new one"
    raise RunError(f"{path} is not the record of a run that metaplug wrote: {mend}")


def _command() -> str:
    """The command line, as far as Python knows it."""
    program, *arguments = sys.argv
    name = "metaplug" if Path(program).name in ("metaplug", "__main__.py") else program
    return shlex.join([name, *arguments])


@cache
def _commit(folder: Path) -> str | None:
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
