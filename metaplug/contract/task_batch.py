"""A batch of tasks: support and query examples of every task, stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

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
from metaplug.errors import RequestError, RunError, quoted

FIELDS = ("support_x", "support_y", "query_x", "query_y")

Part: TypeAlias = Literal["support", "query"]

IGNORED = -100
"""The class index that losses and scores leave out, as torch's cross-entropy does."""


class TaskSize(NamedTuple):
    """The size of one task.

    Attributes:
        support, query: the number of examples that count, the first of their axis.
        ways: the number of classes; the model's further outputs count in no loss and no score.
            None where all outputs count.
    """

    support: int
    query: int
    ways: int | None = None

    def examples(self, part: Part) -> int:
        """The number of examples of a part."""
        return self.support if part == "support" else self.query


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
        for name, each in self.named_tensors().items():
            self._check_tensor(name, each)
        support, query = self._named("support"), self._named("query")
        if [each[7:] for each in support] != [each[5:] for each in query]:
            raise RequestError(
                f"TaskBatch: support_x has the inputs {quoted(support)} and query_x "
                f"{quoted(query)}: give both parts the same, in one order"
            )
        first = next(iter(support))
        for part, inputs in (("support", support), ("query", query)):
            target = f"{part}_y"
            advice = "every field must stack the same number of tasks"
            for name in (*inputs, target):
                self._match(first, name, len, advice)
            for name in inputs:
                advice = "give one target for every example"
                self._match(name, target, lambda x: x.shape[1], advice)
        for one, other in zip(support, query, strict=True):
            advice = "support and query examples must have one input shape"
            self._match(one, other, lambda x: x.shape[2:], advice)
            self._match(one, other, lambda x: x.dtype, "convert one of them")
        advice = "support and query examples must have one target shape"
        self._match("support_y", "query_y", lambda x: x.shape[2:], advice)
        advice = "give integer labels in both, or floating-point targets in both"
        self._match("support_y", "query_y", Tensor.is_floating_point, advice)
        if self.sizes is not None:
            sizes = tuple(TaskSize(*size) for size in self.sizes)  # plain tuples, too
            object.__setattr__(self, "sizes", sizes)
            self._check_sizes(sizes)

    def _check_tensor(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            given = f"a {type(value).__name__}, not a tensor"
            raise RequestError(f"TaskBatch: {name} is {given}: give torch.as_tensor({name})")
        if value.ndim < 2 or 0 in value.shape[:2]:
            raise RequestError(
                f"TaskBatch: {name} has shape {tuple(value.shape)}: give (tasks, examples, ...) "
                "with at least one task and one example"
            )
        if value.device != self.device:
            raise RequestError(
                f"TaskBatch: {name} is on {value.device}, support_x on {self.device}: "
                "move all to one device"
            )

    def _check_sizes(self, sizes: Sequence[TaskSize]) -> None:
        most = [self.support_y.shape[1], self.query_y.shape[1]]
        fit = [
            0 < size.support <= most[0]
            and 0 < size.query <= most[1]
            and (size.ways is None or size.ways > 0)
            for size in sizes
        ]
        if len(sizes) != self.num_tasks or not all(fit):
            raise RequestError(
                f"TaskBatch: sizes is {quoted(map(str, sizes[:3]))}, but the batch has "
                f"{self.num_tasks} tasks of at most {most[0]} support and {most[1]} query examples:"
                " give one size for each task, or make the batch by TaskBatch.from_tasks"
            )

    def _named(self, part: Part) -> dict[str, Tensor]:
        return named_tensors(f"{part}_x", getattr(self, f"{part}_x"))

    def _match(self, one: str, other: str, of: Callable[[Tensor], Any], advice: str) -> None:
        known = self.named_tensors()
        first, second = known[one], known[other]
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
        _check_joined("stack", tasks, 1, "join tasks of other sizes by TaskBatch.from_tasks")
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
        _check_joined("from_tasks", tasks, 2, advice)
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
        for name, value in self.named_tensors().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                task = int((~torch.isfinite(value)).flatten(1).any(1).nonzero()[0])
                raise RunError(
                    f"{name} of task {number(task)} holds NaN or Inf, on which no loss is defined: "
                    "clean the data of that task"
                )
        self.check_labels(outputs)

    def check_labels(self, outputs: int | None) -> None:
        """Check integer labels alone, as `check_values` does; and each task's against its ways."""
        if self.support_y.is_floating_point():
            return
        ways = [None] if self.sizes is None else [size.ways for size in self.sizes]
        most = max((own for own in ways if own is not None), default=0)
        if outputs is not None and most > outputs:
            raise RequestError(
                f"a task has {most} ways, but the model has {outputs} outputs: give the model more "
                "outputs, or the tasks fewer ways"
            )
        for name in ("support_y", "query_y"):
            value: Tensor = getattr(self, name)
            if most:
                self._check_ways(name, value, ways)
            if outputs is None:
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

    def _check_ways(self, name: str, value: Tensor, ways: Sequence[int | None]) -> None:
        highest = value.flatten(1).amax(1).tolist()
        for task, (label, own) in enumerate(zip(highest, ways, strict=True)):
            if own is not None and label >= own:
                raise RequestError(
                    f"labels out of range: {name} of task {task} has the label {label}, but the "
                    f"task has {own} ways, for the labels 0 to {own - 1}: correct its labels or "
                    "its ways"
                )


def _check_joined(method: str, tasks: Sequence[TaskBatch], axes: int, advice: str) -> None:
    """Refuse batches that differ in form beyond their first `axes` axes."""

    def forms(task: TaskBatch) -> dict[str, tuple[Any, ...]]:
        return {
            name: (tuple(each.shape[axes:]), each.dtype, each.device)
            for name, each in task.named_tensors().items()
        }

    first = forms(tasks[0])
    for place, task in enumerate(tasks):
        own = forms(task)
        if own.keys() != first.keys():
            raise RequestError(
                f"TaskBatch.{method}: batch {place} has {quoted(own)}, batch 0 {quoted(first)}: "
                "give all tasks the same inputs"
            )
        for name, form in own.items():
            if form != first[name]:
                wanted, given = (
                    f"{str(dtype)[6:]} of shape {shape} on {device}"
                    for shape, dtype, device in (first[name], form)
                )
                shapes = form[0] != first[name][0]
                raise RequestError(
                    f"TaskBatch.{method}: {name} of batch {place} is {given} for "
                    f"{'a task' if axes == 1 else 'an example'}, of batch 0 {wanted}: "
                    f"{advice if shapes else 'convert or move one of them'}"
                )
