"""Pictures as SVG that a page holds: its colours are the page's, its text is text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from metaplug.report.page.frame import BOTTOM, HEIGHT, TOP, WIDTH, Frame, axes, coordinate, frame_of
from metaplug.report.page.panels import Key, Line, Panel, finite

LOOKS = 7
"""Colours, each with a marker of its own; they begin again after that, with other dashes."""

_DASHES = ("", "9 4", "2 3", "9 3 2 3", "15 4", "5 2 1 2", "1 5")
_STYLES = {"solid": "", "dashed": "6 4", "dotted": "1.5 3"}
_MOST_MARKERS = 11
_APART = 13.0
"""The least distance of two names at the ends of lines."""


def draw(panel: Panel, name: str) -> Markup:
    """A picture as an SVG element.

    Args:
        panel: with at least one finite point.
        name: of the element, unlike any other of the page.
    """
    frame = frame_of(panel)
    parts = [
        Markup('<title id="{0}-t">{1}</title><desc id="{0}-d">{2}</desc>').format(
            name, panel.title, description(panel)
        ),
        *axes(panel, frame),
    ]
    ordered = sorted(panel.lines, key=lambda line: not line.is_thin)  # thin ones lie below
    parts += [_band(line, frame) for line in ordered if line.low]
    parts += [_line(line, frame) for line in ordered]
    parts += [*_level(panel, frame), *_ends(panel.lines, frame)]
    return Markup(
        '<svg viewBox="0 0 {0} {1}" role="img" aria-labelledby="{2}-t {2}-d">{3}</svg>'
    ).format(WIDTH, HEIGHT, name, Markup("").join(parts))


def draw_key(key: Key) -> Markup:
    """A short piece of a line as it looks in pictures."""
    path = _path([(1.0, 6.0), (33.0, 6.0)], _dashes(key.look, key.style))
    return Markup(
        '<svg class="sample c{}" viewBox="0 0 34 12" aria-hidden="true">{}{}</svg>'
    ).format(key.look % LOOKS, path, _marker(key.look, 17.0, 6.0, hollow=key.style == "dashed"))


def description(panel: Panel) -> str:
    """What the lines do, for those who cannot see them: where each begins and ends."""
    said = []
    for line in panel.lines:
        points = finite(line.points)
        if points and not line.is_thin:
            (first, begin), (last, end) = points[0], points[-1]
            texts = dict(panel.x_ticks)
            first_text, last_text = (texts.get(each, f"{each:g}") for each in (first, last))
            way = f"{begin:.4g} at {first_text}"
            said.append(f"{line.label}: {way}{f', {end:.4g} at {last_text}' * (len(points) > 1)}")
    return f"{panel.y_label} against {panel.x_label}. {'; '.join(said)}."


def _level(panel: Panel, frame: Frame) -> list[Markup]:
    """The line across, with its text above the lines of the picture."""
    if panel.level is None:
        return []
    value, text = panel.level
    at = frame.up(value)
    across = Markup('<path class="level" d="M{} {}H{}"/>').format(
        coordinate(frame.left), coordinate(at), coordinate(frame.right)
    )
    if not text:
        return [across]
    starts = [points[0][1] for line in panel.lines if (points := finite(line.points))]
    is_below = min(starts) > value or at < TOP + 16  # away from lines that come from above
    name = Markup('<text x="{}" y="{}" class="over">{}</text>').format(
        frame.left + 5, coordinate(at + 15 if is_below else at - 5), text
    )
    return [across, name]


def _band(line: Line, frame: Frame) -> Markup:
    edge = [*finite(line.low), *reversed(finite(line.high))]
    places = " ".join(f"{coordinate(frame.across(x))} {coordinate(frame.up(y))}" for x, y in edge)
    if not places:
        return Markup("")
    return Markup('<path class="band c{}" d="M{}Z"/>').format(line.look % LOOKS, places)


def _line(line: Line, frame: Frame) -> Markup:
    dashes = _dashes(line.look, line.style)
    pieces = [[(frame.across(x), frame.up(y)) for x, y in piece] for piece in _pieces(line.points)]
    drawn = [_path(piece, dashes) for piece in pieces if len(piece) > 1]
    places = [place for piece in pieces for place in piece]
    if not line.is_thin:
        every = max(1, math.ceil(len(places) / _MOST_MARKERS))
        # From the last point back, so every line has a marker where it ends.
        marked = places[::-1][::every][::-1]
        drawn += [_marker(line.look, *place, hollow=line.style == "dashed") for place in marked]
    kind = " thin" if line.is_thin else ""
    return Markup('<g class="c{}{}"><title>{}</title>{}</g>').format(
        line.look % LOOKS, kind, line.label, Markup("").join(drawn)
    )


def _pieces(points: Iterable[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The stretches between gaps."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if finite([(x, y)]):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _path(places: Sequence[tuple[float, float]], dashes: str) -> Markup:
    way = "L".join(f"{coordinate(x)} {coordinate(y)}" for x, y in places)
    dashed = Markup(' stroke-dasharray="{}"').format(dashes) if dashes else ""
    return Markup('<path class="line" d="M{}"{}/>').format(way, dashed)


def _dashes(look: int, style: str | None) -> str:
    # The eighth line has the first one's colour and marker, but not its dashes.
    return _DASHES[(look + look // LOOKS) % LOOKS] if style is None else _STYLES[style]


def _marker(look: int, x: float, y: float, *, hollow: bool = False) -> Markup:
    """Circle, square, triangle, diamond, cross, triangle on its top, and plus."""
    shapes = (
        "m-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0-6.8 0Z",
        "m-3-3h6v6h-6Z",
        "m0-4 3.9 6.8h-7.8Z",
        "m0-4.2 4.2 4.2-4.2 4.2-4.2-4.2Z",
        "m-3-3 6 6m0-6-6 6",
        "m0 4-3.9-6.8h7.8Z",
        "m-4 0h8m-4-4v8",
    )
    kind = "mark hollow" if hollow else "mark"
    return Markup('<path class="{}" d="M{} {}{}"/>').format(
        kind, coordinate(x), coordinate(y), shapes[look % LOOKS]
    )


def _ends(lines: Sequence[Line], frame: Frame) -> list[Markup]:
    """The names at the ends of lines, moved apart where they would meet."""
    named = [(frame.up(points[-1][1]), line) for line in lines if (points := finite(line.points))]
    named = sorted(((at, line) for at, line in named if line.end), key=lambda each: each[0])
    places = [at for at, _ in named]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + _APART)
    room = float(BOTTOM)
    for index in reversed(range(len(places))):
        places[index] = min(places[index], room)
        room = places[index] - _APART
    return [
        Markup('<text x="{}" y="{}" class="name">{}</text>').format(
            coordinate(frame.right + 8), coordinate(place + 4), line.end
        )
        for place, (_, line) in zip(places, named, strict=True)
    ]
