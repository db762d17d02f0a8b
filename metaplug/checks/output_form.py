"""The form of a model's output, against the targets of a task."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metaplug.contract.inputs import Inputs, count_of, map_inputs
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


def check_probabilities(y: Tensor) -> None:
    """Refuse floating-point targets that cross-entropy does not take for what they are.

    Args:
        y: (n, classes, *rest); cross-entropy reads them as probabilities of the classes.
    """
    whole = y.ndim > 1 and torch.allclose(y.sum(1), torch.ones_like(y[:, 0]))
    if not whole or bool((y < 0).any()):
        raise RequestError(
            "cross-entropy reads floating-point targets as probabilities of classes, but those of "
            "a task do not sum to 1: for labels of 0 and 1 give "
            "loss=torch.nn.functional.binary_cross_entropy_with_logits, for numbers "
            "kind='regression', and for class indices targets.long()"
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


def classes_last(
    ask: Callable[[Inputs], Tensor], prediction: Tensor, x: Inputs, y: Tensor
) -> bool | None:
    """Return whether classes are on the last axis of an output, not on the first of an example.

    Shapes say so, but where texts have as many tokens as there are classes, or the like. There the
    model is asked about shorter inputs. None where that does not say it either.

    Args:
        ask: the model.
        prediction: its answer to x, whose targets are y.
    """
    first, last = (class_axis(prediction, y, last=each) for each in (False, True))
    if first is None or prediction.dim() == 2:
        return None
    if first == last:
        return first != 1
    length = y.shape[-1]
    for axis in (1, -1):

        def cut(each: Tensor, axis: int = axis) -> Tensor:
            fits = each.dim() > 1 and each.shape[axis] == length
            return each.narrow(axis, 0, length - 1) if fits else each

        try:
            with torch.no_grad():
                found = list(ask(map_inputs(cut, x)).shape)
        except Exception:
            continue  # a model of one size of inputs
        shorter = [*prediction.shape]
        for place, is_last in ((-1, False), (y.dim() - 1, True)):
            wanted = shorter.copy()
            wanted[place] -= 1
            if found == wanted:
                return is_last
    return None
