"""The way of a batch into the engine: checked, moved, and the model tried on the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from metaplug.checks.attention_mask import choose_mask
from metaplug.checks.compare_batching import difference
from metaplug.checks.find_frozen import find_frozen
from metaplug.checks.model_changes import ModelChanges
from metaplug.checks.probe_model import probe_model, written_by_forward
from metaplug.contract.schedule import iteration_text
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_groups import uniform
from metaplug.contract.values import Kind
from metaplug.core.recording import recording
from metaplug.errors import RequestError, RunError
from metaplug.execution.batching import Batching, BatchingChoice, choose_batching, refusal
from metaplug.execution.engine import ONE_AT_A_TIME, Engine


class PrepareBatch:
    """Prepares batches for an engine.

    Args:
        engine: its inner loop computes them.
        model: of that loop, as it is now.
        kind: of the tasks.
        wanted: how tasks are to be batched.
        cache_frozen: whether what the inner loop cannot change is kept from step to step.

    Attributes:
        batching: how tasks are batched and why; known from the first batch on.
    """

    def __init__(
        self,
        engine: Engine,
        model: nn.Module,
        kind: Kind,
        wanted: Batching,
        *,
        cache_frozen: bool = False,
    ) -> None:
        self.batching: BatchingChoice | None = None
        self._engine, self._kind, self._wanted = engine, kind, wanted
        self._cache_frozen = cache_frozen
        self._changes = ModelChanges(model)
        self._form: Any = None
        self._lengths: set[int] = set()

    def __call__(
        self,
        batch: TaskBatch,
        *,
        trusted: bool = False,
        numbers: Sequence[int] | None = None,
        iteration: int | None = None,
        skip: bool = False,
    ) -> TaskBatch:
        """Return the batch on the model's device.

        Before the first and one of another form, and where the model has got other hooks, the model
        is tried on it.

        Args:
            trusted: check the batch only where it lies in the host's memory, so that nobody waits
                for the device.
            numbers: of the tasks, for errors; default: their places.
            iteration: that the batch is for, for errors.
            skip: let NaN and Inf pass; the engine finds them.

        Raises:
            RequestError: the model was changed, cannot be computed with, or does not fit the batch;
                a label is out of range.
            RunError: NaN or Inf in the batch.
        """
        with ONE_AT_A_TIME:
            if not trusted and self.batching is None:
                self._accept_calls_by_hand(batch)
            hooked = not trusted and self._changes.check()
            if batch.device.type == "cpu":
                self._check_values(batch, numbers, iteration, skip=skip)
                trusted = trusted or self.batching is not None
            batch = batch.to(self._engine.device)
            if self.batching is None or hooked or _form(batch) != self._form:
                self._try(batch, skip=skip)
            elif _mask_length(batch) not in self._lengths:
                self._try_length(batch)
        if not trusted:
            self._check_values(batch, numbers, iteration, skip=skip)
        return batch

    def _try(self, batch: TaskBatch, *, skip: bool) -> None:
        inner, form = self._engine.inner, _form(batch)
        with recording():
            batch = batch.recordable()
            if skip:
                batch = batch.map(
                    lambda each: each.nan_to_num() if each.is_floating_point() else each
                )
            inner.functional.mask = None
            if inner.features is not None:
                inner.features.remove()
                inner.features = None
            probed = probe_model(inner, batch, self._kind)
            self._engine.outputs = probed.outputs
            inner.functional.mask = choose_mask(inner, batch)
            # Anew with other hooks: vmap may not follow them.
            batching = choose_batching(self._wanted, inner, batch, difference)
            if self._cache_frozen:
                inner.features = find_frozen(inner, batch, probed.written)
        # Only now, as a model that was refused is tried again on the next batch.
        self.batching = batching
        inner.vectorized = batching.batching == "vectorized"
        self._changes.accept(probed.written)
        self._form, self._lengths = form, {_mask_length(batch)}

    def _try_length(self, batch: TaskBatch) -> None:
        """Go on with one task at a time where masks of this length show that only that is exact.

        A window of attention shows in texts that are longer than it is, and libraries branch on the
        values of a mask in texts of some lengths alone. What is found holds for all lengths from
        now on, so a batch that was prepared before may still be computed, or computed again.
        """
        inner, length = self._engine.inner, _mask_length(batch)
        before, inner.functional.mask = inner.functional.mask, None
        with recording():
            batch = uniform(batch).recordable()
            why = None
            if before is not None and choose_mask(inner, batch) != before:
                why = "the model's attention is not what a mask that is made for all tasks gives"
            elif before is None and inner.vectorized:
                why = refusal(inner, batch)
        if why is None or self._wanted == "vectorized":
            inner.functional.mask = before
        if why is not None and inner.vectorized:
            why = f"torch.vmap refuses the model for texts of {length} tokens: {why}"
            if self._wanted == "vectorized":
                raise RequestError(
                    f"task batching 'vectorized' cannot be had, as {why}; use 'auto' or "
                    "'sequential'"
                )
            self.batching, inner.vectorized = BatchingChoice("sequential", why), False
        self._lengths.add(length)

    def _accept_calls_by_hand(self, batch: TaskBatch) -> None:
        """Leave out what forward wrote when the user called the model before the first batch."""
        try:
            self._changes.check()
        except RequestError:
            with recording(), suppress(RequestError):
                batch = batch.to(self._engine.device).recordable()
                self._changes.accept(written_by_forward(self._engine.inner, batch))

    def _check_values(
        self,
        batch: TaskBatch,
        numbers: Sequence[int] | None,
        iteration: int | None,
        *,
        skip: bool,
    ) -> None:
        if skip:
            batch.check_labels(self._engine.outputs)
            return
        try:
            number = (lambda place: place) if numbers is None else numbers.__getitem__
            batch.check_values(self._engine.outputs, number)
        except RunError as error:
            if iteration is None:
                raise
            raise RunError(
                f"{iteration_text(iteration)} stopped, nothing was updated: {error}"
            ) from error


def _form(batch: TaskBatch) -> Any:
    """The inputs and targets by name, without their sizes."""
    return {name: (each.ndim, each.dtype) for name, each in batch.named_tensors().items()}


def _mask_length(batch: TaskBatch) -> int:
    """The tokens of the texts; 0 for tasks without a mask of them."""
    x = batch.support_x
    mask = x.get("attention_mask") if isinstance(x, Mapping) else None
    return 0 if mask is None else int(mask.shape[-1])
