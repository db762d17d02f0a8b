"""Tasks from images with labels: two tensors, or any map-style dataset of PyTorch, torchvision's included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from metaplug.errors import RequestError, quoted, unknown
from metaplug.settings import validated
from metaplug.tasks.episodes import ClassImages, EpisodeOptions
from metaplug.tasks.sources import SPLITS, ImageSource, SplitFractions, by_fractions


class LabelledConfig(EpisodeOptions, SplitFractions):
    """How tasks are drawn, and how classes are split where no split is given."""


class MapDataset(Protocol):
    """What torch calls a map-style dataset: of (image, label) pairs."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


@final
class LabelledTasks(ImageSource):
    """Tasks whose classes are the labels of given images.

    Args:
        images: (N, channels, height, width); uint8 (255 is 1.0), or float32 in [0, 1].
        labels: (N,) integers.
        names: the name of each label, 0, 1, ...; default: the labels themselves, as text.
        splits: {"train": names, "val": names, "test": names}; default: by `fractions`, in the order of a hash of the names.
        ways, shots, queries, seed: as for ImageEpisodes.
        settings: fields of LabelledConfig.

    Raises:
        RequestError: the tensors do not fit each other, a label is no class, a split is wrong, or as ImageSource raises.
    """

    Config = LabelledConfig

    def __init__(
        self,
        images: Tensor | NDArray[Any],
        labels: Tensor | NDArray[Any] | Sequence[int],
        *,
        names: Sequence[str] | None = None,
        splits: Mapping[str, Sequence[str]] | None = None,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        seed: int = 0,
        origin: str = "tensors given in Python",
        **settings: Any,
    ) -> None:
        config = validated(LabelledConfig, settings, "labelled tasks")
        x, y = torch.as_tensor(images), torch.as_tensor(labels)
        if x.ndim != 4 or y.shape != x.shape[:1] or y.is_floating_point():
            raise RequestError(
                f"labelled tasks: images of shape {tuple(x.shape)} and {y.dtype} labels of shape {tuple(y.shape)} do not fit: give images "
                "(N, channels, height, width) and N integer labels"
            )
        classes = _by_label(x, y, names)
        chosen = (
            by_fractions(list(classes), config.fractions)
            if splits is None
            else _checked(splits, list(classes))
        )
        stacked = {
            split: ClassImages(
                tuple(chosen[split]),
                torch.cat([classes[name] for name in chosen[split]]) if chosen[split] else x[:0],
                tuple(len(classes[name]) for name in chosen[split]),
            )
            for split in SPLITS
        }
        super().__init__(
            stacked,
            config=config,
            origin=origin,
            licence="not stated",
            ways=ways,
            shots=shots,
            queries=queries,
            seed=seed,
        )

    @classmethod
    def from_dataset(cls, dataset: MapDataset, **given: Any) -> LabelledTasks:
        """Tasks from a map-style dataset of (image, label): every item is read once.

        Args:
            dataset: images as PIL images, or as tensors or arrays, (height, width) or (channels, height, width), uint8 or float in [0, 1];
                labels as integers. A `classes` attribute gives the names, as torchvision's datasets have it.
            given: as for LabelledTasks.

        Raises:
            RequestError: the dataset has no length, an item is no such pair, or as LabelledTasks raises; the item is named.
        """
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise RequestError(
                f"{type(dataset).__name__} is no map-style dataset: give one with a length, whose items are found by index"
            )
        if len(dataset) == 0:
            raise RequestError(
                f"the dataset {type(dataset).__name__} is empty: give one with images"
            )
        images: list[Tensor] = []
        labels: list[int] = []
        for index in range(len(dataset)):
            image, label = _item(dataset[index], index)
            if images and (image.shape != images[0].shape or image.dtype != images[0].dtype):
                raise RequestError(
                    f"item {index} of the dataset is {image.dtype} of shape {tuple(image.shape)}, item 0 {images[0].dtype} of "
                    f"{tuple(images[0].shape)}, but one model takes one form: resize or convert them in the dataset's transform"
                )
            images.append(image)
            labels.append(label)
        names = given.pop("names", getattr(dataset, "classes", None))
        return cls(
            torch.stack(images),
            torch.tensor(labels),
            names=names,
            origin=f"the dataset {type(dataset).__name__}",
            **given,
        )


def _by_label(images: Tensor, labels: Tensor, names: Sequence[str] | None) -> dict[str, Tensor]:
    found = sorted(set(labels.tolist()))
    if names is not None and found and (found[0] < 0 or found[-1] >= len(names)):
        wrong = found[0] if found[0] < 0 else found[-1]
        raise RequestError(
            f"labelled tasks: the label {wrong} is no class, as there are {len(names)} names: correct labels or names"
        )
    named = {label: str(label) if names is None else str(names[label]) for label in found}
    if len(set(named.values())) < len(named):
        twice = next(name for name in named.values() if list(named.values()).count(name) > 1)
        raise RequestError(
            f"labelled tasks: two labels are named '{twice}': give every class a name of its own"
        )
    return {name: images[labels == label] for label, name in named.items()}


def _checked(splits: Mapping[str, Sequence[str]], classes: list[str]) -> dict[str, list[str]]:
    for split in splits:
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
    if missing := [split for split in SPLITS if split not in splits]:
        raise RequestError(
            f"labelled tasks: the splits do not name {quoted(missing)}: give train, val and test"
        )
    for split in SPLITS:
        for name in splits[split]:
            if str(name) not in classes:
                raise unknown(f"class of the {split} split", str(name), classes)
    return {split: [str(name) for name in splits[split]] for split in SPLITS}


def _item(item: Any, index: int) -> tuple[Tensor, int]:
    """An image (channels, height, width), uint8 or float32, and its label."""
    try:
        image, label = item
        number = int(label)
        whole = number == label
    except (TypeError, ValueError, RuntimeError):
        raise RequestError(
            f"item {index} of the dataset is no pair of an image and an integer label: give (image, label)"
        ) from None
    if isinstance(image, Image.Image):
        image = np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        image = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    tensor = torch.as_tensor(image)
    tensor = tensor[None] if tensor.ndim == 2 else tensor
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    if not whole or tensor.ndim != 3:
        what = f"the label {label!r}" if not whole else f"an image of shape {tuple(tensor.shape)}"
        raise RequestError(
            f"item {index} of the dataset has {what}: give images (channels, height, width) and integer labels"
        )
    return tensor, number
