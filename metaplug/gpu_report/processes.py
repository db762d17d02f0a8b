"""A worker process, as its parent sees it: results as they come, an end at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Queue
from typing import Any

GRACE = 10.0
"""Seconds after which a process that was killed is given up: a driver may hold it for ever."""
LAST_LINES = 25
"""Of what a process that failed wrote on standard error, for the JSON."""

Events = Queue[tuple["Process", dict[str, Any] | None]]
"""A process with what it told, or None when it has ended."""


class Process:
    """Starts `worker` for some units.

    Args:
        module: that does the work.
        works: of the units, in turn.
        log: a file for its standard error.
        events: where its words go, from a thread that waits for them.

    Attributes:
        unit: the place of the unit that it is at; -1 before the first.
        limit: the time, by time.monotonic, when it is to be stopped.
        stopped: why it was stopped; None while it was not.
    """

    def __init__(
        self,
        module: str,
        device: str,
        works: Sequence[dict[str, Any]],
        *,
        environment: Mapping[str, str],
        folder: Path,
        log: Path,
        events: Events,
    ) -> None:
        self.unit, self.limit = -1, 0.0
        self.stopped: str | None = None
        self._log = log
        command = [sys.executable, "-X", "faulthandler", "-m", "metaplug.gpu_report.worker", module]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=folder,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the parent, and all below end together
            )
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended already, which its reader finds out
            job = json.dumps({"device": device, "units": list(works)})
            self._process.stdin.write(job.encode() + b"\n")
            self._process.stdin.flush()
        self._reader = threading.Thread(target=self._read, args=(events,), daemon=True)
        self._reader.start()

    def stop(self, reason: str) -> None:
        """End it and all that it started, at once."""
        self.stopped, self.limit = self.stopped or reason, time.monotonic() + GRACE
        with suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()

    def ended(self) -> str:
        """Wait for its end, and say in words how it ended."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            status = self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return "its process does not end"
        self._reader.join(GRACE)
        if status >= 0:
            return f"its process ended with status {status}"
        return f"its process was ended by {signal.Signals(-status).name}"

    def last_lines(self) -> str:
        """Return the end of its standard error."""
        with suppress(OSError):
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
            return "\n".join(lines[-LAST_LINES:])
        return ""

    def _read(self, events: Events) -> None:
        assert self._process.stdout is not None
        # A ValueError is a last line that its end cut off.
        with self._process.stdout as lines, suppress(ValueError):
            for line in lines:
                events.put((self, json.loads(line)))
        events.put((self, None))
