"""A CombinationMetaDataset of torchmeta as a stream, whose tasks a seed draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import RequestError, one_line
from metaplug.random_streams import stream
from metaplug.tasks.draws import distinct, draw
from metaplug.tasks.torchmeta.compatibility import apply


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
