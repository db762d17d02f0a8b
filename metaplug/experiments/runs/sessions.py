"""What repeating a run takes beside its configuration: commands, versions, commits and devices."""

from __future__ import annotations

import json
import os
import platform
import shlex
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import metaplug
from metaplug.commits import commit_of
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
            "metaplug": commit_of(Path(metaplug.__file__).parent),
            "folder": commit_of(Path.cwd()),
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
