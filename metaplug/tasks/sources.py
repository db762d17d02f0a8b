"""Task sources: where the training, validation and test tasks of a run come from."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from copy import copy
from itertools import combinations
from typing import Any, ClassVar, Literal, Self

import torch

from metaplug.errors import RequestError
from metaplug.settings import Settings
from metaplug.tasks.episodes import EpisodeOptions, Episodes, ImageEpisodes, TaskStream
from metaplug.tasks.images.class_images import ClassImages
from metaplug.tasks.splits import SPLITS


class TaskSource(ABC):
    """Training, validation and test tasks of one kind and form.

    A final subclass takes keyword arguments only: the sizes of a task, `seed`, and the fields of
    its Config. A source that needs one argument more (`folder:PATH`) takes it as its first
    positional parameter, and names it in `argument`.

    Attributes:
        Config: the fields of this source alone.
        argument: the name of the positional parameter, or None.
        config: the checked settings.
        kind: "classification" (integer labels) or "regression" (floating-point targets).
        train, val, test: the streams; no class of one stands in another.
        input_shape: of one example.
        inputs: the names of an example's tensors, where it has several.
        outputs: the number of outputs that a model needs: the ways, or the width of the target.
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
    inputs: tuple[str, ...] = ()
    outputs: int

    @classmethod
    def has_ways(cls, argument: str) -> bool:
        """Whether the source's tasks have ways, as those of classification do.

        Args:
            argument: the positional argument, "" where there is none.
        """
        return "ways" in inspect.signature(cls).parameters

    def to(self, device: torch.device | str) -> Self:
        """The same tasks, with the examples of every split on `device` (see Episodes.to)."""
        moved = copy(self)
        for split in SPLITS:
            stream = getattr(self, split)
            if isinstance(stream, Episodes):
                setattr(moved, split, stream.to(device))
        return moved

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The data in words and numbers, ready for JSON.

        Returns:
            kind, input_shape, outputs, origin, licence, and the size of every split.
        """

    def resolved(self) -> dict[str, Any]:
        """The settings that make an example's numbers of the data, as values for JSON.

        What the training data decided stands in the place of "auto" or null. A run keeps these, so
        other data of the same source are read as those that it was trained on. None by default.
        """
        return {}

    def _described(self, origin: str, licence: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
        """The value of `describe`, of its parts; `sizes` by split."""
        return {
            "kind": self.kind,
            "input_shape": list(self.input_shape),
            "outputs": self.outputs,
            "origin": origin,
            "licence": licence,
            "splits": dict(sizes),
        }


class ImageSource(TaskSource):
    """The base of sources whose tasks are drawn from class images.

    Args:
        splits: the classes of "train", "val" and "test".
        config: the checked settings of the subclass.
        origin, licence: of the images, for `describe`.
        ways, shots, queries, seed: as for ImageEpisodes.

    Raises:
        RequestError: a class stands in two splits, also under two names; the images of two splits
            differ in shape; or as ImageEpisodes raises.
    """

    train: ImageEpisodes
    val: ImageEpisodes
    test: ImageEpisodes

    def __init__(
        self,
        splits: Mapping[str, ClassImages],
        config: Settings,
        *,
        origin: str,
        licence: str = "not stated",
        **sizes: int,
    ) -> None:
        self.config = config
        self.kind = "classification"
        self.input_shape = tuple(splits["train"].images.shape[1:])
        options = config if isinstance(config, EpisodeOptions) else EpisodeOptions()
        self.outputs = outputs = options.most_ways(sizes["ways"])
        self.train = ImageEpisodes(
            splits["train"], split="train", options=options, outputs=outputs, **sizes
        )
        rest = options.of_evaluation
        self.val, self.test = (
            ImageEpisodes(splits[split], split=split, options=rest, outputs=outputs, **sizes)
            for split in ("val", "test")
        )
        self._origin, self._licence = origin, licence
        for one, other in combinations(SPLITS, 2):
            first, second = splits[one], splits[other]
            check_names_apart(one, first.names, other, second.names)
            shapes = tuple(first.images.shape[1:]), tuple(second.images.shape[1:])
            if shapes[0] != shapes[1]:
                raise RequestError(
                    f"images of the {one} split have shape {shapes[0]}, of the {other} split "
                    f"{shapes[1]}, but one model takes one shape: resize them"
                )
            given = [dict(zip(each.digests, each.names, strict=True)) for each in (first, second)]
            check_contents_apart(one, given[0], other, given[1], "images")

    def describe(self) -> dict[str, Any]:
        """The data in words and numbers, ready for JSON."""
        sizes = {
            stream.split: {
                "classes": len(stream.classes.names),
                "images": sum(stream.classes.counts),
            }
            for stream in (self.train, self.val, self.test)
        }
        return self._described(self._origin, self._licence, sizes)


def check_names_apart(
    one: str, first: Collection[str], other: str, second: Collection[str]
) -> None:
    """Refuse two splits that share the name of a class."""
    if both := sorted({*first} & {*second}):
        raise RequestError(
            f"the class '{both[0]}' stands in the {one} and in the {other} split, so it would not "
            "be new to the model: keep it in one of them"
        )


def check_contents_apart(
    one: str, first: Mapping[str, str], other: str, second: Mapping[str, str], noun: str
) -> None:
    """Refuse two splits that share a class by its examples, under two names.

    Args:
        one, other: the splits.
        first, second: the names of their classes, by digest.
        noun: what examples are called, in the plural.
    """
    for digest, name in second.items():
        if digest in first:
            raise RequestError(
                f"the class '{first[digest]}' of the {one} split and the class '{name}' of the "
                f"{other} split have the same {noun}, so they would not be new to the model: leave "
                "one of them out"
            )
