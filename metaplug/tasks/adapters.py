"""What `MetaLearner` takes as tasks: streams as they are, and torchmeta's meta-data sets and loaders as streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import RequestError
from metaplug.random_streams import stream
from metaplug.tasks.draws import distinct, draw
from metaplug.tasks.episodes import TaskStream
from metaplug.tasks.torchmeta.mends import apply


def as_stream(tasks: Any, seed: int = 0) -> TaskStream:
    """Tasks as a TaskStream.

    Args:
        tasks: a TaskStream, which is given back unchanged; a torchmeta CombinationMetaDataset, see CombinationTasks; or a torchmeta
            BatchMetaDataLoader, see LoaderTasks. torchmeta is imported only where the object comes from it.
        seed: of the tasks of a CombinationMetaDataset.

    Raises:
        RequestError: it is none of these.
    """
    if callable(getattr(tasks, "batch", None)):
        given: TaskStream = tasks
        return given
    if any(base.__module__.partition(".")[0] == "torchmeta" for base in type(tasks).__mro__):
        data = apply().utils.data
        if isinstance(tasks, data.CombinationMetaDataset):
            return CombinationTasks(tasks, seed)
        if isinstance(tasks, data.BatchMetaDataLoader):
            return LoaderTasks(tasks)
    raise RequestError(
        f"tasks of type {type(tasks).__name__} have no method batch(iteration, indices): give a stream, such as the train, val or test of "
        f"a task source, or a CombinationMetaDataset or BatchMetaDataLoader of torchmeta"
    )


class CombinationTasks:
    """The tasks of a torchmeta CombinationMetaDataset. A TaskStream, whose tasks depend on seed, split, iteration and index alone.

    The classes of a task are drawn here, not by torchmeta's sampler; turned classes count, where the data set has them. Its labels, the
    order of its examples, and what its transforms draw from torch start from the task's own seed. Which examples of a class are support
    and which query, torchmeta's ClassSplitter decides from the classes.

    Args:
        dataset: with a transform to tensors, target_transform=Categorical(ways), and a ClassSplitter. Its random state is set anew for
            every task.
        seed: any integer.

    Raises:
        RequestError: it has fewer classes than a task needs; or, from `batch`, its tasks cannot be stacked, or as
            `TaskBatch.from_torchmeta` raises.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.split: str = dataset.meta_split
        ways, classes = dataset.num_classes_per_task, len(dataset.dataset)
        self._collate = apply().utils.data.dataloader.BatchMetaCollate(default_collate)
        if classes < ways:
            raise RequestError(
                f"{ways}-way tasks need {ways} classes, but the {type(dataset).__name__} of the {self.split} split has {classes}: "
                f"lower num_classes_per_task"
            )

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The tasks `indices` of one iteration, of the shapes and dtypes that torchmeta gives."""
        ways = self.dataset.num_classes_per_task
        words = draw(self.seed, self.split, iteration, indices, ways + 1)
        chosen = distinct(words[:, :ways], np.full(len(indices), len(self.dataset.dataset)))
        tasks = [
            self._task(tuple(classes), word)
            for classes, word in zip(chosen.tolist(), words[:, ways].tolist(), strict=True)
        ]
        return TaskBatch.from_torchmeta(default_collate(tasks))

    def _task(self, classes: tuple[int, ...], seed: int) -> Any:
        # torchmeta draws labels from torch's own generator, and the order of examples from a state that goes on from task to task.
        with stream(seed >> 1, torch.device("cpu")):
            self.dataset.seed(seed % 2**32)
            try:
                return self._collate.collate_task(self.dataset[classes])
            except TypeError as error:
                raise RequestError(
                    f"the tasks of this {type(self.dataset).__name__} cannot be stacked ({' '.join(str(error).split())}): "
                    f"give it a transform to tensors, such as torchvision's ToTensor()"
                ) from error


class LoaderTasks:
    """The tasks of a torchmeta BatchMetaDataLoader. A TaskStream that takes them as they come, epoch after epoch.

    Iteration and indices say only how many are taken: which tasks these are, the loader decides, and another run repeats them only as
    far as its sampler and transforms do. Every call of `fit` and `evaluate` starts the loader anew.

    Args:
        loader: over a data set with a ClassSplitter; its batch size need not be that of a meta-batch.

    Raises:
        RequestError: from `batch`: the loader is empty, or as `TaskBatch.from_torchmeta` raises.
    """

    def __init__(self, loader: Any) -> None:
        self.split: str = loader.dataset.meta_split
        self._tasks = _endless(loader)

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The next len(indices) tasks."""
        fields = zip(*islice(self._tasks, len(indices)), strict=True)
        return TaskBatch(*(torch.stack(tasks) for tasks in fields))


def _endless(loader: Any) -> Iterator[tuple[Tensor, ...]]:
    """Task by task: support_x, support_y, query_x, query_y."""
    while True:
        epoch = iter(loader)
        first = next(epoch, None)
        if first is None:
            raise RequestError(
                "the BatchMetaDataLoader gives no batch: give it more tasks, or a smaller batch_size without drop_last"
            )
        yield from _tasks_of(first)
        for given in epoch:
            yield from _tasks_of(given)


def _tasks_of(given: Any) -> Iterator[tuple[Tensor, ...]]:
    batch = TaskBatch.from_torchmeta(given)
    return zip(batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True)
