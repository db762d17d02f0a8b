"""One task on which a model is tried, and an independent copy that says what is right."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from itertools import pairwise

import torch
from torch import Tensor, nn

from metaplug.checks.model_copy import answer, give_noisy_weights
from metaplug.checks.module_state import noting_checkpoints, snapshot
from metaplug.contract.inputs import Inputs, count_of, map_inputs, tensors_of
from metaplug.contract.task_batch import TaskBatch
from metaplug.core.functional_model import FunctionalModel, clone, version
from metaplug.core.vmap_rules import TaskRules
from metaplug.errors import RequestError, said_by
from metaplug.random_streams import stream


class Trial:
    """A task, and an independent copy of the model with weights that are not its own.

    Args:
        functional: the functional model that is tried.
        device: of the random numbers that a pass draws.
        batch: of one size; the first task is taken.
        original: what the copy is of; the functional model's own model where it is None.

    Attributes:
        x, y: copies of support examples (n, *input) and of their targets.
        others: query examples, one more than in x where there are as many.
        model: the copy, and `weights`, its parameters by name.
        given, tensors: versions of x, and of the copy's parameters and buffers, before it ran, with
            their values.
        expected: its answer to x in training mode.
        answers: its answers to x by whether it was in training mode; none for evaluation mode where
            it fails there, which the evaluation that meets it says.
        checkpointed: whether it used activation checkpointing.
        written: where its forward passes write attributes.
    """

    def __init__(
        self,
        functional: FunctionalModel,
        device: torch.device,
        batch: TaskBatch,
        original: nn.Module | None = None,
    ) -> None:
        self.functional, self.device = functional, device
        self.batch, self.y = batch, batch.support_y[0].clone()
        self.x = map_inputs(lambda each: each[0].clone(), batch.support_x)
        original = functional.model if original is None else original
        self.model = clone(original, shared=False)
        self.weights = give_noisy_weights(self.model, original)
        before = snapshot(self.model)
        self.given, self.tensors = seen_inputs(self.x), tensor_values(self.model)
        with noting_checkpoints() as noted:
            self.expected = self.ask(self.x)
        self.checkpointed = bool(noted)
        states = [before, snapshot(self.model)]
        self.answers = {True: self.expected}
        with torch.no_grad(), suppress(Exception):  # it may write what it does not in training
            evaluated = self.ask(self.x, training=False)
            if isinstance(evaluated, Tensor):
                self.answers[False] = evaluated
        states.append(snapshot(self.model))
        self.written = {
            place
            for earlier, later in pairwise(states)
            for place, value in later.items()
            if earlier.get(place) != value
        }
        # Another number of examples shows what is kept for a number; all would take long.
        count = count_of(self.x)
        others = map_inputs(lambda each: each[-1][: count + 1].clone(), batch.query_x)
        pairs = zip(tensors_of(others), tensors_of(self.x), strict=True)
        if all(torch.equal(one, other) for one, other in pairs):
            others = map_inputs(lambda each: each[:1].expand_as(each).clone(), self.x)
        self.others = others

    def ask(
        self,
        x: Inputs,
        asleep: Collection[str] = (),
        *,
        training: bool = True,
        model: nn.Module | None = None,
    ) -> Tensor:
        """Return the copy's answer, or that of another one.

        Args:
            asleep: names of modules in evaluation mode.
            training: whether the others are in training mode.
        """
        own, norm = self.functional, self.functional.batch_norm
        model = self.model if model is None else model
        return answer(model, x, norm, own.output, asleep, training=training)

    def predict(self) -> Tensor:
        """Return the functional model's answer to x, with the copy's weights."""
        try:
            with stream(0, self.device), TaskRules():
                prediction: Tensor = self.functional(list(self.weights.values()), self.x)
        except Exception as error:
            raise RequestError(
                f"the model runs, but not with weights that are not its own ({said_by(error)}): "
                "replace that part of it"
            ) from error
        return prediction


Seen = tuple[int, int, Tensor]
"""A tensor's identity, how often it was written to in place, and a copy of its value."""


def seen(tensor: Tensor) -> Seen:
    """Note a tensor as it is now."""
    return id(tensor), version(tensor), tensor.detach().clone()


def unwritten(before: Seen, now: Seen) -> bool:
    """Return whether a tensor is the same, was not written to, and has the same value.

    Its version tells of a write that changes nothing, as of a value clamped to what it is; its
    value of one by .data or numpy, which torch does not count.
    """
    (*_, old), (*_, new) = before, now
    return before[:2] == now[:2] and same_value(old, new)


def same_value(one: Tensor, other: Tensor) -> bool:
    """Return whether tensors are equal, NaN to NaN."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def seen_inputs(x: Inputs) -> list[Seen]:
    """Note every tensor of an example's inputs."""
    return [*map(seen, tensors_of(x))]


def tensor_values(model: nn.Module) -> dict[str, Seen]:
    """Note every parameter and buffer."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: seen(each) for name, each in named.items()}


def close(own: Tensor, expected: Tensor, scale: float = 1.0) -> bool:
    """Return whether values agree, to a fraction of their own size and of the scale's."""
    return own.shape == expected.shape and torch.allclose(
        own, expected, rtol=1e-3, atol=1e-4 * scale, equal_nan=True
    )
