"""Forward passes that write to tensors, or that remember, are refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from metaplug.checks.model_copy import answer, give_noisy_weights
from metaplug.checks.model_trial import Trial, close, seen_inputs, tensor_values, unwritten
from metaplug.checks.module_state import Held, Tally, snapshot
from metaplug.core.functional_model import PLAIN, clone
from metaplug.core.model_calls import call_model
from metaplug.errors import RequestError
from metaplug.random_streams import stream

REMEMBERS = (
    "the model answers otherwise when it is asked again, as if it remembered, or drew random "
    "numbers from outside torch's own stream: keep nothing in forward for the next"
)
WRITES = (
    "the model writes to '{}' in forward, which would leak from task to task: "
    "make it constant there"
)


def refuse_writes(trial: Trial) -> None:
    """Refuse a forward pass that writes to its input, or to the model's parameters or buffers.

    A pass in evaluation mode is looked at too: it may write what training does not.
    """
    _refuse_written_inputs(trial)
    _refuse_written_tensors(trial)
    with torch.no_grad(), stream(0, trial.device), _tolerated():
        trial.model.eval()
        call_model(trial.model, trial.x, trial.functional.output)
    _refuse_written_inputs(trial)
    _refuse_written_tensors(trial)


def refuse_memory(trial: Trial) -> None:
    """Refuse a model that answers otherwise after other forward passes than at first."""
    original = trial.functional.model
    fresh = clone(original, shared=False)
    give_noisy_weights(fresh, original)
    after, at_first = None, None
    with torch.no_grad(), _tolerated():
        after = trial.ask(trial.others)
        functional = trial.functional
        at_first = answer(fresh, trial.others, functional.batch_norm, functional.output)
    if after is not None and at_first is not None and not close(after, at_first):
        raise RequestError(REMEMBERS)
    for _ in range(2):  # after other examples, and after its own
        numbers = snapshot(trial.model)
        with torch.no_grad():
            again = trial.ask(trial.x)
        if not close(again, trial.expected):
            raise RequestError(REMEMBERS)
    # A number that goes on changing may matter later than a few passes can show.
    now = snapshot(trial.model)
    for path, name in trial.written:
        value = vars(trial.model.get_submodule(path)).get(name)
        before, after = numbers.get((path, name)), now.get((path, name))
        if before == after:
            continue
        counted = isinstance(value, PLAIN) and value == value and _reads(trial, path, name)  # noqa: PLR0124
        # An array, a tensor or an object of the user's is not put back after a pass.
        if counted or (isinstance(after, Held) and after.same_place(before)):
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


def _reads(trial: Trial, path: str, name: str) -> bool:
    """Return whether forward does anything with a number that it writes but add to it."""
    attributes = vars(trial.model.get_submodule(path))
    attributes[name] = Tally()
    try:
        with torch.no_grad():
            trial.ask(trial.x)
    except Exception:
        return True
    return not isinstance(attributes.get(name), (Tally, *PLAIN))


@contextmanager
def _tolerated() -> Iterator[None]:
    """Errors inside are left to where they matter: these examples may be too few for the model."""
    try:
        yield
    except Exception:
        return
