"""Parts run in processes of their own, each until its time is over."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

from metaplug.gpu_report.plan import Part, Unit
from metaplug.gpu_report.processes import Events, Process
from metaplug.gpu_report.record import Record

MOST = 0.75
"""The share of its part's remaining time that a unit may take while others wait behind it, so that
one that hangs does not take all."""


LEAST = 3.0
"""Seconds that must be left for a process to be started: torch alone takes as long."""


class Runner:
    """Runs parts one after the other, and records what their units tell.

    Args:
        device: "cpu" or "cuda".
        environment: of the processes.
        folder: that they run in, and may leave files in.
    """

    def __init__(
        self, record: Record, device: str, environment: Mapping[str, str], folder: Path
    ) -> None:
        self.record, self._device = record, device
        self._environment, self._folder = environment, folder
        self._logs = count()

    def run(self, part: Part, until: float) -> None:
        """Run a part, until a time by time.monotonic at most.

        A process that fails is replaced by a new one for the units behind the one that it was at.
        """
        units, events = self.record.units(part), Queue[Any]()
        waiting: deque[Sequence[Unit]] = deque(part.jobs)
        active: dict[Process, Sequence[Unit]] = {}
        try:
            while active or (waiting and time.monotonic() < until - LEAST):
                while waiting and len(active) < part.at_once and time.monotonic() < until - LEAST:
                    job = waiting.popleft()
                    active[self._start(part, job, until, events)] = job
                process, told = _next_event(events, active)
                if process not in active:
                    continue  # it was given up
                if told is not None:
                    job, place = active[process], told["unit"]
                    last = place + 1 == len(job)
                    self._take(part, process, units[job[place].name], told, until, last=last)
                    if told.get("missing"):
                        self._give_up(units, told["reason"])
                        waiting.clear()
                    continue
                job = active.pop(process)
                self._end(process, [units[unit.name] for unit in job])
                behind = job[max(process.unit, 0) + 1 :]
                if behind and units[behind[0].name]["state"] == "waiting":
                    waiting.appendleft(behind)
            for unit in units.values():
                if unit["state"] == "waiting":
                    unit["reason"] = "no time was left"
        finally:
            for process in active:
                process.stop("")
                process.ended()

    def _start(self, part: Part, job: Sequence[Unit], until: float, events: Events) -> Process:
        process = Process(
            part.module,
            self._device,
            [unit.work for unit in job],
            environment=self._environment,
            folder=self._folder,
            log=self._folder / f"{next(self._logs)}.log",
            events=events,
        )
        process.limit = until
        return process

    def _take(
        self,
        part: Part,
        process: Process,
        unit: dict[str, Any],
        told: dict[str, Any],
        until: float,
        *,
        last: bool,
    ) -> None:
        """Record one event of a process."""
        now = time.monotonic()
        if told["event"] == "begin":
            process.unit = told["unit"]
            process.limit = until if last else now + MOST * max(0.0, until - now)
            unit.update(state="running", begun=round(now - self.record.begun, 1))
        elif told["event"] == "end":
            process.limit = until
            self._close(unit, "failed" if told["reason"] else "done", told["reason"], process)
        elif told["event"] == "at":
            unit["at"] = told["value"]
        else:
            unit["rows"].append(told["value"])
        self.record.save(soon=told["event"] in ("at", "row"))
        if told["event"] == "begin" and self.record.folder:
            say(f"[{now - self.record.begun:4.0f} s] {part.name}: {unit['name']}")

    def _end(self, process: Process, units: Sequence[dict[str, Any]]) -> None:
        """Record how a process ended, for the unit that it was at."""
        how, unit = process.ended(), units[max(process.unit, 0)]
        if unit["state"] == "running" or process.unit < 0:
            place = f" in {unit['at']}" if unit.get("at") else ""
            state = "stopped" if process.stopped else "failed"
            self._close(unit, state, (process.stopped or how) + place, process)
            self.record.save()

    def _close(
        self, unit: dict[str, Any], state: str, reason: str | None, process: Process
    ) -> None:
        now = time.monotonic() - self.record.begun
        unit.update(state=state, reason=reason, seconds=round(now - unit.get("begun", now), 1))
        unit.pop("at", None)
        if state != "done":
            unit["log"] = process.last_lines()

    def _give_up(self, units: Mapping[str, dict[str, Any]], reason: str) -> None:
        """What one unit lacks, all of its part lack."""
        for unit in units.values():
            if unit["state"] == "waiting":
                unit.update(state="failed", reason=reason, seconds=0.0)
        self.record.save()


def _next_event(
    events: Events, active: Collection[Process]
) -> tuple[Process, dict[str, Any] | None]:
    """Wait for an event, and stop the processes whose time is over meanwhile."""
    while True:
        patience = min(process.limit for process in active) - time.monotonic()
        with suppress(Empty):
            return events.get(timeout=min(max(0.0, patience), 3600.0))
        for process in active:
            if process.limit <= time.monotonic():
                if process.stopped is not None:  # a while ago, and it has not ended
                    events.put((process, None))
                process.stop("its time was over")


def say(text: str, stream: IO[str] | None = None) -> None:
    """Tell people a line, on standard error unless it is what they asked for."""
    with suppress(OSError):  # the terminal is gone
        print(text, file=stream or sys.stderr, flush=True)
