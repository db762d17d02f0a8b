"""Draw the path of a meta-step through the hooks as two SVGs, for the page of concepts.

The SVGs are part of the page: they take the theme's colours, and every hook links to its entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, ROW, GAP = 340, 34, 18
"""Width of a picture, height of a box and gap between boxes, in pixels of a wide page."""


@dataclass(frozen=True)
class Box:
    """A piece of the engine's work, the inner loop as a whole, or a hook."""

    text: str
    kind: Literal["work", "loop", "hook"] = "work"


def _hooks(*names: str) -> list[Box]:
    return [Box(name, "hook") for name in names]


ITERATION = [
    Box("a batch of tasks"),
    *_hooks("transform_tasks", "outer_step_weights"),
    *_hooks("derivative_order"),
    Box("every task's start"),
    *_hooks("initialize_parameters"),
    Box("K inner steps, all tasks at once", "loop"),
    Box("query losses of adapted tasks"),
    *_hooks("transform_outer_losses"),
    Box("meta-gradients, through the loop"),
    *_hooks("compute_meta_gradients", "transform_meta_gradients"),
    *_hooks("scale_meta_learning_rate"),
    Box("meta-update"),
    *_hooks("commit", "end_meta_step"),
]
STEP = [
    Box("fast weights of every task"),
    *_hooks("transform_parameters"),
    Box("support losses"),
    *_hooks("transform_inner_losses"),
    Box("inner gradients"),
    *_hooks("transform_gradients"),
    Box("inner learning rates"),
    *_hooks("transform_learning_rates", "update_parameters"),
    Box("new fast weights"),
]


def pictures() -> str:
    """Draw both pictures, as HTML for a page next to the hook reference."""
    both = _picture("One meta-iteration", ITERATION, repeated=False) + _picture(
        "One inner step", STEP, repeated=True
    )
    return f'<div class="meta-step">{both}</div>'


def _picture(title: str, boxes: list[Box], *, repeated: bool) -> str:
    top, left, right = 34, 12, 300
    height = top + len(boxes) * (ROW + GAP)
    words = (
        f"{title}: {', then '.join(box.text for box in boxes)}{', and again' if repeated else ''}."
    )
    parts = [f'<text class="title" x="{left}" y="18">{escape(title)}</text>']
    for index, box in enumerate(boxes):
        y = top + index * (ROW + GAP)
        if index:
            parts.append(
                f'<path class="arrow" d="M{(left + right) // 2} {y - GAP + 2} v{GAP - 8}"/>'
                + _head((left + right) // 2, y - 2)
            )
        parts.append(_drawn(box, left, y, right - left))
    if repeated:
        last = top + (len(boxes) - 1) * (ROW + GAP) + ROW // 2
        first = top + ROW // 2
        around = f"M{right + 2} {last} h14 q6 0 6 -6 V{first + 6} q0 -6 -6 -6 h-8"
        parts.append(f'<path class="arrow" d="{around}"/>' + _head(right + 4, first, "left"))
        middle = (first + last) // 2
        parts.append(
            f'<text class="note" transform="translate({right + 36} {middle}) rotate(-90)"'
            ' text-anchor="middle">K times</text>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="group"'
        f' aria-label="{escape(words)}">{"".join(parts)}</svg>'
    )


def _drawn(box: Box, x: int, y: int, width: int) -> str:
    radius = ROW // 2 if box.kind == "hook" else 4
    rectangle = (
        f'<rect class="{box.kind}" x="{x}" y="{y}" width="{width}" height="{ROW}" rx="{radius}"/>'
    )
    text = (
        f'<text class="{box.kind}" x="{x + width // 2}" y="{y + ROW // 2 + 5}"'
        f' text-anchor="middle">{escape(box.text)}</text>'
    )
    return (
        f'<a href="../hooks/#{box.text}">{rectangle}{text}</a>'
        if box.kind == "hook"
        else rectangle + text
    )


def _head(x: int, y: int, to: str = "down") -> str:
    """Draw the head of an arrow."""
    shape = "-4 -6 h8 z" if to == "down" else "6 -4 v8 z"
    return f'<path class="head" d="M{x} {y} l{shape}"/>'
