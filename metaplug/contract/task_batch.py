"""A batch of tasks: support and query examples of every task, stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaplug.errors import RequestError, RunError, quoted

_FIELDS = ("support_x", "support_y", "query_x", "query_y")


IGNORED = -100
"""The class index that losses and scores leave out, as torch's cross-entropy does."""


@dataclass(frozen=True, slots=True)
class TaskBatch:
    """T >= 1 tasks of equal size. Checked when made.

    Attributes:
        support_x: (T, n_support, *input), n_support >= 1.
        support_y: (T, n_support, *target): integer labels, or floating-point targets.
        query_x: (T, n_query, *input), n_query >= 1, of the dtype of support_x.
        query_y: (T, n_query, *target): integer where support_y is, floating-point where it is.

    Raises:
        RequestError: a field is no tensor, or its shape, dtype or device does not fit the others; the fields and shapes are named.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def __post_init__(self) -> None:
        for name in _FIELDS:
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise RequestError(
                    f"TaskBatch: {name} is a {type(value).__name__}, not a tensor: give torch.as_tensor({name})"
                )
            if value.ndim < 2 or 0 in value.shape[:2]:
                raise RequestError(
                    f"TaskBatch: {name} has shape {_shape(value)}: give (tasks, examples, ...) with at least one task and one example"
                )
            if value.device != self.support_x.device:
                raise RequestError(
                    f"TaskBatch: {name} is on {value.device}, support_x on {self.support_x.device}: move all four to one device"
                )
            if value.shape[0] != self.support_x.shape[0]:
                raise self._misfit(
                    "support_x", name, "every field must stack the same number of tasks"
                )
        for part in ("support", "query"):
            if getattr(self, f"{part}_x").shape[1] != getattr(self, f"{part}_y").shape[1]:
                raise self._misfit(f"{part}_x", f"{part}_y", "give one target for every example")
        if self.support_x.shape[2:] != self.query_x.shape[2:]:
            raise self._misfit(
                "support_x", "query_x", "support and query examples must have one input shape"
            )
        if self.support_y.shape[2:] != self.query_y.shape[2:]:
            raise self._misfit(
                "support_y", "query_y", "support and query examples must have one target shape"
            )
        if self.support_x.dtype != self.query_x.dtype:
            raise self._mixed("support_x", "query_x", "convert one of them")
        if self.support_y.is_floating_point() != self.query_y.is_floating_point():
            raise self._mixed(
                "support_y",
                "query_y",
                "give integer labels in both, or floating-point targets in both",
            )

    @classmethod
    def stack(cls, tasks: Sequence[TaskBatch]) -> TaskBatch:
        """Several batches as one, in their order: of tasks that you made one by one, for example.

        Raises:
            RequestError: there is none, or they differ in size. Padded examples would count in batch norm and in every mean over
                examples, so that tasks of unequal size are not padded.
        """
        if not tasks:
            raise RequestError("TaskBatch.stack: there is no task: give at least one")
        for name in _FIELDS:
            shapes = [getattr(task, name).shape[1:] for task in tasks]
            if different := [place for place, shape in enumerate(shapes) if shape != shapes[0]]:
                raise RequestError(
                    f"TaskBatch.stack: {name} of batch {different[0]} is {tuple(shapes[different[0]])} for a task, of batch 0 "
                    f"{tuple(shapes[0])}, but tasks that are computed together must be of one size, as padding would count in batch norm "
                    "and in every mean over examples: draw tasks of one size, or put those of another into batches of their own"
                )
        return cls(*(torch.cat([getattr(task, name) for task in tasks]) for name in _FIELDS))

    @classmethod
    def from_torchmeta(cls, batch: Any) -> TaskBatch:
        """A batch of torchmeta's BatchMetaDataLoader; shapes and dtypes stay as they are.

        Args:
            batch: {"train": (x, y), "test": (x, y)}, or with "support" and "query", each (T, examples, ...).

        Raises:
            RequestError: it has not these two parts, its targets are no tensors, or as TaskBatch raises.
        """
        parts = batch if isinstance(batch, Mapping) else {}
        names = next(
            (pair for pair in (("train", "test"), ("support", "query")) if set(pair) <= set(parts)),
            None,
        )
        if names is None:
            raise RequestError(
                f"TaskBatch.from_torchmeta: the batch has the parts {quoted(map(str, parts))}, not 'train' and 'test': "
                f"give its data set a ClassSplitter with num_train_per_class and num_test_per_class"
            )
        (support_x, support_y), (query_x, query_y) = (parts[name] for name in names)
        if not isinstance(support_y, Tensor):
            raise RequestError(
                "TaskBatch.from_torchmeta: the targets are names of classes, not integers: "
                "give its data set target_transform=Categorical(num_classes=...)"
            )
        return cls(support_x, support_y, query_x, query_y)

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self.support_x)

    @property
    def device(self) -> torch.device:
        """The one device of all four tensors."""
        return self.support_x.device

    def to(self, device: torch.device | str) -> TaskBatch:
        """The batch on `device`; the batch itself where it is there already. To CUDA it goes by pinned memory, and nobody waits for it."""
        tensors = [getattr(self, name) for name in _FIELDS]
        if torch.device(device).type == "cuda" and self.device.type == "cpu":
            return TaskBatch(
                *(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
            )
        moved = [tensor.to(device) for tensor in tensors]
        return (
            self
            if all(
                tensor is getattr(self, name) for name, tensor in zip(_FIELDS, moved, strict=True)
            )
            else TaskBatch(*moved)
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> TaskBatch:
        """The batch of what `function` makes of each of the four tensors."""
        return TaskBatch(*(function(getattr(self, name)) for name in _FIELDS))

    def tasks(self, rows: slice) -> TaskBatch:
        """The batch of some of the tasks."""
        return self.map(lambda tensor: tensor[rows])

    def recordable(self) -> TaskBatch:
        """The batch, or copies of tensors made under inference_mode, which autograd cannot save."""
        if not any(getattr(self, name).is_inference() for name in _FIELDS):
            return self
        return self.map(torch.clone)

    def check_values(
        self, outputs: int | None, number: Callable[[int], int] = lambda task: task
    ) -> None:
        """Check what shapes do not show; it waits for the device once per tensor.

        Args:
            outputs: the model's number of outputs (>= 1), against which integer labels are checked; None leaves labels unchecked.
            number: from a place in the batch to the number by which an error names that task; default: the place.

        Raises:
            RunError: NaN or Inf in an input or in a floating-point target; the field and the first such task are named.
            RequestError: an integer label is not one of 0 ... outputs - 1.
        """
        for name in _FIELDS:
            value: Tensor = getattr(self, name)
            if value.is_floating_point() and not torch.isfinite(value).all():
                task = int((~torch.isfinite(value)).flatten(1).any(1).nonzero()[0])
                raise RunError(
                    f"{name} of task {number(task)} holds NaN or Inf, on which no loss is defined: clean the data of that task"
                )
        self.check_labels(outputs)

    def check_labels(self, outputs: int | None) -> None:
        """The part of `check_values` that concerns integer labels."""
        for name in ("support_y", "query_y"):
            value: Tensor = getattr(self, name)
            if outputs is None or value.is_floating_point():
                continue
            value = value[value != IGNORED]
            if not len(value):
                continue
            low, high = (int(bound) for bound in value.aminmax())
            if low < 0 or high >= outputs:
                raise RequestError(
                    f"labels out of range: {name} has the label {low if low < 0 else high}, but the model has {outputs} outputs, "
                    f"for the labels 0 to {outputs - 1}: give the model more outputs, or the tasks fewer ways"
                )

    def _misfit(self, one: str, other: str, mend: str) -> RequestError:
        return RequestError(
            f"TaskBatch: {one} has shape {_shape(getattr(self, one))} and {other} {_shape(getattr(self, other))}, which do not fit: {mend}"
        )

    def _mixed(self, one: str, other: str, mend: str) -> RequestError:
        return RequestError(
            f"TaskBatch: {one} has dtype {_dtype(getattr(self, one))} and {other} {_dtype(getattr(self, other))}, which do not fit: {mend}"
        )


def _shape(value: Tensor) -> str:
    return str(tuple(value.shape))


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
