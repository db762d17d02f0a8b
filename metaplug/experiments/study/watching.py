"""What the cells of a study write while they are computed, wherever that is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaplug.experiments.runs.layout import METRICS
from metaplug.experiments.study.cells import Cell
from metaplug.experiments.study.folder import cell_folder, finished


@dataclass
class _Read:
    """How far a cell's metrics were read."""

    bytes: int = 0
    iterations: int = 0


class Watch:
    """Reads the lines of metrics that were added since the last look; other processes write them.

    Args:
        cells: of one study.
        folder: the study's.
    """

    def __init__(self, cells: Sequence[Cell], folder: Path) -> None:
        self._cells = {cell.digest: cell for cell in cells}
        self._folder = folder
        self._read = {digest: _Read() for digest in self._cells}
        self._open = [each for each, cell in self._cells.items() if not finished(cell, folder)]
        for digest in self._cells.keys() - set(self._open):
            self._read[digest].iterations = self._cells[digest].config.training.iterations
        self.look()

    @property
    def done(self) -> int:
        """The iterations that all cells have made."""
        return sum(read.iterations for read in self._read.values())

    @property
    def total(self) -> int:
        """The iterations of all cells."""
        return sum(cell.config.training.iterations for cell in self._cells.values())

    def look(self) -> list[tuple[Cell, dict[str, Any]]]:
        """The new lines, each with its cell, in the order of cells."""
        found = []
        for digest in self._open:
            cell = self._cells[digest]
            found += [(cell, line) for line in self._new(cell)]
        return found

    def _new(self, cell: Cell) -> Iterable[dict[str, Any]]:
        read = self._read[cell.digest]
        try:
            with (cell_folder(cell, self._folder) / METRICS).open("rb") as file:
                if file.seek(0, 2) < read.bytes:  # cut back to a checkpoint, by who resumed it
                    read.bytes = read.iterations = 0
                file.seek(read.bytes)
                text = file.read()
        except OSError:  # not begun
            return
        whole = text[: text.rfind(b"\n") + 1]
        read.bytes += len(whole)
        for one in whole.splitlines():
            try:
                line = json.loads(one)
            except ValueError:  # cut and written anew in between
                continue
            read.iterations = line["iteration"]
            yield line
