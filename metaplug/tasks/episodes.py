"""Streams of tasks, and the few-shot episodes that are drawn from the images of many classes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import RequestError
from metaplug.settings import Settings, validated
from metaplug.tasks.draws import distinct, draw
from metaplug.tasks.images.augmentations import mirrored, rotated, shifted
from metaplug.tasks.images.class_images import ClassImages


class TaskStream(Protocol):
    """The tasks of one split.

    Task (iteration, index) depends on the seed, the split, the iteration and the index alone.
    """

    split: str

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The tasks `indices` of one meta-iteration, stacked in that order."""
        ...


class ExampleCounts(Settings):
    """The sizes of a task."""

    shots: int = Field(
        1, ge=1, le=1000, description="Support examples of each class, or of a regression task."
    )
    queries: int = Field(
        15, ge=1, le=1000, description="Query examples of each class, or of a regression task."
    )


class EpisodeForm(ExampleCounts):
    """The sizes of a classification task."""

    ways: int = Field(5, ge=2, le=1000, description="Classes in a task.")


class EpisodeOptions(Settings):
    """Options of drawing tasks from class images: the base of the Config of such sources."""

    within: bool = Field(
        False,
        description="Whether a task's classes come from one super-class, such as an alphabet.",
    )
    rotate: bool = Field(
        False, description="Training: turn each class by a random multiple of 90 degrees."
    )
    flip: bool = Field(
        False, description="Training: mirror each class left to right, or not, at random."
    )
    shift: int = Field(
        0, ge=0, le=512, description="Training: move images by up to so many pixels; zeros come in."
    )
    train_ways: tuple[int, int] | None = Field(
        None,
        description="Training: fewest and most ways, drawn for each meta-batch; null: as given.",
    )
    train_shots: tuple[int, int] | None = Field(
        None,
        description="Training: fewest and most shots, drawn for each meta-batch; null: as given.",
    )
    memory_mib: int = Field(
        4096, ge=0, description="MiB of a split's images in memory; more are mapped from a file."
    )

    @model_validator(mode="after")
    def _ranges_in_order(self) -> Self:
        for name, least in (("train_ways", 2), ("train_shots", 1)):
            low, high = getattr(self, name) or (least, least)
            if not least <= low <= high:
                raise ValueError(
                    f"{name} = [{low}, {high}]: give the fewest first, at least {least}"
                )
        return self

    @property
    def draws_more(self) -> bool:
        """Whether tasks need more random numbers than the choice of their images does."""
        return self.within or self.rotate or self.flip or self.shift > 0

    @property
    def of_evaluation(self) -> EpisodeOptions:
        """The part that holds for validation and test tasks."""
        return EpisodeOptions(within=self.within, memory_mib=self.memory_mib)


