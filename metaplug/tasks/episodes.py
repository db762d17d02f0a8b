"""Streams of tasks, and the few-shot episodes that are drawn from the images of many classes."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
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
from metaplug.tasks.identities import digest


class EpisodeOptions(Settings):
    """How tasks are drawn from class images: the base of the Config of every source of images."""

    within: bool = Field(
        False,
        description="Whether the classes of a task come from one super-class, such as an alphabet or a script.",
    )
    rotate: bool = Field(
        False,
        description="Training: turn every class of a task by a random multiple of 90 degrees.",
    )
    flip: bool = Field(
        False,
        description="Training: mirror every class of a task left to right, or not, at random.",
    )
    shift: int = Field(
        0,
        ge=0,
        le=512,
        description="Training: move every image by up to so many pixels, at random; zeros come in.",
    )
    train_ways: tuple[int, int] | None = Field(
        None,
        description="Fewest and most classes of a training task, drawn for each meta-batch; null: the ways of all tasks.",
    )
    train_shots: tuple[int, int] | None = Field(
        None,
        description="Fewest and most shots of a training task, drawn for each meta-batch; null: the shots of all tasks.",
    )

    memory_mib: int = Field(
        4096,
        ge=0,
        description="A split's images are kept in memory up to so many MiB; more of them in a file that is mapped into it.",
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
        """What of it holds for validation and test tasks."""
        return EpisodeOptions(within=self.within, memory_mib=self.memory_mib)


class TaskStream(Protocol):
    """The tasks of one split. Task (iteration, index) depends on the seed, the split, the iteration and the index, and on nothing else."""

    split: str

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The tasks `indices` of one meta-iteration, stacked in that order."""
        ...


