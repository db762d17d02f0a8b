"""A batch of tasks: support and query examples of every task, stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaplug.errors import RequestError, RunError, quoted

FIELDS = ("support_x", "support_y", "query_x", "query_y")


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
        RequestError: names a field that is no tensor, or does not fit the others.

    >>> x, y = torch.zeros(8, 5, 28), torch.zeros(8, 5, dtype=torch.long)
    >>> TaskBatch(x, y, x, y).num_tasks
    8
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def __post_init__(self) -> None:
        for name in FIELDS:
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                given = f"a {type(value).__name__}, not a tensor"
                raise RequestError(f"TaskBatch: {name} is {given}: give torch.as_tensor({name})")
            if value.ndim < 2 or 0 in value.shape[:2]:
                raise RequestError(
                    f"TaskBatch: {name} has shape {tuple(value.shape)}: give (tasks, examples, "
                    "...) with at least one task and one example"
                )
            if value.device != self.device:
                raise RequestError(
                    f"TaskBatch: {name} is on {value.device}, support_x on {self.device}: "
                    "move all four to one device"
                )
            self._match("support_x", name, len, "every field must stack the same number of tasks")
        for part in ("support", "query"):
            advice = "give one target for every example"
            self._match(f"{part}_x", f"{part}_y", lambda x: x.shape[1], advice)
        for axis, word in (("x", "input"), ("y", "target")):
            advice = f"support and query examples must have one {word} shape"
            self._match(f"support_{axis}", f"query_{axis}", lambda x: x.shape[2:], advice)
        self._match("support_x", "query_x", lambda x: x.dtype, "convert one of them")
        advice = "give integer labels in both, or floating-point targets in both"
        self._match("support_y", "query_y", Tensor.is_floating_point, advice)

    def _match(self, one: str, other: str, of: Callable[[Tensor], Any], advice: str) -> None:
        first, second = getattr(self, one), getattr(self, other)
        if of(first) != of(second):
            a, b = (f"{str(x.dtype)[6:]} of shape {tuple(x.shape)}" for x in (first, second))
            raise RequestError(
                f"TaskBatch: {one} is {a} and {other} {b}, which do not fit: {advice}"
            )

    @classmethod
    def stack(cls, tasks: Sequence[TaskBatch]) -> TaskBatch:
        """Join batches of one size, such as tasks made one by one, in their order."""
        if not tasks:
            raise RequestError("TaskBatch.stack: there is no task: give at least one")
        for name in FIELDS:
            shapes = [tuple(getattr(task, name).shape[1:]) for task in tasks]
            if different := [place for place, shape in enumerate(shapes) if shape != shapes[0]]:
                raise RequestError(
                    f"TaskBatch.stack: {name} of batch {different[0]} is {shapes[different[0]]} "
                    f"for a task, of batch 0 {shapes[0]}, but tasks computed together must be of "
                    "one size, as padding would count in every mean over examples: draw tasks of "
                    "one size, or put those of another into batches of their own"
                )
        return cls(*(torch.cat([getattr(task, name) for task in tasks]) for name in FIELDS))

    @classmethod
    def from_torchmeta(cls, batch: Any) -> TaskBatch:
        """Convert a batch of torchmeta's BatchMetaDataLoader; shapes and dtypes stay.

        It is {"train": (x, y), "test": (x, y)}, or with "support" and "query", (T, examples, ...).
        """
        parts = batch if isinstance(batch, Mapping) else {}
        pairs = [pair for pair in (("train", "test"), ("support", "query")) if {*pair} <= {*parts}]
        if not pairs:
            raise RequestError(
                f"TaskBatch.from_torchmeta: the batch has the parts {quoted(map(str, parts))}, not "
                "'train' and 'test': give its data set a ClassSplitter with num_train_per_class "
                "and num_test_per_class"
            )
        (support_x, support_y), (query_x, query_y) = (parts[name] for name in pairs[0])
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
        """Move the batch to `device`; the batch itself if it is there already.

        It goes to CUDA through pinned memory, without a host synchronization.
        """
        tensors = [getattr(self, name) for name in FIELDS]
        pins = torch.device(device).type == "cuda" and self.device.type == "cpu"
        given = [tensor.pin_memory() for tensor in tensors] if pins else tensors
        moved = [tensor.to(device, non_blocking=pins) for tensor in given]
        stays = all(new is old for new, old in zip(moved, tensors, strict=True))
        return self if stays else TaskBatch(*moved)

    def map(self, function: Callable[[Tensor], Tensor]) -> TaskBatch:
        """The batch of what `function` makes of each of the four tensors."""
        return TaskBatch(*(function(getattr(self, name)) for name in FIELDS))

    def tasks(self, rows: slice) -> TaskBatch:
        """The batch of some of the tasks."""
        return self.map(lambda tensor: tensor[rows])

    def recordable(self) -> TaskBatch:
        """The batch, or copies of tensors made under inference_mode, which autograd cannot save."""
        if not any(getattr(self, name).is_inference() for name in FIELDS):
            return self
        return self.map(torch.clone)

    def check_values(
        self, outputs: int | None, number: Callable[[int], int] = lambda task: task
    ) -> None:
        """Check what shapes do not show, with one host synchronization per tensor.

        Args:
            outputs: the model's number of outputs (>= 1), against which integer labels are checked;
                None leaves labels unchecked.
            number: from a place in the batch to the number that errors give that task.

        Raises:
            RunError: NaN or Inf in an input or in a floating-point target; names field and task.
            RequestError: an integer label is not one of 0 ... outputs - 1.
        """
        for name in FIELDS:
            value: Tensor = getattr(self, name)
            if value.is_floating_point() and not torch.isfinite(value).all():
                task = int((~torch.isfinite(value)).flatten(1).any(1).nonzero()[0])
                raise RunError(
                    f"{name} of task {number(task)} holds NaN or Inf, on which no loss is defined: "
                    "clean the data of that task"
                )
        self.check_labels(outputs)

    def check_labels(self, outputs: int | None) -> None:
        """Check integer labels alone, as `check_values` does."""
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
                    f"labels out of range: {name} has the label {low if low < 0 else high}, but "
                    f"the model has {outputs} outputs, for the labels 0 to {outputs - 1}: "
                    "give the model more outputs, or the tasks fewer ways"
                )
