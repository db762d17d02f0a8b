"""A loss is tried on the model's output for one task."""

from __future__ import annotations

from torch import Tensor

from metaplug.checks.model_trial import Trial, close
from metaplug.checks.refuse_other_weights import refuse_unregistered
from metaplug.contract.return_checks import form
from metaplug.core.task_model import Loss
from metaplug.errors import RequestError, said_by
from metaplug.random_streams import stream


def check_loss(trial: Trial, loss: Loss, prediction: Tensor) -> None:
    """Refuse a loss of another form, one that remembers, and one with weights of its own."""
    try:
        value = loss(prediction, trial.y)
    except Exception as error:
        raise RequestError(
            f"the loss fails on the model's output ({_form(prediction)}) and the targets of a "
            f"task ({form(trial.y)}): {said_by(error)}; give a loss that takes both"
        ) from error
    if not isinstance(value, Tensor) or value.shape != ():
        raise RequestError(
            "the loss must answer with one number for a task, a tensor of shape (): "
            "take the mean over its examples"
        )
    alone = prediction.detach()  # what is in the graph now is the loss's own
    with stream(0, trial.device):
        first = loss(alone, trial.y)
    with stream(0, trial.device):
        second = loss(alone, trial.y)
    if not close(second, first):
        raise RequestError(
            "the loss answers otherwise when it is asked again, as if it remembered, so that "
            "tasks would see each other: keep nothing in it"
        )
    refuse_unregistered(trial, "loss", first, second)


def _form(value: object) -> str:
    return form(value) if isinstance(value, Tensor) else type(value).__name__
