"""The images of the classes of one split, in one tensor."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaplug.errors import RequestError
from metaplug.tasks.identities import digest


@dataclass(frozen=True)
class ClassImages:
    """The classes of one split, with all their images in one tensor.

    Attributes:
        names: the C classes, all different.
        images: (N, channels, height, width), class after class; uint8 (255 is 1.0), or float32 in
            [0, 1]. Channels last are refused where they are certain: the last axis is 1, 3 or 4,
            both before it are above 4, and the images are uint8 or these two are equal.
        counts: the number of images of each class, in the order of names; their sum is N.
        styles: (N,) int64, a group for each image (its face, its writer) that support and query
            should not share; or None.
        superclasses: the super-class of each class, in the order of names; or None.

    Raises:
        RequestError: the parts do not fit each other, or the images have another dtype or range, or
            their channels last.
    """

    names: tuple[str, ...]
    images: Tensor
    counts: tuple[int, ...]
    styles: NDArray[np.int64] | None = None
    superclasses: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if fault := self._fault():
            raise RequestError(f"class images: {fault}")

    def _fault(self) -> str | None:
        names, images, shape = self.names, self.images, tuple(self.images.shape)
        if len(shape) != 4 or len(names) != len(self.counts) or sum(self.counts) != shape[0]:
            return (
                f"{len(names)} names and {sum(self.counts)} images in {len(self.counts)} counts do "
                f"not fit images of shape {shape}: give one count a class and images "
                "(N, channels, height, width)"
            )
        if _channels_last(images):
            return (
                f"images of shape {shape[1:]} have their channels last: give (channels, height, "
                "width), as torch.as_tensor(images).permute(0, 3, 1, 2) has them"
            )
        if self.styles is not None and self.styles.shape != shape[:1]:
            return (
                f"styles of shape {self.styles.shape} for {shape[0]} images: give one style an "
                "image"
            )
        if self.superclasses is not None and len(self.superclasses) != len(names):
            return (
                f"{len(self.superclasses)} super-classes for {len(names)} classes: give one a class"
            )
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            return f"the class '{twice}' stands twice in one split: join its images or rename one"
        if images.dtype not in (torch.uint8, torch.float32):
            return (
                f"the dtype {images.dtype} is not known: give uint8 (0 to 255), or float32 (0 to 1)"
            )
        if images.is_floating_point() and bool(images.isnan().any()):
            return "float32 images hold NaN: clean them"
        if images.is_floating_point() and not bool(((images >= 0) & (images <= 1)).all()):
            return "float32 images go beyond 0 to 1: scale them, or give uint8 (0 to 255)"
        return None

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """The `digest` of each class's images, whatever their order; computed at the first use.

        Two classes have the same digest if and only if they have the same images, of one dtype.
        """
        images = (digest(image.tobytes()) for image in self.images.cpu().numpy())
        return tuple(digest(*sorted(islice(images, count))) for count in self.counts)

    def known_by(self, digests: Sequence[str]) -> Self:
        """These classes, with digests that were computed before and kept beside the images."""
        vars(self)["digests"] = tuple(digests)  # where a cached property keeps its value
        return self


def _channels_last(images: Tensor) -> bool:
    """Whether images are (N, height, width, channels), as CIFAR10.data and Pillow's arrays.

    Feature maps of a width of 1, 3 or 4, such as (N, 64, 8, 3) in float32, are none.
    """
    _, first, second, last = images.shape
    is_form = min(first, second) > 4 and last in (1, 3, 4)
    return is_form and (images.dtype == torch.uint8 or first == second)


def allocate(shape: tuple[int, ...], memory_mib: int) -> NDArray[np.uint8]:
    """An array for images: in memory, or beyond `memory_mib` in a file without a name.

    Raises:
        RequestError: the disk has no room for the file.
    """
    size = math.prod(shape)
    if size <= memory_mib * 2**20:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:
        try:
            # Without its blocks reserved, a full disk ends the process while copying (SIGBUS).
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            raise RequestError(
                f"{shape[0]} images need {size // 2**20} MiB, more than memory_mib = {memory_mib}, "
                f"and a file of that size in {tempfile.gettempdir()} cannot be had "
                f"({error.strerror}): lower 'size', or point TMPDIR to a larger disk"
            ) from None
        return np.memmap(file, np.uint8, "r+", shape=shape)
