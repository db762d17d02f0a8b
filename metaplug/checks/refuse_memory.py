"""Forward passes that write to tensors, or that remember, are refused."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from metaplug.checks.find_kept import number_is_read, tensors_are_read, tensors_at
from metaplug.checks.model_copy import give_noisy_weights
from metaplug.checks.model_trial import Trial, close, seen_inputs, tensor_values, unwritten
from metaplug.checks.module_state import Held, snapshot
from metaplug.core.functional_model import PLAIN, Place, clone
from metaplug.errors import RequestError

REMEMBERS = (
    "the model answers otherwise when it is asked again, as if it remembered, or drew random "
    "numbers from outside torch's own stream: keep nothing in forward for the next"
)
WRITES = (
    "the model writes to '{}' in forward, which would leak from task to task: "
    "make it constant there"
)


def refuse_writes(trial: Trial) -> None:
    """Refuse forward passes that write to their input, or to the model's parameters or buffers."""
    _refuse_written_inputs(trial)
    _refuse_written_tensors(trial)


def refuse_memory(trial: Trial) -> None:
    """Refuse a model that answers otherwise after other forward passes than at first.

    Passes are in training and in evaluation mode, each after those of the other.
    """
    original = trial.functional.model
    fresh = clone(original, shared=False)
    give_noisy_weights(fresh, original)
    unused = {True: fresh, False: clone(fresh, shared=False)}
    for training, expected in trial.answers.items():
        after, at_first = None, None
        with torch.no_grad(), suppress(Exception):  # these examples may be too few for the model
            after = trial.ask(trial.others, training=training)
            at_first = trial.ask(trial.others, training=training, model=unused[training])
        if after is not None and at_first is not None and not close(after, at_first):
            raise RequestError(REMEMBERS)
        for _ in range(2):  # after other examples, and after its own
            before = snapshot(trial.model)
            tensors = {place: tensors_at(trial, place) for place in trial.written}
            with torch.no_grad():
                again = trial.ask(trial.x, training=training)
            if not close(again, expected):
                raise RequestError(REMEMBERS)
        _refuse_changing(trial, before, tensors)


def _refuse_changing(
    trial: Trial, numbers: Mapping[Place, Any], tensors: Mapping[Place, list[Tensor]]
) -> None:
    """Refuse what goes on changing on modules, and may matter later than a few passes can show.

    Args:
        numbers, tensors: what stood there before the last pass.
    """
    now = snapshot(trial.model)
    for path, name in trial.written:
        value = vars(trial.model.get_submodule(path)).get(name)
        before, after = numbers.get((path, name)), now.get((path, name))
        if before == after:
            continue
        plain = isinstance(value, PLAIN) and value == value  # noqa: PLR0124
        matters = plain and number_is_read(trial, (path, name))
        # An array, a tensor or an object of the user's is not put back after a pass.
        matters = matters or (isinstance(after, Held) and after.same_place(before))
        # What is put back is dropped, and a statistic that evaluation reads with it.
        if matters or tensors_are_read(trial, (path, name), tensors[path, name]):
            raise RequestError(WRITES.format(f"{path}.{name}".lstrip(".")))


def _refuse_written_inputs(trial: Trial) -> None:
    if not all(map(unwritten, trial.given, seen_inputs(trial.x))):
        raise RequestError(
            "the model changes its input in place, and with it the data of the next inner "
            "step: give it operations that make new tensors"
        )


def _refuse_written_tensors(trial: Trial) -> None:
    parameters = dict(trial.model.named_parameters())
    for name, now in tensor_values(trial.model).items():
        before = trial.tensors.get(name)
        if before and unwritten(before, now):
            continue
        if before is None:
            raise RequestError(
                f"the model makes its '{name}' in forward: pass one batch through the model "
                "first, or make it in __init__"
            )
        if name not in parameters:
            raise RequestError(
                "the model writes to a buffer in forward, which would leak from task to task: "
                "make its buffers constant in training"
            )
        raise RequestError(
            f"the model writes to its parameter '{name}' in forward (Embedding(max_norm=...) "
            "does, and statistics that are kept as parameters), but a task's weights change by "
            "its inner steps alone: compute the value anew in forward, without writing it"
        )
