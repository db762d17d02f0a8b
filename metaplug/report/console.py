"""What people read goes to standard error, what programs read to standard output. Imports no torch: `--help` must be quick."""

from __future__ import annotations

import re
import sys

from rich.console import Console

CONSOLE = Console(stderr=True, highlight=False)


def line(text: str, style: str | None = None, console: Console = CONSOLE) -> None:
    """Show text as exactly one line, whatever the width of the terminal."""
    console.print(re.sub(r"\s*\n\s*", " ", text.strip()), style=style, soft_wrap=True, markup=False, highlight=False)


def emit(text: str) -> None:
    """Print text for a program on standard output, where nothing else goes."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
