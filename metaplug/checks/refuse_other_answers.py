"""A functional model that does not give the answers or gradients of a plain call is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from metaplug.checks.compare_batching import as_dtype, double, own_functions
from metaplug.checks.model_copy import in_double
from metaplug.checks.model_trial import Trial, close
from metaplug.checks.refuse_other_weights import refuse_closures
from metaplug.core.functional_model import FunctionalModel
from metaplug.errors import RequestError
from metaplug.random_streams import stream


def refuse_other_values(trial: Trial, prediction: Tensor) -> None:
    """Refuse a functional model whose answer is not the copy's."""
    refuse_closures(trial, prediction)
    refuse_closures(trial, trial.expected)
    if not close(prediction, trial.expected) and not _agrees_in_double(trial):
        raise RequestError(
            "the model answers otherwise with torch.func.functional_call than when it is "
            "called (its forward reads weights from elsewhere than its modules, or random "
            "numbers from outside torch): replace that part of the model"
        )


def refuse_other_gradients(trial: Trial, prediction: Tensor) -> None:
    """Refuse a gradient that is not the copy's, or no longer so after a later forward pass."""
    if not _gradients_agree(trial, prediction) and not _agrees_in_double(trial):
        raise RequestError(
            "the gradient of the model does not follow the weights of its forward pass (a "
            "backward pass that runs forward again, or an operation that has no gradient): "
            "replace that part of the model"
        )


def _gradients_agree(trial: Trial, prediction: Tensor) -> bool:
    """Return whether the gradient is the copy's, after a later forward pass too."""
    trained = [weight for weight in trial.weights.values() if weight.requires_grad]
    if not trial.expected.requires_grad:
        return True  # the inner loop says so where it asks for a gradient
    with stream(0, trial.device):
        trial.functional([2 * weight for weight in trial.weights.values()], trial.x)
    ours, expected = (_gradients(output, trained) for output in (prediction, trial.expected))
    if ours is None or expected is None:
        return False
    # A gradient that is zero up to rounding, as a bias's before batch norm, has errors that go
    # with the terms of its sum: with all gradients, not with its own value.
    scale = max((each.abs().max().item() for each in expected if each.numel()), default=0.0)
    pairs = zip(ours, expected, strict=True)
    return all(close(own, each, max(scale, 1)) for own, each in pairs)


def _agrees_in_double(trial: Trial) -> bool:
    """Return whether the functional model is right in float64: what differs is then rounding.

    Rounding has no bound that results show. Terms that are equal, as those of an image's
    constant background, round alike, so their errors add up; and within rounding of a kink, or
    of two equal maxima, a pass may take the other branch. In float64 both are too small or too
    rare to matter, and a wrong gradient is as wrong as before. A tie that holds for all weights
    stays one, but its branches have the same derivative.
    """
    if trial.expected.dtype == double(trial.expected.dtype):
        return False
    functional = trial.functional
    try:
        wide = in_double(functional.model)
        functional = FunctionalModel(wide, functional.batch_norm, functional.output)
        batch = trial.batch.map(lambda each: as_dtype(each, torch.float64))
        own = Trial(functional, trial.device, batch)
        functional.watch(own.written)
        prediction = own.predict()
        # An operation for float32 alone is not looked at in float64.
        looked_at = own_functions(trial.expected) <= own_functions(own.expected)
        right = close(prediction, own.expected) and _gradients_agree(own, prediction)
    except Exception:
        return False  # it takes no float64: float32 decides
    return looked_at and right


def _gradients(output: Tensor, trained: list[Tensor]) -> list[Tensor] | None:
    try:
        taken = torch.autograd.grad(output.sum(), trained, allow_unused=True)
    except RuntimeError:
        return None
    return [
        torch.zeros_like(weight) if one is None else one.to_dense() if one.is_sparse else one
        for one, weight in zip(taken, trained, strict=True)
    ]
