"""Task sources: what gives the training, validation and test tasks of a run, and the one for arrays made in Python."""

from __future__ import annotations

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from metaplug.errors import RequestError, one_line, reason, unknown
from metaplug.settings import Settings, validated
from metaplug.tasks.episodes import ClassImages, EpisodeOptions, ImageEpisodes, TaskStream
from metaplug.tasks.reading import no_number, read_regular

SPLITS = ("train", "val", "test")
_MOST_BYTES_OF_SPLITS = 64 * 2**20
SPLITS_FORM = '{"train": [names], "val": [names], "test": [names]}'


class SplitFractions(Settings):
    """How classes, or tasks, are split where nothing else says so."""

    fractions: tuple[float, float, float] = Field(
        (0.64, 0.16, 0.20),
        description="Shares for train, val and test, where neither a file nor names split them.",
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions = {self.fractions}: they must be at least 0 and sum to 1")
        return self


def by_fractions(
    names: Sequence[str], fractions: tuple[float, float, float]
) -> dict[str, list[str]]:
    """Names divided into train, val and test by shares, in the order of a hash of each: no seed and no other name changes a name's rank."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    first, second = (
        round(fractions[0] * len(ranked)),
        round((fractions[0] + fractions[1]) * len(ranked)),
    )
    return {
        "train": sorted(ranked[:first]),
        "val": sorted(ranked[first:second]),
        "test": sorted(ranked[second:]),
    }


def read_splits(path: Path, of: str) -> dict[str, list[Any]]:
    """The lists of a file {"train": [names], "val": [names], "test": [names]}, some of which may be missing.

    Args:
        of: what is split, such as "class", for the errors.

    Raises:
        RequestError: the file cannot be read, is not JSON, or has not that form; it is named.
    """
    try:
        given = json.loads(
            read_regular(path, _MOST_BYTES_OF_SPLITS),
            object_pairs_hook=_once,
            parse_constant=no_number,
        )
    except OSError as error:
        raise RequestError(
            f"cannot read the splits {path}: {reason(error)}; give a JSON file {SPLITS_FORM}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"the splits {path} are not JSON ({reason(error)}): write {SPLITS_FORM}"
        ) from None
    lists = list(given.values()) if isinstance(given, dict) else [None]
    if not all(
        isinstance(names, list) and all(isinstance(name, str | int | float) for name in names)
        for names in lists
    ):
        raise RequestError(
            f"the splits {path} are not lists of {of} names by split: write {SPLITS_FORM}"
        )
    for split in given:
        if split not in SPLITS:
            raise RequestError(
                f"the splits {path}: {unknown('split', one_line(split, 80), SPLITS)}"
            )
    return dict(given)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that stands twice, JSON takes the last in silence."""
    given = dict(pairs)
    if len(given) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"the key '{one_line(next(key for key in keys if keys.count(key) > 1), 80)}' stands twice"
        )
    return given


