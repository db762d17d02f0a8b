"""The cost of drawing tasks, side by side: metaplug's episodes and torchmeta's loader, on images of the size of Omniglot."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from metaplug.bench.measuring import spread
from metaplug.bench.meters import ON_CPU
from metaplug.errors import RequestError
from metaplug.tasks import ClassImages, ImageEpisodes
from metaplug.tasks.torchmeta.compatibility import apply

CLASSES, COUNT, SIDE = 1600, 20, 28
"""Omniglot's: classes, images of each, pixels of a side."""


@dataclass(frozen=True)
class DrawRow:
    """One contestant: what it draws, and the milliseconds of a batch, median and half the distance of the quartiles; or why it cannot."""

    contestant: str
    milliseconds: float | None
    spread: float | None
    reason: str | None = None


def run(
    *, repeats: int, tasks: int = 32, ways: int = 5, shots: int = 1, queries: int = 15
) -> list[DrawRow]:
    """Draw batches of tasks, in turn, `repeats` times each, from the same random images in memory.

    torchmeta is given its images as arrays of the right size already, so that no decoding or resizing counts.
    """
    images = torch.randint(
        0,
        256,
        (CLASSES * COUNT, 1, SIDE, SIDE),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )
    classes = ClassImages(tuple(str(index) for index in range(CLASSES)), images, (COUNT,) * CLASSES)
    episodes = ImageEpisodes(
        classes, split="train", ways=ways, shots=shots, queries=queries, seed=0
    )
    iterations = count()
    contestants: dict[str, Callable[[], object]] = {
        "metaplug": lambda: episodes.batch(next(iterations), range(tasks))
    }
    refusal = None
    try:
        loader = _endless(_torchmeta_loader(images, tasks, ways, shots, queries))
        contestants["torchmeta's BatchMetaDataLoader"] = lambda: next(loader)
    except RequestError as error:
        refusal = str(error)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 1):
        for name, work in contestants.items():
            milliseconds = ON_CPU.timed(work)
            if repeat:  # the first round warms up
                times[name].append(milliseconds)
    rows = [DrawRow(name, statistics.median(taken), spread(taken)) for name, taken in times.items()]
    return (
        rows
        if refusal is None
        else [*rows, DrawRow("torchmeta's BatchMetaDataLoader", None, None, refusal)]
    )


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _torchmeta_loader(images: Tensor, tasks: int, ways: int, shots: int, queries: int) -> Any:
    """A loader of torchmeta over these images, put together as its helpers do it."""
    torchmeta = apply()
    data, transforms = torchmeta.utils.data, torchmeta.transforms
    arrays = images.unflatten(0, (CLASSES, COUNT)).numpy()

    class OneClass(data.Dataset):  # type: ignore[misc, name-defined]
        def __len__(self) -> int:
            return COUNT

        def __getitem__(self, index: int) -> tuple[Tensor, Any]:
            return torch.from_numpy(arrays[self.index][index]).float().div_(
                255
            ), self.target_transform(self.index)

    class AllClasses(data.ClassDataset):  # type: ignore[misc, name-defined]
        num_classes = CLASSES

        def __getitem__(self, index: int) -> OneClass:
            return OneClass(index, target_transform=self.get_target_transform(index))

    combined = data.CombinationMetaDataset(
        AllClasses(meta_train=True), ways, target_transform=transforms.Categorical(ways)
    )
    split = transforms.ClassSplitter(
        combined, shuffle=True, num_train_per_class=shots, num_test_per_class=queries
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return data.BatchMetaDataLoader(split, batch_size=tasks, num_workers=0)
