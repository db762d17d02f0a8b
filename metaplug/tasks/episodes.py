"""Streams of tasks, and the few-shot episodes that are drawn from the images of many classes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from metaplug.errors import RequestError
from metaplug.settings import Settings, validated
from metaplug.tasks.batch import TaskBatch
from metaplug.tasks.draws import distinct, draw


class TaskStream(Protocol):
    """The tasks of one split. Task (iteration, index) depends on the seed, the split, the iteration and the index, and on nothing else."""

    split: str

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The tasks `indices` of one meta-iteration, stacked in that order."""
        ...


class ExampleCounts(Settings):
    """The sizes of a task."""

    shots: int = Field(1, ge=1, le=1000, description="Support examples of each class (classification) or of the task (regression).")
    queries: int = Field(15, ge=1, le=1000, description="Query examples of each class (classification) or of the task (regression).")


class EpisodeForm(ExampleCounts):
    """The sizes of a classification task."""

    ways: int = Field(5, ge=2, le=1000, description="Classes in a task.")


@dataclass(frozen=True)
class ClassImages:
    """The classes of one split, with all their images in one tensor.

    Attributes:
        names: the C classes, all different.
        images: (N, channels, height, width), class after class; uint8 (255 is 1.0), or float32 in [0, 1].
        counts: how many of the images each class has, in the order of names; their sum is N.
        styles: (N,) int64, a group for each image (its face, its writer) that support and query should not share; None where there is none.

    Raises:
        RequestError: the parts do not fit each other, or the images have another dtype or range.
    """

    names: tuple[str, ...]
    images: Tensor
    counts: tuple[int, ...]
    styles: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if len(shape) != 4 or len(self.names) != len(self.counts) or sum(self.counts) != shape[0]:
            raise RequestError(
                f"class images: {len(self.names)} names and {sum(self.counts)} images in {len(self.counts)} counts do not fit "
                f"images of shape {shape}: give one count a class and images (N, channels, height, width)"
            )
        if self.styles is not None and self.styles.shape != shape[:1]:
            raise RequestError(f"class images: styles of shape {self.styles.shape} for {shape[0]} images: give one style an image")
        if len(set(self.names)) != len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise RequestError(f"class images: the class '{twice}' stands twice in one split: join its images or rename one")
        if self.images.dtype not in (torch.uint8, torch.float32):
            raise RequestError(f"class images: the dtype {self.images.dtype} is not known: give uint8 (0 to 255), or float32 (0 to 1)")
        if self.images.dtype == torch.float32 and not bool(((self.images >= 0) & (self.images <= 1)).all()):
            raise RequestError("class images: float32 images go beyond 0 to 1: scale them, or give uint8 (0 to 255)")


class ImageEpisodes:
    """N-way tasks over class images. A TaskStream.

    Every task has `ways` distinct classes in random order (the labels 0 ... ways - 1), and of each `shots` support and `queries` query
    images, all distinct. Where images have a style, queries come from other styles than the support images' as far as there are enough.

    Args:
        classes: the classes to draw from.
        split: the name of the split, which is part of every task's seed.
        ways, shots, queries: as in EpisodeForm.
        seed: any integer.

    Raises:
        RequestError: a size is out of bounds, there are fewer classes than ways, or a class has fewer than shots + queries images.
    """

    def __init__(self, classes: ClassImages, *, split: str, ways: int, shots: int, queries: int, seed: int) -> None:
        self.form = validated(EpisodeForm, {"ways": ways, "shots": shots, "queries": queries}, "tasks")
        self.split = split
        self.seed = seed
        self.classes = classes
        counts = classes.counts
        if len(counts) < ways:
            raise RequestError(
                f"{ways}-way tasks need {ways} classes, but the {split} split has {len(counts)}: "
                f"lower ways, or give that split more classes"
            )
        fewest = min(range(len(counts)), key=lambda index: counts[index])
        if counts[fewest] < shots + queries:
            raise RequestError(
                f"{shots} shots and {queries} queries need {shots + queries} images of every class, but the class "
                f"'{classes.names[fewest]}' of the {split} split has {counts[fewest]}: lower shots or queries, or leave that class out"
            )
        self._counts = np.array(counts, np.int64)
        self._offsets = np.cumsum(self._counts) - self._counts

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The tasks `indices` of one iteration, on the images' device.

        Returns:
            Inputs (T, ways * examples, channels, height, width), float32 in [0, 1]; labels (T, ways * examples), int64; class after class.
        """
        images = self._choose(iteration, indices)
        support, query = np.split(images, [self.form.shots], axis=-1)
        return TaskBatch(self._gather(support), self._labels(support), self._gather(query), self._labels(query))

    def to(self, device: torch.device | str) -> ImageEpisodes:
        """The same tasks, gathered on `device`: the images are moved there once, and no batch is copied over afterwards."""
        moved = copy(self)
        moved.classes = replace(self.classes, images=self.classes.images.to(device))
        return moved

    def _choose(self, iteration: int, indices: Sequence[int] | range) -> NDArray[np.int64]:
        """The places of the images in the one tensor, (T, ways, shots + queries)."""
        ways, styles = self.form.ways, self.classes.styles
        examples = self.form.shots + self.form.queries
        # A choice by style looks at every image of a class.
        drawn = examples if styles is None else int(self._counts.max())
        words = draw(self.seed, self.split, iteration, indices, ways * (1 + drawn))
        classes = distinct(words[:, :ways], np.full(len(indices), len(self._counts)))
        counts, offsets = self._counts[classes][..., None], self._offsets[classes][..., None]
        chosen = distinct(words[:, ways:].reshape(len(indices), ways, drawn), counts[..., 0])
        if styles is not None:
            support, rest = np.split(chosen, [self.form.shots], axis=-1)
            style_of_rest = styles[offsets + np.minimum(rest, counts - 1)]
            seen = (style_of_rest[..., None] == styles[offsets + support][..., None, :]).any(-1)
            order = np.argsort(seen + 2 * (rest >= counts), axis=-1, kind="stable")[..., : self.form.queries]
            chosen = np.concatenate([support, np.take_along_axis(rest, order, axis=-1)], axis=-1)
        return offsets + chosen

    def _gather(self, places: NDArray[np.int64]) -> Tensor:
        images = self.classes.images
        found = images.index_select(0, torch.from_numpy(places.reshape(-1)).to(images.device))
        if images.dtype == torch.uint8:
            # Half the time of found / 255, which converts number by number.
            found = found.float().div_(255)
        return found.reshape(len(places), -1, *images.shape[1:])

    def _labels(self, places: NDArray[np.int64]) -> Tensor:
        tasks, ways, examples = places.shape
        return torch.arange(ways, device=self.classes.images.device).repeat_interleave(examples).repeat(tasks, 1)
