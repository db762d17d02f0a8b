"""Tasks as `MetaLearner` takes them: streams as they are, torchmeta's data sets as streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import RequestError, one_line
from metaplug.random_streams import stream
from metaplug.tasks.draws import distinct, draw
from metaplug.tasks.episodes import TaskStream
from metaplug.tasks.torchmeta.compatibility import apply


def as_stream(tasks: Any, seed: int = 0) -> TaskStream:
    """Tasks as a TaskStream.

    Args:
        tasks: a TaskStream, which is returned unchanged; or of torchmeta, a CombinationMetaDataset
            (see CombinationTasks) or a BatchMetaDataLoader (see LoaderTasks). torchmeta is
            imported only where the object comes from it.
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
        f"tasks of type {type(tasks).__name__} have no method batch(iteration, indices): give a "
        "stream, such as the train, val or test of a task source, or a CombinationMetaDataset or "
        "BatchMetaDataLoader of torchmeta"
    )


class CombinationTasks:
    """The tasks of a torchmeta CombinationMetaDataset. A TaskStream.

    A task's classes are drawn here, not by torchmeta's sampler, from seed, split, iteration and
    index alone; turned classes count, where the data set has them. Its labels, the order of its
    examples, and the random numbers of its transforms start from the task's own seed. Which
    examples of a class are support and which query, torchmeta's ClassSplitter decides.

    Args:
        dataset: with a transform to tensors, target_transform=Categorical(ways), and a
            ClassSplitter. Its random state is set anew for every task.
        seed: any integer.

    Raises:
        RequestError: it has fewer classes than a task needs; or, from `batch`, its tasks cannot be
            stacked, or as `TaskBatch.from_torchmeta` raises.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.split: str = dataset.meta_split
        ways, classes = dataset.num_classes_per_task, len(dataset.dataset)
        self._collate = apply().utils.data.dataloader.BatchMetaCollate(default_collate)
        if classes < ways:
            raise RequestError(
                f"{ways}-way tasks need {ways} classes, but the {type(dataset).__name__} of the "
                f"{self.split} split has {classes}: lower num_classes_per_task"
            )

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The tasks `indices` of one iteration, of the shapes and dtypes that torchmeta gives."""
        ways = self.dataset.num_classes_per_task
        words = draw(self.seed, self.split, iteration, indices, ways + 1)
        chosen = distinct(words[:, :ways], np.full(len(indices), len(self.dataset.dataset)))
        pairs = zip(chosen.tolist(), words[:, ways].tolist(), strict=True)
        tasks = [self._task(tuple(classes), word) for classes, word in pairs]
        return TaskBatch.from_torchmeta(default_collate(tasks))

    def _task(self, classes: tuple[int, ...], seed: int) -> Any:
        # torchmeta draws labels from torch's own generator, and the order of examples from a state
        # that goes on from task to task.
        with stream(seed >> 1, torch.device("cpu")):
            self.dataset.seed(seed % 2**32)
            try:
                return self._collate.collate_task(self.dataset[classes])
            except TypeError as error:
                raise RequestError(
                    f"the tasks of this {type(self.dataset).__name__} cannot be stacked "
                    f"({one_line(error)}): give it a transform to tensors, such as torchvision's "
                    "ToTensor()"
                ) from error


class LoaderTasks:
    """The tasks of a torchmeta BatchMetaDataLoader as they come, epoch after epoch. A TaskStream.

    Iteration and indices say only how many are taken: which tasks these are, the loader decides,
    and another run repeats them only as far as its sampler and transforms do. Every call of `fit`
    and `evaluate` starts the loader anew.

    Args:
        loader: over a data set with a ClassSplitter; its batch size need not be a meta-batch's.

    Raises:
        RequestError: from `batch`: the loader is empty, or as `TaskBatch.from_torchmeta` raises.
    """

    def __init__(self, loader: Any) -> None:
        self.split: str = loader.dataset.meta_split
        self._tasks = _endless(loader)

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The next len(indices) tasks."""
        fields = zip(*islice(self._tasks, len(indices)), strict=True)
        return TaskBatch(*map(torch.stack, fields))


def _endless(loader: Any) -> Iterator[tuple[Tensor, ...]]:
    """Yield support_x, support_y, query_x, query_y of one task after the other."""
    while True:
        empty = True
        for given in loader:
            empty = False
            batch = TaskBatch.from_torchmeta(given)
            yield from zip(
                batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True
            )
        if empty:
            raise RequestError(
                "the BatchMetaDataLoader gives no batch: give it more tasks, or a smaller "
                "batch_size without drop_last"
            )
