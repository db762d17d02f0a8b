"""The progress of a study's cells, read from what they write, wherever they run."""

from __future__ import annotations

import threading
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from metaplug.experiments.study.cells import Cell
from metaplug.experiments.study.watching import Watch
from metaplug.report.console import line
from metaplug.report.terminal import value_text

_EVERY = 0.5
"""Seconds between two looks at what the cells wrote."""


class StudyProgress:
    """Show iterations of all cells: on a terminal a bar with the time left, else a line each.

    Args:
        console: where to.
        watch: of the cells.
        cells: how many there are, and `finished` how many of them were finished before.
    """

    def __init__(self, console: Console, watch: Watch, cells: int, finished: int) -> None:
        self.console, self.watch = console, watch
        self.cells, self.finished = cells, finished
        self._bar = Progress(
            TextColumn("{task.fields[cells]}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._last = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._one_at_a_time = threading.Lock()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._task = self._bar.add_task("", total=self.watch.total, cells=self._cells_text())
            self._bar.start()
            # What was there before must not count as speed.
            self._bar.update(self._task, completed=self.watch.done)
            self._bar.reset(self._task, completed=self.watch.done)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()
        if self.console.is_terminal:
            self._bar.stop()

    def end(self, cell: Cell) -> None:
        """Count a cell as finished; what it wrote last is shown before."""
        self._look()
        self.finished += 1
        if not self.console.is_terminal:
            line(f"{self._cells_text()}: {cell.label} is finished", console=self.console)

    def _cells_text(self) -> str:
        return f"{self.finished} of {self.cells} runs"

    def _look_on(self) -> None:
        while not self._ended.wait(_EVERY):
            self._look()

    def _look(self) -> None:
        with self._one_at_a_time:
            for cell, values in self.watch.look():
                if (validation := values.get("validation")) is not None:
                    self._show(cell, values["iteration"], values["outer_loss"], validation)
            if self._task is not None:
                cells, done = self._cells_text(), self.watch.done
                self._bar.update(self._task, description=self._last, completed=done, cells=cells)

    def _show(
        self, cell: Cell, iteration: int, loss: float | None, validation: dict[str, Any]
    ) -> None:
        value = value_text(validation["metric"], validation["mean"], validation["interval"])
        said = "not finite" if loss is None else f"{loss:.4f}"
        if self.console.is_terminal:
            self._last = f"{cell.label}: validation {value}"
        else:
            text = f"{cell.label}: iteration {iteration}  loss {said}  validation {value}"
            line(text, console=self.console)
