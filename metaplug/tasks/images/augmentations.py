"""Augmentations of tasks: whole classes turned or mirrored, single images shifted."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(images: Tensor, quarters: Tensor) -> Tensor:
    """Turn every class as a whole.

    Args:
        images: (T, ways, examples, channels, side, side).
        quarters: (T, ways), turns by 90 degrees, 0 to 3.
    """
    turned, chosen = images, quarters[..., None, None, None, None]
    for quarter in (1, 2, 3):  # all of them everywhere: choosing by a mask waits for the device
        turned = torch.where(chosen == quarter, torch.rot90(images, quarter, (-2, -1)), turned)
    return turned


def mirrored(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror left to right the classes (T, ways) that are `chosen`, as a whole."""
    return torch.where(chosen[..., None, None, None, None], images.flip(-1), images)


def shifted(images: Tensor, steps: Tensor) -> Tensor:
    """Move every image by its own steps, down and to the right; zeros come in.

    Args:
        images: (..., channels, height, width).
        steps: (..., 2), in pixels.
    """
    height, width = images.shape[-2:]
    flat, (down, right) = images.flatten(0, -4), steps.flatten(0, -2)[:, :, None].unbind(1)
    rows = torch.arange(height, device=images.device) - down
    columns = torch.arange(width, device=images.device) - right
    which = torch.arange(len(flat), device=images.device)[:, None, None]
    from_rows, from_columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    # Indices around the slice put the channels last.
    taken = flat[which, :, from_rows[:, :, None], from_columns[:, None, :]].movedim(-1, 1)
    inside = (rows == from_rows)[:, :, None] & (columns == from_columns)[:, None, :]
    return (taken * inside[:, None]).reshape(images.shape)
