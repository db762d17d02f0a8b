"""One task as a picture: a person sees what the model sees."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import one_line
from metaplug.report.figures import COLOURS, DPI, INK, WIDTH, save, style
from metaplug.tasks.text.episodes import TaskTexts

MOST_ROWS, MOST_COLUMNS, MOST_TEXTS = 20, 12, 3
"""Classes, and images and texts of one class, that a picture shows; it says how many it leaves
out."""


def episode_figure(batch: TaskBatch, path: Path, title: str) -> None:
    """Draw the first task of a batch, support and query examples apart.

    Images stand in a row for each class, support left and query right; regression is points.

    Args:
        batch: images (T, n, channels, height, width) in [0, 1] with integer labels, or regression
            (T, n, features) with (T, n, targets).
        path: the PNG to write.
        title: above the picture.
    """
    figure = _points(batch) if batch.support_y.is_floating_point() else _images(batch)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    save(figure, path)


def texts_figure(task: TaskTexts, path: Path, title: str) -> None:
    """Write out a task of texts: a few support and query texts of each class, below its name.

    Args:
        task: the texts by class.
        path: the PNG to write.
        title: above the texts.
    """
    lines: list[tuple[str, str]] = []
    for label, name in enumerate(task.names[:MOST_ROWS]):
        lines.append((f"{label}: {one_line(name, 60)}", INK))
        for part, texts, colour in (
            ("support", task.support[label], COLOURS[2]),
            ("query", task.query[label], COLOURS[1]),
        ):
            count = f", {MOST_TEXTS} of {len(texts)}" if len(texts) > MOST_TEXTS else ""
            for text in texts[:MOST_TEXTS]:
                lines.append((f"    {part}{count}: {one_line(text, 90)}", colour))
    if len(task.names) > MOST_ROWS:
        lines.append((f"{len(task.names) - MOST_ROWS} more classes", INK))
    figure = Figure(figsize=(WIDTH, 0.6 + 0.19 * len(lines)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_ylim(len(lines), 0)
    for row, (text, colour) in enumerate(lines):
        # Not parsed: a text may hold dollars, which would start mathematics.
        axes.text(0, row + 0.5, text, fontsize=7, color=colour, va="center", parse_math=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK, parse_math=False)
    with warnings.catch_warnings():
        # The font has not the letters of every language, and draws boxes for the others.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        save(figure, path)


def _images(batch: TaskBatch) -> Figure:
    ways = int(batch.support_y[0].max()) + 1
    rows = min(ways, MOST_ROWS)
    support, query = (
        _grid([x[0][y[0] == label][:MOST_COLUMNS] for label in range(rows)])
        for x, y in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y))
    )
    height, gap = support.shape[0], (support.shape[1] + query.shape[1]) // 12
    between = np.ones((height, gap, support.shape[2]), np.float32)
    whole = np.concatenate([support, between, query], 1)
    inches = 0.7 + WIDTH * 0.9 * height / max(whole.shape[1], height)
    figure = Figure(figsize=(WIDTH, inches), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    shown = whole if whole.shape[2] == 3 else whole[..., 0]
    axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    begin = whole.shape[1] - query.shape[1]
    for left, name, y in ((0, "support", batch.support_y), (begin, "query", batch.query_y)):
        count = int((y[0] == 0).sum())
        text = f"{name}, {MOST_COLUMNS} of {count}" if count > MOST_COLUMNS else name
        axes.annotate(text, (left, 0), (0, 4), textcoords="offset points", fontsize=10, color=INK)
    side = batch.support_x.shape[-2] + 1
    axes.set_yticks([side * (row + 0.5) for row in range(rows)], [str(row) for row in range(rows)])
    axes.set_xticks([])
    axes.set_ylabel("label" + (f", {rows} of {ways}" if ways > rows else ""), color=INK)
    axes.spines[:].set_visible(False)
    return figure


def _grid(part: list[Tensor]) -> NDArray[np.float32]:
    """Join images to one, (height, width, 1 or 3): a row for each class, grey lines between."""
    channels, height, width = part[0].shape[1:]
    rows, columns, depth = len(part), max(map(len, part)), 3 if channels == 3 else 1
    size = (rows * (height + 1) + 1, columns * (width + 1) + 1, depth)
    grid = np.full(size, 0.6, np.float32)
    for row, images in enumerate(part):
        for column, image in enumerate(images[:, :depth].movedim(1, -1).cpu().numpy()):
            top, left = row * (height + 1) + 1, column * (width + 1) + 1
            grid[top : top + height, left : left + width] = image
    return grid


def _points(batch: TaskBatch) -> Figure:
    """Draw the first target against the first input."""
    figure = Figure(figsize=(WIDTH, 4.0), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for x, y, name, colour, size in (
        (batch.query_x, batch.query_y, "query", COLOURS[1], 26),
        (batch.support_x, batch.support_y, "support", COLOURS[2], 44),
    ):
        first_x, first_y = (values[0].flatten(1)[:, 0].cpu() for values in (x, y))
        axes.scatter(first_x, first_y, s=size, color=colour, label=name, zorder=3)
    labels = []
    for name, values in (("input", batch.support_x), ("target", batch.support_y)):
        count = values[0].flatten(1).shape[1]
        labels.append(name if count == 1 else f"{name} 1 of {count}")
    style(axes, *labels)
    axes.legend(frameon=False)
    return figure
