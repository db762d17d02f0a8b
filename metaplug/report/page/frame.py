"""The frame of a picture: where values stand in it, and the axes around them."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from metaplug.report.page.panels import Panel, finite
from metaplug.report.page.scales import Scale, at_values, linear

WIDTH, HEIGHT = 400, 270
"""Units of a picture, about a pixel each."""

TOP, BOTTOM = 26, 230
"""Between which values stand."""

_LEFT, _RIGHT, _LETTER = 48, 386, 7.2
"""The same from left to right where no text needs more, and the width of a digit."""


@dataclass(frozen=True)
class Frame:
    """Where values stand in a picture, whose right end leaves room for names."""

    x: Scale
    y: Scale
    left: float
    right: float

    def across(self, value: float) -> float:
        """The place of an x."""
        return self.left + (self.right - self.left) * self.x.at(value)

    def up(self, value: float) -> float:
        """The place of a y."""
        return BOTTOM + (TOP - BOTTOM) * self.y.at(value)


def frame_of(panel: Panel) -> Frame:
    """The frame that all finite values of a picture fit into."""
    points = [point for line in panel.lines for point in finite(line.points)]
    edges = [
        point for line in panel.lines for side in (line.low, line.high) for point in finite(side)
    ]
    heights = [y for _, y in (*points, *edges)] + list(panel.y_range)
    if panel.level is not None:
        heights.append(panel.level[0])
    if panel.x_ticks:
        values, texts = zip(*panel.x_ticks, strict=True)
        x = at_values(values, texts)
    else:
        x = linear((x for x, _ in points), tight=True)
    y = linear(heights)
    left = max(_LEFT, 12 + _LETTER * max(len(text) for _, text in y.ticks))
    return Frame(x, y, left, _RIGHT - _LETTER * max(len(line.end) for line in panel.lines))


def axes(panel: Panel, frame: Frame) -> list[Markup]:
    """The labels, and the ticks with their texts and the lines across."""
    left, right = coordinate(frame.left), coordinate(frame.right)
    parts = [
        Markup('<text x="0" y="13">{}</text>').format(_short(panel.y_label)),
        Markup('<text x="{}" y="{}" class="middle">{}</text>').format(
            coordinate((frame.left + frame.right) / 2), HEIGHT - 4, _short(panel.x_label)
        ),
    ]
    for value, text in frame.y.ticks:
        at, beside = coordinate(frame.up(value)), coordinate(frame.up(value) + 4)
        parts.append(
            Markup(
                '<path class="across" d="M{} {}H{}"/><text x="{}" y="{}" class="end">{}</text>'
            ).format(left, at, right, coordinate(frame.left - 7), beside, text)
        )
    for value, text in frame.x.ticks:
        parts.append(
            Markup(
                '<path class="axis" d="M{0} {1}v4"/><text x="{0}" y="{2}" class="middle">{3}</text>'
            ).format(coordinate(frame.across(value)), BOTTOM, BOTTOM + 18, text)
        )
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(left, BOTTOM, right))
    return parts


def coordinate(value: float) -> str:
    """A number of a path, to a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0")


def _short(label: str) -> str:
    most = int(WIDTH / _LETTER)
    return label if len(label) <= most else f"{label[: most - 1]}…"
