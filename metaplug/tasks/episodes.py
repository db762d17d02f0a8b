"""Streams of tasks, and the few-shot episodes that are drawn from the examples of many classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Protocol, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from metaplug.contract.inputs import Inputs, device_of
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_sizes import IGNORED
from metaplug.errors import RequestError
from metaplug.tasks.choice_options import ChoiceOptions
from metaplug.tasks.choices import Choice, Chooser, Chosen, ClassTable
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


class EpisodeOptions(ChoiceOptions):
    """Options of drawing tasks from class images: the base of the Config of such sources."""

    rotate: bool = Field(
        False, description="Training: turn each class by a random multiple of 90 degrees."
    )
    flip: bool = Field(
        False, description="Training: mirror each class left to right, or not, at random."
    )
    shift: int = Field(
        0, ge=0, le=512, description="Training: move images by up to so many pixels; zeros come in."
    )
    memory_mib: int = Field(
        4096, ge=0, description="MiB of a split's images in memory; more are mapped from a file."
    )

    @property
    def augments(self) -> bool:
        """Whether images are changed by random numbers of their own."""
        return self.rotate or self.flip or self.shift > 0

    @property
    def of_evaluation(self) -> Self:
        """The part that holds for validation and test tasks."""
        change = {"rotate": False, "flip": False, "shift": 0}
        return super().of_evaluation.model_copy(update=change)


class Episodes(ABC):
    """N-way tasks over the examples of classes. A TaskStream; a final subclass gathers examples.

    Which classes and examples a task has says `Chooser`.

    Attributes:
        chooser: of the classes and examples of each task.
        split, seed: as the chooser has them.
        most_ways: the most ways that a task may have.
    """

    def __init__(self, chooser: Chooser) -> None:
        self.chooser = chooser
        self.split, self.seed, self.most_ways = chooser.split, chooser.seed, chooser.most_ways

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """The same tasks, gathered on `device`: the examples move there once, batches never."""

    @abstractmethod
    def _gather(self, choice: Choice) -> tuple[Inputs, Inputs]:
        """The inputs of support and query, (T, n, *input), 0 where there is only padding."""

    def batch(self, iteration: int, indices: Sequence[int] | range) -> TaskBatch:
        """The tasks `indices` of one iteration, class after class.

        Returns:
            Inputs (T, n, *input) and labels (T, n), int64. `sizes` where a task has fewer examples
            than another, or fewer ways than the model has outputs.
        """
        choice = self.chooser.choose(iteration, indices)
        support_x, query_x = self._gather(choice)
        device = device_of(support_x)
        support_y, query_y = (
            torch.from_numpy(part.labels).to(device) for part in (choice.support, choice.query)
        )
        return TaskBatch(support_x, support_y, query_x, query_y, sizes=choice.sizes)


class ImageEpisodes(Episodes):
    """N-way tasks over class images. A TaskStream.

    Args:
        classes: the classes to draw from.
        split: the name of the split, which is part of every task's seed.
        ways, shots, queries: as in EpisodeForm.
        seed: any integer.
        options: super-classes, augmentations and bounds of sizes; all of them are applied here,
            whatever the split.
        outputs: of the model, at least the most ways; None: the most ways.

    Raises:
        RequestError: a size is out of bounds, images that are not square are to be rotated, or as
            Chooser raises.
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
        outputs: int | None = None,
    ) -> None:
        self.options = options or EpisodeOptions()
        height, width = classes.images.shape[2:]
        if self.options.rotate and height != width:
            raise RequestError(
                f"rotate turns images by multiples of 90 degrees, but they have {width} x {height} "
                "pixels: make them square, or leave rotate out"
            )
        self.classes = classes
        chooser = Chooser(
            ClassTable(
                classes.names, classes.counts, "images", classes.styles, classes.superclasses
            ),
            split=split,
            form={"ways": ways, "shots": shots, "queries": queries},
            seed=seed,
            options=self.options,
            outputs=outputs,
            augments=self.options.augments,
        )
        super().__init__(chooser)

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

    def _gather(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """Images (T, n, channels, height, width), float32 in [0, 1]."""
        support, query = (
            self._augmented(self._images(part), part, choice)
            for part in (choice.support, choice.query)
        )
        return support, query

    def _images(self, part: Chosen) -> Tensor:
        images, places = self.classes.images, part.places
        found = images.index_select(0, torch.from_numpy(places.reshape(-1)).to(images.device))
        if images.dtype == torch.uint8:
            # Half the time of found / 255, which converts number by number.
            found = found.float().div_(255)
        found = found.reshape(*places.shape, *images.shape[1:])
        padding = part.labels == IGNORED
        if padding.any():
            mask = torch.from_numpy(padding).to(images.device)[..., None, None, None]
            found = found.masked_fill_(mask, 0)
        return found

    def _augmented(self, images: Tensor, part: Chosen, choice: Choice) -> Tensor:
        """The images with the options' augmentations, which leave zeros as they are."""
        options = self.options
        if choice.words is None:
            return images
        by_class, by_cell = choice.words
        if options.rotate or options.flip:
            ways = np.maximum(part.labels, 0)[..., None]
            drawn = np.take_along_axis((by_class % np.uint64(4)).astype(np.int64), ways, axis=1)
            turns, mirrors = torch.from_numpy(drawn).to(images.device).unbind(-1)
        if options.rotate:
            images = rotated(images[:, :, None], turns).squeeze(2)
        if options.flip:
            images = mirrored(images[:, :, None], mirrors % 2 == 1).squeeze(2)
        if options.shift:
            words = np.take_along_axis(by_cell, part.cells[..., None], axis=1)
            steps = (words % np.uint64(2 * options.shift + 1)).astype(np.int64) - options.shift
            images = shifted(images, torch.from_numpy(steps).to(images.device))
        return images
