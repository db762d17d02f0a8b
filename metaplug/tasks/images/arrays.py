"""Tasks from class images that are in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaplug.errors import RequestError
from metaplug.settings import validated
from metaplug.tasks.episodes import EpisodeOptions
from metaplug.tasks.images.class_images import ClassImages
from metaplug.tasks.sources import ImageSource

Arrays = Mapping[str, Tensor | NDArray[Any]]


@final
class ArrayTasks(ImageSource):
    """Tasks from class images that are in memory.

    Args:
        train, val, test: by class name, (n, channels, height, width); uint8 (255 is 1.0), or
            float32 in [0, 1]; not with channels last (see ClassImages). No name stands in two.
        ways, shots, queries, seed: as for ImageEpisodes.
        settings: fields of EpisodeOptions.

    Raises:
        RequestError: an array has another shape or dtype than the first, a setting is wrong, or as
            ImageSource raises.
    """

    Config = EpisodeOptions

    def __init__(
        self,
        *,
        train: Arrays,
        val: Arrays,
        test: Arrays,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        config = validated(EpisodeOptions, settings, "array tasks")
        given = {"train": train, "val": val, "test": test}
        splits = {split: _stacked(classes, split) for split, classes in given.items()}
        origin = "arrays given in Python"
        super().__init__(
            splits, config, origin=origin, ways=ways, shots=shots, queries=queries, seed=seed
        )


def _stacked(classes: Arrays, split: str) -> ClassImages:
    if not classes:
        raise RequestError(
            f"the {split} split has no class: give at least as many as the ways of a task"
        )
    arrays = {
        name: torch.as_tensor(np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x)
        for name, x in classes.items()
    }
    first_name, first = next(iter(arrays.items()))
    for name, array in arrays.items():
        if array.ndim != 4 or array.shape[1:] != first.shape[1:] or array.dtype != first.dtype:
            raise RequestError(
                f"the class '{name}' of the {split} split has {array.dtype} images of shape "
                f"{tuple(array.shape)}, the class '{first_name}' {first.dtype} images of "
                f"{tuple(first.shape)}: give every class (n, channels, height, width) of one size "
                "and dtype"
            )
    counts = tuple(len(array) for array in arrays.values())
    return ClassImages(tuple(arrays), torch.cat(list(arrays.values())), counts)
