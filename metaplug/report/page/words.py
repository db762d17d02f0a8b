"""Numbers and lists in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from metaplug.evaluation.results import EvaluationResult
from metaplug.report.comparing import difference_text


def signed(difference: EvaluationResult) -> str:
    """Write a difference with its sign: "+7.40 ± 0.90 pp", in percentage points."""
    if not math.isfinite(difference.mean):
        return "not finite"
    return difference_text(difference).replace("-", "−")


def unbroken(text: str) -> str:
    """The text with no line's end between a number and its interval or unit."""
    for mark in (" ± ", " %", " pp"):
        text = text.replace(mark, mark.replace(" ", "\N{NO-BREAK SPACE}"))
    return text


def duration(seconds: float) -> str:
    """Write a time in words: "12 s", "3.5 min", "2.0 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def counted(number: int, one: str, many: str = "") -> str:
    """Write a number with its noun."""
    if number != 1 and many:
        first, _, rest = one.partition(" of ")
        return f"{number} {first}s of {rest}"
    return f"{number:,} {one}{'s' * (number != 1)}"


def listed(words: Sequence[str], most: int = 1000) -> str:
    """One, two and three; or the first ones and how many more."""
    if len(words) > most:
        return f"{', '.join(words[:most])} and {len(words) - most} more"
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
