"""The equations of scores, for T tasks of one size: (predictions, targets) → (T,) float64.

Beside class indices (T, n, *rest), predictions are (T, n, classes, *rest); beside labels of 0 and 1
and real numbers, of the targets' shape. A label is predicted where its logit is above 0. What is
IGNORED (-100) counts nowhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metaplug.contract.task_sizes import IGNORED


def accuracy(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the share of right targets, of each pixel, token or label where there are many."""
    counted = targets != IGNORED
    if predictions.shape == targets.shape:
        right = (predictions > 0) == (targets > 0.5)
    else:
        right = predictions.argmax(2) == targets
    return _total(right & counted) / _total(counted)


def recalls(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return (T, classes): the share of each class's targets that are right; NaN for none."""
    counted, classes = targets != IGNORED, predictions.shape[2]
    right = (predictions.argmax(2) == targets) & counted
    return _by_class(targets, right, classes) / _by_class(targets, counted, classes)


def balanced_accuracy(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of the recalls of the classes that are among a task's targets.

    Brodersen et al. 2010, The balanced accuracy and its posterior distribution.
    """
    return recalls(predictions, targets).nanmean(1)


def micro_f1(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return F1 = 2 TP / (2 TP + FP + FN), counted over all labels together; 0 for 0 / 0."""
    return _f1(*(each.sum(1) for each in _hits(predictions, targets)))


def macro_f1(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over labels of their F1; 0 for a label that is neither true nor predicted."""
    return _f1(*_hits(predictions, targets)).mean(1)


def mean_iou(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of intersection / union over the classes of the targets or predictions."""
    counted, classes, predicted = targets != IGNORED, predictions.shape[2], predictions.argmax(2)
    intersection = _by_class(targets, (predicted == targets) & counted, classes)
    both = _by_class(targets, counted, classes) + _by_class(predicted, counted, classes)
    return (intersection / (both - intersection)).nanmean(1)


def perplexity(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return exp of the mean cross-entropy of the targets that count."""
    counted = targets != IGNORED
    wide = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    chosen = targets.masked_fill(~counted, 0).unsqueeze(2)
    losses = -wide.log_softmax(2).gather(2, chosen).squeeze(2).double()
    return (_total(losses.masked_fill(~counted, 0)) / _total(counted)).exp()


def mean_squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of the squared differences."""
    return (predictions.double() - targets.double()).square().flatten(1).mean(1)


def _total(x: Tensor) -> Tensor:
    return x.flatten(1).double().sum(1)


def _by_class(indices: Tensor, counted: Tensor, classes: int) -> Tensor:
    """(T, classes) float64: how many of a class's places count."""
    tasks = len(indices)
    rows = torch.arange(tasks, device=indices.device).unsqueeze(1) * classes
    # One axis, of whole numbers: CUDA has an algorithm for it that repeats bit for bit.
    places = (rows + indices.masked_fill(~counted, 0).flatten(1)).flatten()
    found = counted.new_zeros(tasks * classes, dtype=torch.float64)
    return found.scatter_add(0, places, counted.flatten().double()).view(tasks, classes)


def _hits(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(T, labels) float64: twice the true positives, and false positives and negatives."""
    labels = targets.shape[2] if targets.ndim > 2 else 1
    form = (*targets.shape[:2], labels, -1)
    counted = (targets != IGNORED).reshape(form)
    predicted, true = (predictions > 0).reshape(form), (targets > 0.5).reshape(form)
    hits, misses = predicted & true & counted, (predicted != true) & counted
    return 2 * hits.double().sum((1, 3)), misses.double().sum((1, 3))


def _f1(hits: Tensor, misses: Tensor) -> Tensor:
    return hits / (hits + misses).clamp(min=1)
