"""A batch of tasks: support and query examples of every task, stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaplug.contract.inputs import (
    Inputs,
    count_of,
    device_of,
    map_inputs,
    named_tensors,
    tensors_of,
    with_tensors,
)
from metaplug.contract.task_checks import check_fields, check_finite, check_joined, check_labels
from metaplug.contract.task_sizes import IGNORED, TaskSize
from metaplug.errors import RequestError, quoted

FIELDS = ("support_x", "support_y", "query_x", "query_y")


@dataclass(frozen=True, slots=True)
class TaskBatch:
    """T >= 1 tasks, of equal size or padded to it. Checked when made.

    Attributes:
        support_x: (T, n_support, *input), n_support >= 1; or a mapping or tuple of such tensors,
            which the model gets as keyword or positional arguments.
        support_y: (T, n_support, *target): integer labels, or floating-point targets.
        query_x: (T, n_query, *input), n_query >= 1, in the form and dtypes of support_x.
        query_y: (T, n_query, *target): integer where support_y is, floating-point where it is.
        sizes: of each task, where they differ; what lies beyond a task's size never reaches the
            model (`from_tasks`). None: every example and every output of the model counts.

    Raises:
        RequestError: names a field that is no tensor, or does not fit the others.

    >>> x, y = torch.zeros(8, 5, 28), torch.zeros(8, 5, dtype=torch.long)
    >>> TaskBatch(x, y, x, y).num_tasks
    8
    """

    support_x: Inputs
    support_y: Tensor
    query_x: Inputs
    query_y: Tensor
    sizes: tuple[TaskSize, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in FIELDS:
            value = getattr(self, name)
            if isinstance(value, Mapping) and name.endswith("_x"):
                value = {str(key): each for key, each in value.items()}
                object.__setattr__(self, name, value)
            if isinstance(value, dict | tuple) and not value:
                raise RequestError(f"TaskBatch: {name} is empty: give at least one tensor")
        if self.sizes is not None:
            object.__setattr__(self, "sizes", tuple(TaskSize(*size) for size in self.sizes))
        check_fields(self.named_tensors(), self.sizes)

    @classmethod
    def stack(cls, tasks: Sequence[TaskBatch]) -> TaskBatch:
        """Join batches of one size, such as tasks made one by one, in their order."""
        if not tasks:
            raise RequestError("TaskBatch.stack: there is no task: give at least one")
        check_joined(
            "stack",
            [task.named_tensors() for task in tasks],
            axes=1,
            advice="join tasks of other sizes by TaskBatch.from_tasks",
        )
        return cls._joined(tasks)

    @classmethod
    def from_tasks(
        cls, tasks: Sequence[TaskBatch], *, ways: Sequence[int | None] | None = None
    ) -> TaskBatch:
        """Join tasks whose numbers of examples, and of classes, may differ, in their order.

        Each task gets exactly the result that it gets alone: the examples that fill the others up
        reach neither the model nor a statistic of batch norm. Tasks of one size are computed
        together.

        Args:
            tasks: batches of one task or more.
            ways: classes of each task, at most the model's outputs; the outputs beyond them count
                in no loss and no score. Default: what a batch says itself in `sizes`; else, for one
                class index an example, one more than a task's highest label, and for other targets
                None, where all outputs count.

        Raises:
            RequestError: no task, other inputs or targets from task to task, or a label that is
                not below a task's ways.

        >>> y = torch.tensor([[0, 1, 2]])
        >>> small, large = TaskBatch(y, y, y, y), TaskBatch(*[y.repeat(1, 2)] * 4)
        >>> TaskBatch.from_tasks([small, large]).sizes[0]
        TaskSize(support=3, query=3, ways=3)
        """
        if not tasks:
            raise RequestError("TaskBatch.from_tasks: there is no task: give at least one")
        advice = "pad the examples of all tasks to one shape"
        check_joined("from_tasks", [task.named_tensors() for task in tasks], 2, advice)
        sizes = [size for task in tasks for size in task._sizes(infer=ways is None)]
        if ways is not None:
            if len(ways) != len(sizes):
                raise RequestError(
                    f"TaskBatch.from_tasks: {len(ways)} ways for {len(sizes)} tasks: give one "
                    "number for each"
                )
            sizes = [size._replace(ways=own) for size, own in zip(sizes, ways, strict=True)]
        support = max(task.support_y.shape[1] for task in tasks)
        query = max(task.query_y.shape[1] for task in tasks)
        joined = cls._joined([task._padded(support, query) for task in tasks])
        batch = cls(*(getattr(joined, name) for name in FIELDS), sizes=tuple(sizes))
        batch.check_labels(None)
        full = TaskSize(support, query, None)
        return joined if all(size == full for size in sizes) else batch

    @classmethod
    def _joined(cls, tasks: Sequence[TaskBatch]) -> TaskBatch:
        lists = [task.tensors() for task in tasks]
        whole = tasks[0].with_tensors([torch.cat(each) for each in zip(*lists, strict=True)])
        sizes = None
        if any(task.sizes is not None for task in tasks):
            sizes = tuple(size for task in tasks for size in task._sizes())
        return cls(*(getattr(whole, name) for name in FIELDS), sizes=sizes)

    def _padded(self, support: int, query: int) -> TaskBatch:
        """The batch with more rows of examples, whose labels are ignored, and no sizes."""
        fields = []
        for name in FIELDS:
            most = support if name.startswith("support") else query
            fill = IGNORED if name.endswith("_y") and not self.support_y.is_floating_point() else 0

            def pad(tensor: Tensor, most: int = most, fill: int = fill) -> Tensor:
                rest = (tensor.shape[0], most - tensor.shape[1], *tensor.shape[2:])
                return torch.cat([tensor, tensor.new_full(rest, fill)], 1) if rest[1] else tensor

            fields.append(map_inputs(pad, getattr(self, name)))
        return TaskBatch(*fields)

    def _sizes(self, *, infer: bool = False) -> tuple[TaskSize, ...]:
        """The size of every task.

        Args:
            infer: where `sizes` says nothing, take one more than the highest label for the ways.
        """
        if self.sizes is not None:
            return self.sizes
        ways: list[int | None] = [None] * self.num_tasks
        if infer and self.support_y.ndim == 2 and not self.support_y.is_floating_point():
            highest = torch.cat([self.support_y, self.query_y], 1).amax(1)
            ways = [max(label + 1, 1) for label in highest.tolist()]
        support, query = self.support_y.shape[1], self.query_y.shape[1]
        return tuple(TaskSize(support, query, own) for own in ways)

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
        return count_of(self.support_x)

    @property
    def device(self) -> torch.device:
        """The one device of all tensors."""
        device: torch.device = device_of(self.support_x)
        return device

    def named_tensors(self) -> dict[str, Tensor]:
        """All tensors, by how a user would write them."""
        return {
            name: each
            for one in FIELDS
            for name, each in named_tensors(one, getattr(self, one)).items()
        }

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the fields."""
        return [each for name in FIELDS for each in tensors_of(getattr(self, name))]

    def with_tensors(self, tensors: Sequence[Tensor]) -> TaskBatch:
        """The batch of other tensors, in the order of `tensors()`, of the same tasks."""
        given, fields = list(tensors), []
        for name in FIELDS:
            value = getattr(self, name)
            count = len(tensors_of(value))
            fields.append(with_tensors(value, given[:count]))
            given = given[count:]
        return TaskBatch(*fields, sizes=self.sizes)

    def to(self, device: torch.device | str) -> TaskBatch:
        """Move the batch to `device`; the batch itself if it is there already.

        It goes to CUDA through pinned memory, without a host synchronization.
        """
        tensors = self.tensors()
        pins = torch.device(device).type == "cuda" and self.device.type == "cpu"
        given = [tensor.pin_memory() for tensor in tensors] if pins else tensors
        moved = [tensor.to(device, non_blocking=pins) for tensor in given]
        stays = all(new is old for new, old in zip(moved, tensors, strict=True))
        return self if stays else self.with_tensors(moved)

    def map(self, function: Callable[[Tensor], Tensor]) -> TaskBatch:
        """The batch of what `function` makes of each tensor, of the same tasks."""
        return self.with_tensors([function(each) for each in self.tensors()])

    def tasks(self, rows: slice) -> TaskBatch:
        """The batch of some of the tasks."""
        sizes = None if self.sizes is None else self.sizes[rows]
        fields = [map_inputs(lambda each: each[rows], getattr(self, name)) for name in FIELDS]
        return TaskBatch(*fields, sizes=sizes)

    def recordable(self) -> TaskBatch:
        """The batch, or copies of tensors made under inference_mode, which autograd cannot save."""
        if not any(each.is_inference() for each in self.tensors()):
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
        check_finite(self.named_tensors(), number)
        self.check_labels(outputs)

    def check_labels(self, outputs: int | None) -> None:
        """Check integer labels alone, as `check_values` does; and each task's against its ways."""
        ways = [] if self.sizes is None else [size.ways for size in self.sizes]
        check_labels({"support_y": self.support_y, "query_y": self.query_y}, outputs, ways)