class ImageEpisodes:
    """N-way tasks over class images. A TaskStream.

    Every task has `ways` distinct classes in random order (the labels 0 ... ways - 1), and of each
    `shots` support and `queries` query images, all distinct. Where images have a style, queries
    come from other styles than the support images' as far as there are enough. The tasks of one
    batch are stacked and so of one size: sizes within bounds are drawn once for each iteration.

    Args:
        classes: the classes to draw from.
        split: the name of the split, which is part of every task's seed.
        ways, shots, queries: as in EpisodeForm.
        seed: any integer.
        options: super-classes, augmentations and bounds of sizes; all of them are applied here,
            whatever the split.

    Raises:
        RequestError: a size is out of bounds, there are fewer classes (of one super-class) than
            ways, a class has fewer than shots + queries images, or images that are not square are
            to be rotated.
    """

    def __init__(
        self,
        classes: ClassImages,
        *,
        split: str,
        ways: int,
        shots: int,
        queries: int,
        seed: int,
        options: EpisodeOptions | None = None,
    ) -> None:
        sizes = {"ways": ways, "shots": shots, "queries": queries}
        self.form = validated(EpisodeForm, sizes, "tasks")
        self.options = options or EpisodeOptions()
        self.classes, self.split, self.seed = classes, split, seed
        self._ways = self.options.train_ways or (ways, ways)
        self._shots = self.options.train_shots or (shots, shots)
        self.most_ways = self._ways[1]
        self._counts = np.array(classes.counts, np.int64)
        self._offsets = np.cumsum(self._counts) - self._counts
        self._check()
        self._groups = self._super_classes() if self.options.within else None

    def _check(self) -> None:
        ways, shots, queries = self.most_ways, self._shots[1], self.form.queries
        height, width = self.classes.images.shape[2:]
        if self.options.rotate and height != width:
            raise RequestError(
                f"rotate turns images by multiples of 90 degrees, but they have {width} x {height} "
                "pixels: make them square, or leave rotate out"
            )
        if len(self._counts) < ways:
            raise RequestError(
                f"{ways}-way tasks need {ways} classes, but the {self.split} split has "
                f"{len(self._counts)}: lower ways, or give that split more classes"
            )
        fewest = int(self._counts.argmin())
        if self._counts[fewest] < shots + queries:
            raise RequestError(
                f"{shots} shots and {queries} queries need {shots + queries} images of every "
                f"class, but the class '{self.classes.names[fewest]}' of the {self.split} split "
                f"has {self._counts[fewest]}: lower shots or queries, or leave that class out"
            )

    def _super_classes(self) -> list[NDArray[np.int64]]:
        """The classes of every super-class that has enough of them."""
        if self.classes.superclasses is None:
            raise RequestError(
                "within draws tasks from one super-class, but the classes of the "
                f"{self.split} split have none: leave it out, or give classes that stand in "
                "folders of their super-class"
            )
        names, ways = np.array(self.classes.superclasses), self.most_ways
        groups = {name: np.flatnonzero(names == name) for name in np.unique(names)}
        large = [group for group in groups.values() if len(group) >= ways]
        if not large:
            largest = max(groups, key=lambda name: len(groups[name]))
            raise RequestError(
                f"{ways}-way tasks within one super-class need {ways} classes of one, but the "
                f"largest of the {self.split} split, '{largest}', has {len(groups[largest])}: "
                "lower ways, or leave within out"
            )
        return large

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The tasks `indices` of one iteration, on the images' device, class after class.

        Returns:
            Inputs (T, ways * examples, channels, height, width), float32 in [0, 1]; labels
            (T, ways * examples), int64.
        """
        ways, shots = self._sizes(iteration)
        places, words = self._choose(iteration, indices, ways, shots)
        by_class, by_image = np.split(words, [2 * ways], axis=-1)
        parts = np.split(places, [shots], axis=-1)
        moves = np.split(by_image.reshape(*places.shape, -1), [shots], axis=-2)
        inputs = [
            self._augmented(self._gather(part), by_class, own).flatten(1, 2)
            for part, own in zip(parts, moves, strict=True)
        ]
        return TaskBatch(inputs[0], self._labels(parts[0]), inputs[1], self._labels(parts[1]))

    @cached_property
    def identities(self) -> dict[str, str]:
        """By name of a class, the digest of its images, whatever the split or augmentation."""
        return dict(zip(self.classes.names, self.classes.digests, strict=True))

    def to(self, device: torch.device | str) -> ImageEpisodes:
        """The same tasks, gathered on `device`: the images move there once, batches never.

        Images beyond the budget of `memory_mib` stay where they are.
        """
        images = self.classes.images
        if images.numel() * images.element_size() > self.options.memory_mib * 2**20:
            return self
        _ = self.identities  # while the images are here
        moved = copy(self)
        moved.classes = replace(self.classes, images=images.to(device))
        return moved

    def _sizes(self, iteration: int) -> tuple[int, int]:
        """The ways and shots of one iteration's tasks."""
        words = draw(self.seed, f"{self.split} sizes", iteration, [0], 2)[0].tolist()
        ways, shots = (
            low + word % (high - low + 1)
            for word, (low, high) in zip(words, (self._ways, self._shots), strict=True)
        )
        return ways, shots

    def _choose(
        self, iteration: int, indices: Sequence[int] | range, ways: int, shots: int
    ) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """The images of every task, and random words for its augmentations.

        Returns:
            Places in the one tensor, (T, ways, shots + queries); words (T, ...).
        """
        styles, queries = self.classes.styles, self.form.queries
        examples = shots + queries
        # A choice by style looks at every image of a class.
        drawn = examples if styles is None else int(self._counts.max())
        used = ways * (1 + drawn)
        # Augmentations draw after the choice of images, so a task without has the same images.
        more = 1 + 2 * ways + 2 * ways * examples if self.options.draws_more else 0
        words = draw(self.seed, self.split, iteration, indices, used + more)
        classes = self._choose_classes(words[:, :ways], words[:, used : used + 1])
        counts, offsets = self._counts[classes][..., None], self._offsets[classes][..., None]
        chosen = distinct(words[:, ways:used].reshape(len(indices), ways, drawn), counts[..., 0])
        if styles is not None:
            support, rest = np.split(chosen, [shots], axis=-1)
            style_of_rest = styles[offsets + np.minimum(rest, counts - 1)]
            seen = (style_of_rest[..., None] == styles[offsets + support][..., None, :]).any(-1)
            # Unseen styles first, then seen ones; places beyond the class's count never.
            order = np.argsort(seen + 2 * (rest >= counts), axis=-1, kind="stable")
            query = np.take_along_axis(rest, order[..., :queries], axis=-1)
            chosen = np.concatenate([support, query], axis=-1)
        return offsets + chosen, words[:, used + 1 :]

    def _choose_classes(
        self, words: NDArray[np.uint64], word_of_group: NDArray[np.uint64]
    ) -> NDArray[np.int64]:
        """(T, ways) distinct classes: of all, or of one super-class for each task."""
        if self._groups is None:
            return distinct(words, np.full(len(words), len(self._counts)))
        chosen = (word_of_group[:, 0] % np.uint64(len(self._groups))).astype(np.int64)
        groups = [self._groups[group] for group in chosen]
        places = distinct(words, np.array([len(group) for group in groups]))
        return np.stack([group[row] for group, row in zip(groups, places, strict=True)])

    def _gather(self, places: NDArray[np.int64]) -> Tensor:
        """(T, ways, examples, channels, height, width), float32 in [0, 1]."""
        images = self.classes.images
        found = images.index_select(0, torch.from_numpy(places.reshape(-1)).to(images.device))
        if images.dtype == torch.uint8:
            # Half the time of found / 255, which converts number by number.
            found = found.float().div_(255)
        return found.reshape(*places.shape, *images.shape[1:])

    def _augmented(
        self, images: Tensor, by_class: NDArray[np.uint64], by_image: NDArray[np.uint64]
    ) -> Tensor:
        """The images with the options' augmentations.

        Args:
            images: as from `_gather`.
            by_class: words (T, 2 ways), for turning and mirroring classes as a whole.
            by_image: words (..., 2), for shifting images one by one.
        """
        options, ways = self.options, images.shape[1]
        if options.rotate or options.flip:
            drawn = (by_class % np.uint64(4)).astype(np.int64)
            quarters = torch.from_numpy(drawn).to(images.device)
        if options.rotate:
            images = rotated(images, quarters[:, :ways])
        if options.flip:
            images = mirrored(images, quarters[:, ways:] % 2 == 1)
        if options.shift:
            steps = (by_image % np.uint64(2 * options.shift + 1)).astype(np.int64) - options.shift
            images = shifted(images, torch.from_numpy(steps).to(images.device))
        return images

    def _labels(self, places: NDArray[np.int64]) -> Tensor:
        tasks, ways, examples = places.shape
        labels = torch.arange(ways, device=self.classes.images.device)
        return labels.repeat_interleave(examples).repeat(tasks, 1)
