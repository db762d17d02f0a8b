"""What a run needs to be repeated, beside its configuration: commands, versions, commits and devices of the processes that trained it."""

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
from metaplug.experiments.experiment import Experiment, environment

RECORD = "run.json"
"""The file of a run that holds its sessions, each a process that trained it: {"sessions": [...]}, the oldest first."""


def session(experiment: Experiment) -> dict[str, Any]:
    """The session of this process, which goes on from the learner's iteration; plain values, with what `environment` says."""
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
        **{
            name: value
            for name, value in environment(experiment.learner).items()
            if name != "batching"
        },  # not known before a batch
    }


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """The sessions of the run in a folder; none where it has no run.json yet.

    Raises:
        RunError: the file cannot be read, or is not one of metaplug's.
    """
    path = folder / RECORD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        sessions: list[dict[str, Any]] = values["sessions"]
        if isinstance(sessions, list) and all(isinstance(one, dict) for one in sessions):
            return sessions
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    raise RunError(
        f"{path} is not the record of a run that metaplug wrote: remove it, and the run goes on with a new one"
    )


def _command() -> str:
    """What was typed, as far as Python knows it."""
    program, *arguments = sys.argv
    name = "metaplug" if Path(program).name in ("metaplug", "__main__.py") else program
    return shlex.join([name, *arguments])


@cache
def _commit(folder: Path) -> str | None:
    """The commit of the git checkout that tracks a folder, with "-dirty" where tracked files differ from it; None where none does."""
    if not _git(folder, "ls-tree", "HEAD", "./"):
        return None
    head = _git(folder, "rev-parse", "--verify", "HEAD")
    return (
        f"{head}-dirty"
        if head and _git(folder, "status", "--porcelain", "--untracked-files=no")
        else head
    )


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, on one machine and in one line; None where it fails. It writes nothing there, and asks no monitor of files."""
    line = [
        "git",
        "--no-optional-locks",
        "-c",
        "core.fsmonitor=false",
        "-C",
        str(folder),
        *arguments,
    ]
    try:
        done = subprocess.run(
            line, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
