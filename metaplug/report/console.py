"""Standard error for people, standard output for programs. Imports no torch: `--help` is quick."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from typing import IO, Any, cast

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table


class _Errors:
    """Standard error of the moment; a log whose disk is full, or that nobody reads, ends no run."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


CONSOLE = Console(file=cast("IO[str]", _Errors()), highlight=False, emoji=False)


def line(text: str, style: str | None = None, console: Console = CONSOLE) -> None:
    """Show text as exactly one line, whatever the width of the terminal."""
    one = re.sub(r"\s*\n\s*", " ", text.strip())
    console.print(one, style=style, soft_wrap=True, markup=False, highlight=False, emoji=False)


def warn(text: str) -> None:
    """Show a warning as one line."""
    line(f"metaplug: warning: {text}", style="yellow")


def show(report: RenderableType, console: Console = CONSOLE) -> None:
    """Print a report; where no terminal bounds its width, as wide as its tables need."""
    before = console.width
    if not console.is_terminal:
        unbounded = console.options.update(width=10_000)
        parts = report.renderables if isinstance(report, Group) else [report]
        needed = [
            Measurement.get(console, unbounded, part).maximum
            for part in parts
            if isinstance(part, Table)  # text wraps well
        ]
        console.width = max(before, *needed, 0)
    try:
        console.print(report)
    finally:
        if console.width != before:
            console.width = before


def emit(text: str) -> None:
    """Print text for a program on standard output, unless the console is quiet."""
    if not CONSOLE.quiet:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def new_table(title: str, *columns: str) -> Table:
    """Make a table without rows, in the style of all tables."""
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
