"""Values in their order as one line of blocks, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 24
"""The most blocks of a line."""


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Draw values from the least, the lowest block, to the greatest; what is not finite is a gap.

    Args:
        values: of these, neighbours share a block, by their mean, where there are more than blocks.
        width: blocks at most, at least 1.

    >>> sparkline([0.2, 0.4, math.nan, 0.6])
    '▁▅ █'
    """
    blocks = min(width, len(values))
    bounds = [place * len(values) // blocks for place in range(blocks + 1)] if blocks else []
    groups = ([each for each in values[a:b] if math.isfinite(each)] for a, b in pairwise(bounds))
    means = [fmean(group) if group else math.nan for group in groups]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    return "".join(_block(mean, low, high) for mean in means)


def _block(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return " "
    if high == low:
        return BLOCKS[3]
    return BLOCKS[round((value - low) / (high - low) * (len(BLOCKS) - 1))]


def drawn_by(encoding: str) -> bool:
    """Whether a terminal of this encoding can show the blocks."""
    try:
        BLOCKS.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
