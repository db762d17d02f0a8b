"""The loss of a task where none is given, and which axis of an output is that of the classes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def cross_entropy(prediction: Tensor, target: Tensor, *, last: bool = False) -> Tensor:
    """Return torch's cross-entropy, whether the classes stand first or last in an output.

    Args:
        prediction: (n, classes, *rest), or (n, *rest, classes) as language models answer.
        target: (n, *rest) class indices, of which -100 counts for nothing; or probabilities.
        last: as of `class_axis`.
    """
    axis = class_axis(prediction, target, last=last)
    moved = prediction if axis is None or axis == 1 else prediction.movedim(axis, 1)
    return F.cross_entropy(moved, target)


def of_ways(
    prediction: Tensor, target: Tensor, ways: int | None, leading: int = 1, *, last: bool = False
) -> tuple[Tensor, Tensor]:
    """Return both without the outputs beyond a task's ways, and without the targets of such.

    Args:
        ways: the number of its classes; None where all outputs count.
        leading, last: as of `class_axis`.
    """
    axis = None if ways is None else output_axis(prediction, target, leading, last=last)
    if ways is None or axis is None:
        return prediction, target
    count = min(ways, prediction.shape[axis])
    own = target.narrow(axis, 0, count) if prediction.shape == target.shape else target
    return prediction.narrow(axis, 0, count), own


def output_axis(
    prediction: Tensor, target: Tensor, leading: int = 1, *, last: bool = False
) -> int | None:
    """Return the axis of the classes; where each output has its own target, the first axis.

    Such targets are labels of 0 and 1, or probabilities of the classes.
    """
    if prediction.shape == target.shape and prediction.dim() > leading:
        return leading
    return class_axis(prediction, target, leading, last=last)


def class_axis(
    prediction: Tensor, target: Tensor, leading: int = 1, *, last: bool = False
) -> int | None:
    """Return the axis of the classes: the first after the examples' axes, or the last.

    None where neither fits.

    Args:
        leading: axes before an example's own: 1 for a task's, 2 for those of stacked tasks.
        last: the one where both fit, as for texts of as many tokens as there are classes. The first
            is what torch's losses have.

    >>> import torch
    >>> class_axis(torch.zeros(4, 9, 5), torch.zeros(4, 9, dtype=torch.int64))
    2
    """
    if target.is_floating_point():
        return None
    axes = (leading, prediction.dim() - 1)
    for axis in reversed(axes) if last else axes:
        if (
            leading <= axis < prediction.dim()
            and prediction.shape[:axis] + prediction.shape[axis + 1 :] == target.shape
        ):
            return axis
    return None