class TaskSource(ABC):
    """Training, validation and test tasks of one kind and form.

    A final subclass takes keyword arguments only: the sizes of a task, `seed`, and the fields of its Config. A source that needs one
    argument more (`folder:PATH`) takes it as its first positional parameter, and names it in `argument`.

    Attributes:
        Config: the fields of this source alone.
        argument: the name of the positional parameter, or None.
        config: the checked settings.
        kind: "classification" (integer labels) or "regression" (floating-point targets).
        train, val, test: the streams; no class of one stands in another.
        input_shape: of one example.
        outputs: how many outputs a model needs: the ways, or the width of the target.
    """

    part_kind: ClassVar[str] = "task source"
    Config: ClassVar[type[Settings]] = Settings
    argument: ClassVar[str | None] = None

    config: Settings
    kind: Literal["classification", "regression"]
    train: TaskStream
    val: TaskStream
    test: TaskStream
    input_shape: tuple[int, ...]
    outputs: int

    @classmethod
    def has_ways(cls, argument: str) -> bool:
        """Whether the source's tasks have ways, as those of classification do; with `argument`, which is "" where there is none."""
        return "ways" in inspect.signature(cls).parameters

    def to(self, device: torch.device | str) -> Self:
        """The same tasks, with the images of every split on `device`, as ImageEpisodes.to has it; what has no images stays as it is."""
        moved = copy(self)
        for split in SPLITS:
            stream = getattr(self, split)
            setattr(
                moved, split, stream.to(device) if isinstance(stream, ImageEpisodes) else stream
            )
        return moved

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The data in words and numbers, ready for JSON: kind, shapes, origin, licence and the size of every split."""


class ImageSource(TaskSource):
    """The base of sources whose tasks are drawn from class images.

    Args:
        splits: the classes of "train", "val" and "test".
        config: the checked settings of the subclass.
        origin, licence: of the images, for `describe`.
        ways, shots, queries, seed: as for ImageEpisodes.

    Raises:
        RequestError: a class stands in two splits, also under two names, images of two splits differ in shape, or as ImageEpisodes
            raises.
    """

    train: ImageEpisodes
    val: ImageEpisodes
    test: ImageEpisodes

    def __init__(
        self,
        splits: Mapping[str, ClassImages],
        *,
        config: Settings,
        origin: str,
        licence: str,
        ways: int,
        shots: int,
        queries: int,
        seed: int,
    ) -> None:
        self.config = config
        self.kind = "classification"
        self.input_shape = tuple(splits["train"].images.shape[1:])
        options = config if isinstance(config, EpisodeOptions) else EpisodeOptions()
        self.train, self.val, self.test = (
            ImageEpisodes(
                splits[split],
                split=split,
                ways=ways,
                shots=shots,
                queries=queries,
                seed=seed,
                options=options if split == "train" else options.of_evaluation,
            )
            for split in SPLITS
        )
        self.outputs = max(ways, self.train.most_ways)
        self._origin, self._licence = origin, licence
        for one, other in combinations(SPLITS, 2):
            both = sorted(set(splits[one].names) & set(splits[other].names))
            if both:
                raise RequestError(
                    f"the class '{both[0]}' stands in the {one} and in the {other} split, so it would not be new to the model: "
                    f"keep it in one of them"
                )
            if splits[one].images.shape[1:] != splits[other].images.shape[1:]:
                raise RequestError(
                    f"images of the {one} split have shape {tuple(splits[one].images.shape[1:])}, of the {other} split "
                    f"{tuple(splits[other].images.shape[1:])}, but one model takes one shape: resize them"
                )
            same = dict(zip(splits[one].digests, splits[one].names, strict=True))
            for digest, name in zip(splits[other].digests, splits[other].names, strict=True):
                if digest in same:
                    raise RequestError(
                        f"the class '{same[digest]}' of the {one} split and the class '{name}' of the {other} split have the same images, "
                        f"so they would not be new to the model: leave one of them out"
                    )

    def describe(self) -> dict[str, Any]:
        """The data in words and numbers, ready for JSON."""
        streams = (self.train, self.val, self.test)
        return {
            "kind": self.kind,
            "input_shape": list(self.input_shape),
            "outputs": self.outputs,
            "origin": self._origin,
            "licence": self._licence,
            "splits": {
                stream.split: {
                    "classes": len(stream.classes.names),
                    "images": sum(stream.classes.counts),
                }
                for stream in streams
            },
        }


@final
class ArrayTasks(ImageSource):
    """Tasks from class images that are in memory.

    Args:
        train, val, test: by class name, (n, channels, height, width); uint8 (255 is 1.0), or float32 in [0, 1]. No name stands in two.
        ways, shots, queries, seed: as for ImageEpisodes.
        settings: fields of EpisodeOptions.

    Raises:
        RequestError: an array has another shape or dtype than the first, a setting is wrong, or as ImageSource raises.
    """

    Config = EpisodeOptions

    def __init__(
        self,
        *,
        train: Mapping[str, Tensor | NDArray[Any]],
        val: Mapping[str, Tensor | NDArray[Any]],
        test: Mapping[str, Tensor | NDArray[Any]],
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        config = validated(EpisodeOptions, settings, "array tasks")
        splits = {
            split: _stack(classes, split)
            for split, classes in zip(SPLITS, (train, val, test), strict=True)
        }
        origin, licence = "arrays given in Python", "not stated"
        super().__init__(
            splits,
            config=config,
            origin=origin,
            licence=licence,
            ways=ways,
            shots=shots,
            queries=queries,
            seed=seed,
        )


def _stack(classes: Mapping[str, Tensor | NDArray[Any]], split: str) -> ClassImages:
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
                f"the class '{name}' of the {split} split has {array.dtype} images of shape {tuple(array.shape)}, the class '{first_name}' "
                f"{first.dtype} images of {tuple(first.shape)}: give every class (n, channels, height, width) of one size and dtype"
            )
    return ClassImages(
        tuple(arrays),
        torch.cat(list(arrays.values())),
        tuple(len(array) for array in arrays.values()),
    )
