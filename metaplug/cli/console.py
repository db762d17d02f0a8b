"""What people read goes to standard error, what programs read to standard output."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

CONSOLE = Console(stderr=True, highlight=False)


def line(text: str, style: str | None = None) -> None:
    """Show text as exactly one line, whatever the width of the terminal."""
    CONSOLE.print(" ".join(text.split()), style=style, soft_wrap=True, markup=False)


def print_json(values: Any) -> None:
    """Print values as JSON on standard output, and nothing else there."""
    from metaplug.experiment import to_json

    sys.stdout.write(to_json(values, indent=2) + "\n")
    sys.stdout.flush()