class ExampleCounts(Settings):
    """The sizes of a task."""

    shots: int = Field(
        1,
        ge=1,
        le=1000,
        description="Support examples of each class (classification) or of the task (regression).",
    )
    queries: int = Field(
        15,
        ge=1,
        le=1000,
        description="Query examples of each class (classification) or of the task (regression).",
    )


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
        superclasses: the super-class of each class, in the order of names; None where there is none.

    Raises:
        RequestError: the parts do not fit each other, or the images have another dtype or range.
    """

    names: tuple[str, ...]
    images: Tensor
    counts: tuple[int, ...]
    styles: NDArray[np.int64] | None = None
    superclasses: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if len(shape) != 4 or len(self.names) != len(self.counts) or sum(self.counts) != shape[0]:
            raise RequestError(
                f"class images: {len(self.names)} names and {sum(self.counts)} images in {len(self.counts)} counts do not fit "
                f"images of shape {shape}: give one count a class and images (N, channels, height, width)"
            )
        if self.styles is not None and self.styles.shape != shape[:1]:
            raise RequestError(
                f"class images: styles of shape {self.styles.shape} for {shape[0]} images: give one style an image"
            )
        if self.superclasses is not None and len(self.superclasses) != len(self.names):
            raise RequestError(
                f"class images: {len(self.superclasses)} super-classes for {len(self.names)} classes: give one a class"
            )
        if len(set(self.names)) != len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise RequestError(
                f"class images: the class '{twice}' stands twice in one split: join its images or rename one"
            )
        if self.images.dtype not in (torch.uint8, torch.float32):
            raise RequestError(
                f"class images: the dtype {self.images.dtype} is not known: give uint8 (0 to 255), or float32 (0 to 1)"
            )
        if self.images.dtype == torch.float32 and not bool(
            ((self.images >= 0) & (self.images <= 1)).all()
        ):
            fault = (
                "hold NaN: clean them"
                if bool(self.images.isnan().any())
                else "go beyond 0 to 1: scale them, or give uint8 (0 to 255)"
            )
            raise RequestError(f"class images: float32 images {fault}")

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """Of each class, in the order of names, the `digest` of its images' bytes, whatever their order.

        Two classes have the same images, of one dtype, if and only if they have the same digest; computed at the first use.
        """
        images = (digest(image.tobytes()) for image in self.images.cpu().numpy())
        return tuple(digest(*sorted(islice(images, count))) for count in self.counts)


class ImageEpisodes:
    """N-way tasks over class images. A TaskStream.

    Every task has `ways` distinct classes in random order (the labels 0 ... ways - 1), and of each `shots` support and `queries` query
    images, all distinct. Where images have a style, queries come from other styles than the support images' as far as there are enough.
    The tasks of one batch are of one size, as they are stacked: sizes within bounds are drawn once for each iteration.

    Args:
        classes: the classes to draw from.
        split: the name of the split, which is part of every task's seed.
        ways, shots, queries: as in EpisodeForm.
        seed: any integer.
        options: super-classes, augmentations and bounds of sizes; all of them are applied here, whatever the split.

    Raises:
        RequestError: a size is out of bounds, there are fewer classes (of one super-class) than ways, a class has fewer than
            shots + queries images, or images that are not square are to be rotated.
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
        self.form = validated(
            EpisodeForm, {"ways": ways, "shots": shots, "queries": queries}, "tasks"
        )
        self.options = options or EpisodeOptions()
        self.split = split
        self.seed = seed
        self.classes = classes
        self._ways, self._shots = (
            self.options.train_ways or (ways, ways),
            self.options.train_shots or (shots, shots),
        )
        self.most_ways = ways = self._ways[1]
        shots = self._shots[1]
        counts = classes.counts
        if self.options.rotate and classes.images.shape[2] != classes.images.shape[3]:
            raise RequestError(
                f"rotate turns images by multiples of 90 degrees, but they have {classes.images.shape[3]} x {classes.images.shape[2]} "
                "pixels: make them square, or leave rotate out"
            )
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
        self._groups = self._super_classes(ways) if self.options.within else None

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The tasks `indices` of one iteration, on the images' device.

        Returns:
            Inputs (T, ways * examples, channels, height, width), float32 in [0, 1]; labels (T, ways * examples), int64; class after class.
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
        """By name of a class, the digest of its images, whichever split, size of task or augmentation."""
        return dict(zip(self.classes.names, self.classes.digests, strict=True))

    def to(self, device: torch.device | str) -> ImageEpisodes:
        """The same tasks, gathered on `device`: the images are moved there once, and no batch is copied over afterwards.

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

    def _super_classes(self, ways: int) -> list[NDArray[np.int64]]:
        """The classes of every super-class that has enough of them."""
        if self.classes.superclasses is None:
            raise RequestError(
                f"within draws tasks from one super-class, but the classes of the {self.split} split have none: leave it out, "
                "or give classes that stand in folders of their super-class"
            )
        names = np.array(self.classes.superclasses)
        groups = {
            name: np.flatnonzero(names == name) for name in sorted(set(self.classes.superclasses))
        }
        large = [group for group in groups.values() if len(group) >= ways]
        if not large:
            largest = max(groups, key=lambda name: len(groups[name]))
            raise RequestError(
                f"{ways}-way tasks within one super-class need {ways} classes of one, but the largest of the {self.split} split, "
                f"'{largest}', has {len(groups[largest])}: lower ways, or leave within out"
            )
        return large

    def _choose(
        self, iteration: int, indices: Sequence[int] | range, ways: int, shots: int
    ) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """The places of the images in the one tensor, (T, ways, shots + queries); and words for augmentations, (T, ...)."""
        styles = self.classes.styles
        examples = shots + self.form.queries
        # A choice by style looks at every image of a class.
        drawn = examples if styles is None else int(self._counts.max())
        used = ways * (1 + drawn)
        more = (
            1 + 2 * ways + 2 * ways * examples
        )  # what an augmentation draws, it draws behind: a task without has the same images
        words = draw(
            self.seed,
            self.split,
            iteration,
            indices,
            used + (more if self.options.draws_more else 0),
        )
        classes = self._choose_classes(words[:, :ways], words[:, used : used + 1])
        counts, offsets = self._counts[classes][..., None], self._offsets[classes][..., None]
        chosen = distinct(words[:, ways:used].reshape(len(indices), ways, drawn), counts[..., 0])
        if styles is not None:
            support, rest = np.split(chosen, [shots], axis=-1)
            style_of_rest = styles[offsets + np.minimum(rest, counts - 1)]
            seen = (style_of_rest[..., None] == styles[offsets + support][..., None, :]).any(-1)
            order = np.argsort(seen + 2 * (rest >= counts), axis=-1, kind="stable")[
                ..., : self.form.queries
            ]
            chosen = np.concatenate([support, np.take_along_axis(rest, order, axis=-1)], axis=-1)
        return offsets + chosen, words[:, used + 1 :]

    def _choose_classes(
        self, words: NDArray[np.uint64], word_of_group: NDArray[np.uint64]
    ) -> NDArray[np.int64]:
        """(T, ways) distinct classes: of all, or of one super-class for each task."""
        if self._groups is None:
            return distinct(words, np.full(len(words), len(self._counts)))
        chosen = (word_of_group[:, 0] % np.uint64(len(self._groups))).astype(np.int64)
        places = distinct(words, np.array([len(self._groups[group]) for group in chosen]))
        return np.stack(
            [self._groups[group][row] for group, row in zip(chosen, places, strict=True)]
        )

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
        """The images with the augmentations of the options: classes (T, 2 ways words) as a whole, shifts (..., 2 words) image by image."""
        options, ways = self.options, images.shape[1]
        if options.rotate or options.flip:
            quarters = torch.from_numpy((by_class % np.uint64(4)).astype(np.int64)).to(
                images.device
            )
        if options.rotate:
            images = rotated(images, quarters[:, :ways])
        if options.flip:
            images = torch.where(
                quarters[:, ways:, None, None, None, None] % 2 == 1, images.flip(-1), images
            )
        if options.shift:
            steps = (by_image % np.uint64(2 * options.shift + 1)).astype(np.int64) - options.shift
            images = shifted(images, torch.from_numpy(steps).to(images.device))
        return images

    def _labels(self, places: NDArray[np.int64]) -> Tensor:
        tasks, ways, examples = places.shape
        return (
            torch.arange(ways, device=self.classes.images.device)
            .repeat_interleave(examples)
            .repeat(tasks, 1)
        )


def allocate(shape: tuple[int, ...], memory_mib: int) -> NDArray[np.uint8]:
    """An array for images: in memory, or beyond `memory_mib` in a temporary file without a name, which goes when the array goes.

    Raises:
        RequestError: the disk has no room for the file.
    """
    size = math.prod(shape)
    if size <= memory_mib * 2**20:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:
        try:
            # Without its blocks reserved, a full disk would end the process in the middle of a copy (SIGBUS).
            os.posix_fallocate(file.fileno(), 0, size) if hasattr(
                os, "posix_fallocate"
            ) else file.truncate(size)
        except OSError as error:
            raise RequestError(
                f"{shape[0]} images need {size // 2**20} MiB, more than memory_mib = {memory_mib}, and a file of that size in "
                f"{tempfile.gettempdir()} cannot be had ({error.strerror}): lower 'size', or point TMPDIR to a larger disk"
            ) from None
        return np.memmap(file, np.uint8, "r+", shape=shape)


def rotated(images: Tensor, quarters: Tensor) -> Tensor:
    """Every class turned as a whole: images (T, ways, examples, channels, side, side) by quarters (T, ways) times 90 degrees."""
    turned, chosen = images, quarters[..., None, None, None, None]
    for quarter in (
        1,
        2,
        3,
    ):  # all of them everywhere: choosing by a mask would wait for the device
        turned = torch.where(chosen == quarter, torch.rot90(images, quarter, (-2, -1)), turned)
    return turned


def shifted(images: Tensor, steps: Tensor) -> Tensor:
    """Every image (..., channels, height, width) moved by its own steps (..., 2), down and to the right; zeros come in."""
    flat, moves = images.flatten(0, -4), steps.flatten(0, -2)
    rows, columns = (
        torch.arange(size, device=images.device) - moves[:, axis, None]
        for axis, size in enumerate(images.shape[-2:])
    )
    inside = ((rows >= 0) & (rows < images.shape[-2]))[:, :, None] & (
        (columns >= 0) & (columns < images.shape[-1])
    )[:, None, :]
    which = torch.arange(len(flat), device=images.device)[:, None, None]
    taken = flat[
        which,
        :,
        rows.clamp(0, images.shape[-2] - 1)[:, :, None],
        columns.clamp(0, images.shape[-1] - 1)[:, None, :],
    ]
    return (taken.movedim(-1, 1) * inside[:, None]).reshape(images.shape)
