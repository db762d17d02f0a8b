"""my-idea: figures as a table, for spreadsheets."""

from __future__ import annotations

import csv
from typing import Literal, final

from metaplug import LoggedRun, LoggedStep, Logger, LoggerConfig
from pydantic import Field


@final
class MyIdea(Logger):
    """Log every validation as a row of a table, with the figures of its iteration.

    The table is NAME.csv in the run's folder, with the name that the logger was asked for by.
    """

    class Config(LoggerConfig):
        """How it is written."""

        separator: Literal[",", ";", "tab"] = Field(",", description="Between two columns.")

    config: Config

    def start(self, run: LoggedRun) -> int:
        """Keep the rows that are whole, and say up to which iteration there are any."""
        self._path = run.folder / f"{self.name}.csv"
        self._rows = [row for row in self._read() if int(row["iteration"]) <= run.iteration]
        return int(self._rows[-1]["iteration"]) if self._rows else 0

    def log(self, step: LoggedStep, *, durable: bool) -> None:
        """Add a row for a validation, and write the whole table, as columns may be new."""
        if step.validation is None:
            return
        row = {"iteration": step.iteration, **step.values}
        self._rows.append({name: str(value) for name, value in row.items()})
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        with self._path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, columns, delimiter=self._delimiter)
            table.writeheader()
            table.writerows(self._rows)

    def _read(self) -> list[dict[str, str]]:
        if not self._path.exists():
            return []
        with self._path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file, delimiter=self._delimiter))

    @property
    def _delimiter(self) -> str:
        return "\t" if self.config.separator == "tab" else self.config.separator
