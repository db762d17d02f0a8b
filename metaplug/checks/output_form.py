"""The form of a model's output, against the targets of a task."""

from __future__ import annotations

from torch import Tensor

from metaplug.contract.inputs import Inputs, count_of
from metaplug.core.losses import class_axis
from metaplug.errors import RequestError


def check_rows(prediction: object, x: Inputs) -> None:
    """Refuse an output that is not one tensor with a row for each example."""
    if not isinstance(prediction, Tensor) or prediction.shape[:1] != (count_of(x),):
        raise RequestError(
            "the model must answer with one tensor (n, *output), a row for each example: "
            "wrap it in a module that does"
        )


def check_targets(prediction: Tensor, y: Tensor) -> None:
    if prediction.shape != y.shape:
        raise RequestError(
            "for regression the model must answer in the form of the targets, "
            f"{tuple(y.shape)} for a task, not {tuple(prediction.shape)}: reshape one of them"
        )


def count_classes(prediction: Tensor, y: Tensor, *, own_loss: bool) -> int | None:
    """The number of classes that class indices may name; None where targets are no indices."""
    if y.is_floating_point():
        return None
    if own_loss and prediction.numel() == y.numel():
        return 2  # one logit for each target
    if (axis := class_axis(prediction, y)) is not None:
        return prediction.shape[axis]
    rest = "".join(f", {size}" for size in y.shape[1:])
    raise RequestError(
        f"for classification the model must answer (n, classes{rest}), not "
        f"{tuple(prediction.shape)}: give it a head of that form"
    )
