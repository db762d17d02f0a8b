"""What a batch goes through before anything is computed with it: it is checked and moved, and the model is tried on the first."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from metaplug.checks.model_changes import Unchanged
from metaplug.checks.module_state import left_as_it_was
from metaplug.checks.probe_model import check_forward, kept_by_forward
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.values import Kind
from metaplug.core.inner_loop import recording, usable, without_non_finite
from metaplug.errors import RequestError, RunError
from metaplug.execution.batching import Batching, BatchingChoice, choose_batching
from metaplug.execution.engine import Engine


class Intake:
    """The way of batches into an engine.

    Args:
        engine: its inner loop computes them.
        model: of that loop, as it is now.
        kind: of the tasks.
        wanted: how tasks are to be batched.

    Attributes:
        batching: how tasks are batched and why; known from the first batch on.
    """

    def __init__(self, engine: Engine, model: nn.Module, kind: Kind, wanted: Batching) -> None:
        self.batching: BatchingChoice | None = None
        self._engine, self._kind, self._wanted = engine, kind, wanted
        self._unchanged = Unchanged(model)

    def __call__(
        self,
        batch: TaskBatch,
        *,
        trusted: bool = False,
        numbers: Sequence[int] | None = None,
        iteration: int | None = None,
        skip: bool = False,
    ) -> TaskBatch:
        """The batch on the model's device; before the first, and when the model has got other hooks, the model is tried on it.

        Args:
            trusted: check it only where it lies in the host's memory, so that nobody waits for the device.
            numbers: of the tasks, for errors; default: their places.
            iteration: that the batch is for, for errors.
            skip: let NaN and Inf pass, which the engine finds.

        Raises:
            RequestError: the model was changed since, cannot be computed with, or does not fit the batch; a label is out of range.
            RunError: NaN or Inf in the batch.
        """
        hooked = not trusted and self._hooked(batch)
        if batch.device.type == "cpu":
            self._check_values(batch, numbers, iteration, skip=skip)
            trusted = trusted or self.batching is not None
        batch = batch.to(self._engine.device)
        if self.batching is None or hooked:
            with recording():
                tried = without_non_finite(usable(batch)) if skip else usable(batch)
                self._engine.outputs = check_forward(self._engine.inner, tried, self._kind)
                self.batching = self.batching or choose_batching(
                    self._wanted, self._engine.inner, tried
                )
            self._engine.inner.vectorized = self.batching.batching == "vectorized"
            self._unchanged.accept()
        if not trusted:
            self._check_values(batch, numbers, iteration, skip=skip)
        return batch

    def _hooked(self, batch: TaskBatch) -> bool:
        """Whether the model has other hooks than were tried; what its own forward passes write, whoever calls it, is no change of it."""
        try:
            return self._unchanged.check()
        except RequestError:
            inner = self._engine.inner
            with recording(), left_as_it_was(inner.model):
                self._unchanged.put_back()
                kept = kept_by_forward(inner, usable(batch.to(self._engine.device)).support_x[0])
        self._unchanged.leave_out(kept)
        return self._unchanged.check()

    def _check_values(
        self, batch: TaskBatch, numbers: Sequence[int] | None, iteration: int | None, *, skip: bool
    ) -> None:
        if skip:
            batch.check_labels(self._engine.outputs)
            return
        try:
            batch.check_values(
                self._engine.outputs,
                (lambda place: place) if numbers is None else numbers.__getitem__,
            )
        except RunError as error:
            if iteration is None:
                raise
            raise RunError(
                f"iteration {iteration} stopped, nothing was updated: {error}"
            ) from error
