"""The cost of drawing tasks: metaplug's episodes beside torchmeta's loader, on Omniglot's sizes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, count, repeat
from typing import Any

import torch
from torch import Tensor

from metaplug.bench.measuring import median_and_spread
from metaplug.bench.meters import ON_CPU
from metaplug.errors import RequestError
from metaplug.tasks import ClassImages, ImageEpisodes
from metaplug.tasks.torchmeta.compatibility import apply

CLASSES, COUNT, SIDE = 1600, 20, 28
"""Omniglot's: classes, images of each, pixels of a side."""

TORCHMETA = "torchmeta's BatchMetaDataLoader"


@dataclass(frozen=True)
class DrawRow:
    """One contestant: the milliseconds of a batch, median and half the distance of the quartiles,
    or why it cannot."""

    contestant: str
    milliseconds: float | None
    spread: float | None
    reason: str | None = None


def run(
    *, repeats: int, tasks: int = 32, ways: int = 5, shots: int = 1, queries: int = 15
) -> list[DrawRow]:
    """Draw batches of tasks, in turn, `repeats` times each, from the same images in memory.

    torchmeta gets its images as arrays of the right size, so no decoding or resizing counts.
    """
    generator = torch.Generator().manual_seed(0)
    size = (CLASSES * COUNT, 1, SIDE, SIDE)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    classes = ClassImages(tuple(map(str, range(CLASSES))), images, (COUNT,) * CLASSES)
    form: dict[str, Any] = {"ways": ways, "shots": shots, "queries": queries}
    episodes, iterations = ImageEpisodes(classes, split="train", seed=0, **form), count()
    contestants: dict[str, Callable[[], object]] = {
        "metaplug": lambda: episodes.batch(next(iterations), range(tasks))
    }
    missing = []
    try:
        batches = chain.from_iterable(
            repeat(_torchmeta_loader(images, tasks, ways, shots, queries))
        )
        contestants[TORCHMETA] = lambda: next(batches)
    except RequestError as error:
        missing = [DrawRow(TORCHMETA, None, None, str(error))]
    rounds = [[ON_CPU.timed(work) for work in contestants.values()] for _ in range(repeats + 1)]
    times = zip(*rounds[1:], strict=True)  # the first round warms up
    rows = zip(contestants, times, strict=True)
    return [DrawRow(name, *median_and_spread(taken)) for name, taken in rows] + missing


def _torchmeta_loader(images: Tensor, tasks: int, ways: int, shots: int, queries: int) -> Any:
    """Return a loader of torchmeta over these images, put together as its helpers do it."""
    torchmeta = apply()
    data, transforms = torchmeta.utils.data, torchmeta.transforms
    arrays = images.unflatten(0, (CLASSES, COUNT)).numpy()

    class OneClass(data.Dataset):  # type: ignore[misc, name-defined]
        def __len__(self) -> int:
            return COUNT

        def __getitem__(self, index: int) -> tuple[Tensor, Any]:
            image = torch.from_numpy(arrays[self.index][index]).float().div_(255)
            return image, self.target_transform(self.index)

    class AllClasses(data.ClassDataset):  # type: ignore[misc, name-defined]
        num_classes = CLASSES

        def __getitem__(self, index: int) -> OneClass:
            return OneClass(index, target_transform=self.get_target_transform(index))

    labels = transforms.Categorical(ways)
    combined = data.CombinationMetaDataset(
        AllClasses(meta_train=True), ways, target_transform=labels
    )
    split = transforms.ClassSplitter(
        combined, shuffle=True, num_train_per_class=shots, num_test_per_class=queries
    )
    with warnings.catch_warnings(action="ignore"):
        return data.BatchMetaDataLoader(split, batch_size=tasks, num_workers=0)
