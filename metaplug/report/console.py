"""Results on standard output; all else that people read on standard error.

Imports no torch: `--help` is quick.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar, cast

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class _Stream:
    """A standard stream of the moment; a full disk, or a reader that has left, ends no command.

    Attributes:
        fault: the first failure to write, until somebody takes note of it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.fault: OSError | None = None

    def write(self, text: str) -> int:
        with self._noting_faults():
            try:
                self._stream().write(text)
            except UnicodeEncodeError:  # as JSON escapes, since the text may be JSON
                plain = re.sub(r"[^\x00-\x7f]", lambda one: json.dumps(one[0])[1:-1], text)
                self._stream().write(plain)
        return len(text)

    def flush(self) -> None:
        with self._noting_faults():
            self._stream().flush()

    def _stream(self) -> IO[str]:
        stream: IO[str] | None = getattr(sys, self._name)
        if stream is None:  # closed by the shell: >&-
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return stream

    @contextmanager
    def _noting_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.fault = self.fault or error

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(sys, self._name), name)


_output = _Stream("stdout")

CONSOLE = Console(
    file=cast("IO[str]", _Stream("stderr")), highlight=False, emoji=False, markup=False
)
"""Progress, warnings and errors."""
RESULTS = Console(file=cast("IO[str]", _output), highlight=False, emoji=False, markup=False)
"""What a command was asked for. Not while a progress bar is shown, which redirects it to itself."""


def line(text: str, style: str | None = None, console: Console = CONSOLE) -> None:
    """Show text as exactly one line, whatever the width of the terminal."""
    one = re.sub(r"\s*\n\s*", " ", text.strip())
    console.print(one, style=style, soft_wrap=True, markup=False, highlight=False, emoji=False)


def result(text: str, style: str | None = None) -> None:
    """Print one line of a result on standard output."""
    line(text, style, RESULTS)


def warn(text: str) -> None:
    """Show a warning as one line."""
    line(f"metaplug: warning: {text}", style="yellow")


def show(report: RenderableType, console: Console = RESULTS) -> None:
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
    if not RESULTS.quiet:
        _output.write(text + "\n")
        _output.flush()


def quiet(silent: bool = True) -> None:
    """Let both consoles print nothing more, or print again."""
    CONSOLE.quiet = RESULTS.quiet = silent


def lost_output() -> OSError | None:
    """Return, once, why standard output does not have all that was printed; None if it has."""
    fault, _output.fault = _output.fault, None
    return fault


B = TypeVar("B", bound=Progress)


def new_bar(console: Console, first: str, last: str, kind: type[B]) -> B:
    """Make a progress bar with the time left, in the style of all bars.

    Args:
        first, last: texts before and after it, with `{task.fields[NAME]}` for what changes.
        kind: Progress, or what adds to it.
    """
    middle = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    before, after = (TextColumn(text, markup=False) for text in (first, last))
    return kind(before, *middle, after, console=console, transient=True)


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
