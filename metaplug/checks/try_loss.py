"""A loss is tried on the model's output for one task."""

from __future__ import annotations

from contextlib import suppress
from itertools import product

import torch
from torch import Tensor

from metaplug.checks.model_trial import Trial, close, seen, unwritten
from metaplug.checks.refuse_other_weights import refuse_unregistered
from metaplug.contract.return_checks import form
from metaplug.core.task_model import Loss
from metaplug.errors import RequestError, said_by
from metaplug.random_streams import stream


def check_loss(trial: Trial, loss: Loss, prediction: Tensor) -> None:
    """Refuse a loss of another form, that writes or remembers, or that has weights of its own."""
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
    _refuse_writes(trial, loss, prediction)
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


def _refuse_writes(trial: Trial, loss: Loss, prediction: Tensor) -> None:
    """Refuse a loss that writes into its prediction, which is scored, or into the targets.

    It may do so where a value is large, or where no graph is made, as at evaluation.
    """
    for scale, graph in product((1, 100), (True, False)):
        with torch.set_grad_enabled(graph), stream(0, trial.device):
            given = scale * prediction, trial.y.clone()
            before = [*map(seen, given)]
            with suppress(Exception):  # predictions that large may be none of the loss's
                loss(*given)
            for what, each, was in zip(_WRITTEN, given, before, strict=True):
                if not unwritten(was, seen(each)):
                    raise RequestError(
                        f"the loss writes into its {what}: give it operations that make new "
                        "tensors, as clamp for clamp_, or let it write into a copy, as of clone()"
                    )


_WRITTEN = (
    "prediction, so that scores would be those of what it leaves there",
    "targets, which are the data of later steps and your own",
)


def _form(value: object) -> str:
    return form(value) if isinstance(value, Tensor) else type(value).__name__
