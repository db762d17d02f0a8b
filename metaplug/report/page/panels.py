"""Pictures as plain values: what stands in them, before anything is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

MOST_POINTS = 200
"""Of a line: more would be closer than a pixel."""

_LARGEST = 1e150

Points = tuple[tuple[float, float], ...]
"""(x, y), rising in x; a y that is not finite makes a gap."""


@dataclass(frozen=True)
class Line:
    """One line of a picture.

    Attributes:
        label: its name in words.
        points: at least one.
        look: which colour, dashes and marker, from 0 on.
        low: the lower edge of its band; empty for none.
        high: the upper edge, at the same places.
        style: None leaves the look's own dashes.
        is_thin: drawn as a companion of another line.
        end: a short name that stands at its right end.
    """

    label: str
    points: Points
    look: int
    low: Points = ()
    high: Points = ()
    style: Literal["solid", "dashed", "dotted"] | None = None
    is_thin: bool = False
    end: str = ""


@dataclass(frozen=True)
class Panel:
    """One picture with its words.

    Attributes:
        title: what it shows.
        caption: how to read it.
        x_label: of the axis below.
        y_label: of the axis at the left.
        lines: at least one.
        x_ticks: values with their texts, where x has few of them.
        level: a value that a dashed line across the picture marks, with its text if any.
        y_range: values that the axis at the left must reach too, as those of a picture beside it.
    """

    title: str
    caption: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...] = ()
    level: tuple[float, str] | None = None
    y_range: tuple[float, ...] = ()


@dataclass(frozen=True)
class Key:
    """One entry of the list that says which line is which."""

    label: str
    look: int
    style: Literal["solid", "dashed", "dotted"] | None = None


@dataclass(frozen=True)
class Group:
    """Pictures that stand together.

    Attributes:
        heading: above them; empty for none.
        panels: at least one.
        keys: which line is which, in all of them.
    """

    heading: str
    panels: tuple[Panel, ...]
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        anchor: of links to it.
        title: its heading.
        texts: paragraphs.
        groups: of pictures; may be empty where the texts say why.
    """

    anchor: str
    title: str
    texts: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()


def finite(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that can be drawn: not NaN, and far from where differences overflow."""
    return [(x, y) for x, y in points if math.isfinite(x) and abs(y) < _LARGEST]


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> Points:
    """At most so many of the points, evenly chosen, the first and the last among them.

    >>> thinned([(0, 0.0), (1, 1.0), (2, 4.0), (3, 9.0), (4, 16.0)], most=3)
    ((0, 0.0), (2, 4.0), (4, 16.0))
    """
    if len(points) <= most:
        return tuple(points)
    last = len(points) - 1
    return tuple(points[round(place * last / (most - 1))] for place in range(most))


def averaged(points: Sequence[tuple[float, float]], most: int) -> Points:
    """The means over at most so many stretches of neighbouring points."""
    count = min(most, len(points))
    ends = [place * len(points) // count for place in range(count + 1)] if count else []
    return tuple(
        (
            math.fsum(x for x, _ in points[begin:end]) / (end - begin),
            math.fsum(y for _, y in points[begin:end]) / (end - begin),
        )
        for begin, end in pairwise(ends)
    )
