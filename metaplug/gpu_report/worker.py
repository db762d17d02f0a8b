"""A process that does the work of some units, and tells each result as a line of JSON.

    python -m metaplug.gpu_report.worker MODULE < JOB

JOB is one line: {"device": ..., "units": [work, ...]}. Standard input stays open as long as whoever
started it lives: when it closes, this process ends, whatever it is at. It ends, too, after a unit
that failed, since a CUDA error breaks all that follows in the same process.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import traceback
from typing import IO, Any

from metaplug.errors import said_by


def main() -> None:
    """Do the work that standard input asks for."""
    # Whatever else prints must not come among the results, nor read what the parent holds open.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    parent = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    job = json.loads(parent.readline())
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    for index, work in enumerate(job["units"]):
        _tell(channel, unit=index, event="begin")
        end = _done(channel, index, job["device"], work)
        _tell(channel, unit=index, event="end", **end)
        if end["reason"]:
            break
    # Not by sys.exit: what CUDA or a compiler's workers do at the end cannot undo a result.
    sys.stderr.flush()
    os._exit(0)


def _done(channel: IO[str], index: int, device: str, work: dict[str, Any]) -> dict[str, Any]:
    """Do one unit; return why it failed (None where it did not), and whether a package is missing.

    The module is imported here, so that what it lacks is a reason like any other.
    """

    def emit(event: str, value: Any) -> None:
        _tell(channel, unit=index, event=event, value=value)

    try:
        reason = importlib.import_module(sys.argv[1]).run(work, device, emit)
    except ModuleNotFoundError as error:
        traceback.print_exc()
        name = str(error.name).partition(".")[0]
        ours = name.startswith("metaplug")
        reason = said_by(error) if ours else f"the package {name} is not installed here"
        return {"reason": reason, "missing": not ours}
    except BaseException as error:  # SystemExit too: of what others run at import
        traceback.print_exc()
        return {"reason": said_by(error), "missing": False}
    return {"reason": reason, "missing": False}


def _tell(channel: IO[str], **values: Any) -> None:
    channel.write(json.dumps(values) + "\n")
    channel.flush()


def _end_with(parent: IO[str]) -> None:
    parent.read()
    os._exit(1)


if __name__ == "__main__":
    main()
