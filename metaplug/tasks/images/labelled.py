"""Tasks from images with labels: two tensors, or any map-style dataset of PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, final

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from metaplug.errors import RequestError, quoted, unknown
from metaplug.settings import validated
from metaplug.tasks.episodes import EpisodeOptions
from metaplug.tasks.images.class_images import ClassImages
from metaplug.tasks.images.pixels import converted, to_array
from metaplug.tasks.sources import ImageSource
from metaplug.tasks.splits import SPLITS, SplitFractions, by_fractions


class LabelledConfig(EpisodeOptions, SplitFractions):
    """The options of episodes, and the split of classes where none is given."""


class MapDataset(Protocol):
    """A map-style dataset in torch's sense, of (image, label) pairs."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


@final
class LabelledTasks(ImageSource):
    """Tasks whose classes are the labels of given images.

    Args:
        images: (N, channels, height, width); uint8 (255 is 1.0), or float32 in [0, 1]. Those with
            their channels last are refused as far as they are told (see ClassImages).
        labels: (N,) integers.
        names: the name of each label, 0, 1, ...; default: the labels themselves, as text.
        splits: {"train": names, "val": names, "test": names}; default: by `fractions`, in the
            order of a hash of the names.
        ways, shots, queries, seed: as for ImageEpisodes.
        settings: fields of LabelledConfig.

    Raises:
        RequestError: the tensors do not fit each other, a label is no class, a split is wrong, or
            as ImageSource raises.
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
                f"labelled tasks: images of shape {tuple(x.shape)} and {y.dtype} labels of shape "
                f"{tuple(y.shape)} do not fit: give images (N, channels, height, width) and N "
                "integer labels"
            )
        classes = _by_name(x, y, names)
        if splits is None:
            chosen = by_fractions(list(classes), config.fractions)
        else:
            chosen = _checked(splits, list(classes))
        stacked = {}
        for split, own in chosen.items():
            parts = [classes[name] for name in own]
            counts = tuple(map(len, parts))
            stacked[split] = ClassImages(tuple(own), torch.cat([x[:0], *parts]), counts)
        super().__init__(
            stacked, config, origin=origin, ways=ways, shots=shots, queries=queries, seed=seed
        )

    @classmethod
    def from_dataset(cls, dataset: MapDataset, **given: Any) -> LabelledTasks:
        """Tasks from a map-style dataset of (image, label): every item is read once.

        Args:
            dataset: labels as integers. Images as tensors or arrays, (height, width) or (channels,
                height, width), uint8 or float in [0, 1]; or as PIL images, of which those in grey
                give one channel, others three, turned as their EXIF orientation says, on white
                paper where they are transparent. A `classes` attribute gives the names, as
                torchvision's datasets have it.
            given: as for LabelledTasks.

        Raises:
            RequestError: the dataset has no length, an item is no such pair, a PIL image has more
                than 8 bits a channel, or as LabelledTasks raises; the item is named.
        """
        kind = type(dataset).__name__
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise RequestError(
                f"{kind} is no map-style dataset: give one with a length, whose items are found by "
                "index"
            )
        if len(dataset) == 0:
            raise RequestError(f"the dataset {kind} is empty: give one with images")
        images: list[Tensor] = []
        labels: list[int] = []
        for index in range(len(dataset)):
            image, label = _item(dataset[index], index)
            first = images[0] if images else image
            if image.shape != first.shape or image.dtype != first.dtype:
                raise RequestError(
                    f"item {index} of the dataset is {image.dtype} of shape {tuple(image.shape)}, "
                    f"item 0 {first.dtype} of {tuple(first.shape)}, but one model takes one form: "
                    "resize or convert them in the dataset's transform"
                )
            images.append(image)
            labels.append(label)
        given = {
            "names": getattr(dataset, "classes", None),
            "origin": f"the dataset {kind}",
            **given,
        }
        return cls(torch.stack(images), torch.tensor(labels), **given)


def _by_name(images: Tensor, labels: Tensor, names: Sequence[str] | None) -> dict[str, Tensor]:
    classes: dict[str, Tensor] = {}
    for label in sorted(set(labels.tolist())):
        if names is not None and not 0 <= label < len(names):
            raise RequestError(
                f"labelled tasks: the label {label} is no class, as there are {len(names)} names: "
                "correct labels or names"
            )
        name = str(label if names is None else names[label])
        if name in classes:
            raise RequestError(
                f"labelled tasks: two labels are named '{name}': give every class a name of its own"
            )
        classes[name] = images[labels == label]
    return classes


def _checked(splits: Mapping[str, Sequence[str]], classes: list[str]) -> dict[str, list[str]]:
    if wrong := [split for split in splits if split not in SPLITS]:
        raise unknown("split", wrong[0], SPLITS)
    if missing := [split for split in SPLITS if split not in splits]:
        raise RequestError(
            f"labelled tasks: the splits do not name {quoted(missing)}: give train, val and test"
        )
    checked = {split: [str(name) for name in splits[split]] for split in SPLITS}
    for split, names in checked.items():
        if strange := [name for name in names if name not in classes]:
            raise unknown(f"class of the {split} split", strange[0], classes)
    return checked


def _item(item: Any, index: int) -> tuple[Tensor, int]:
    """An image (channels, height, width), uint8 or float32, and its label."""
    where = f"item {index} of the dataset"
    try:
        image, label = item
        number = int(label)
        whole = number == label
    except (TypeError, ValueError, RuntimeError):
        raise RequestError(
            f"{where} is no pair of an image and an integer label: give (image, label)"
        ) from None
    if isinstance(image, Image.Image):
        try:
            image = to_array(converted(image))
        except ValueError as error:
            raise RequestError(
                f"{where} is an image that cannot be read ({error}): let the dataset's transform "
                "scale it to 8 bits, or to a float tensor in [0, 1]"
            ) from None
    tensor = torch.as_tensor(image)
    tensor = tensor[None] if tensor.ndim == 2 else tensor
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    if not whole or tensor.ndim != 3:
        fault = f"the label {label!r}" if not whole else f"an image of shape {tuple(tensor.shape)}"
        raise RequestError(
            f"{where} has {fault}: give images (channels, height, width) and integer labels"
        )
    return tensor, number
