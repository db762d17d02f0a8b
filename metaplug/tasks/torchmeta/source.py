"""Every data set of torchmeta as tasks: its classes and splits, with tasks drawn from one seed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, final

import torch
from pydantic import Field

from metaplug.errors import RequestError, quoted, unknown
from metaplug.settings import validated
from metaplug.tasks.episodes import EpisodeOptions
from metaplug.tasks.images.class_images import ClassImages, allocate
from metaplug.tasks.images.pixels import converted, to_array
from metaplug.tasks.reading import cache_folder
from metaplug.tasks.sources import ImageSource, TaskSource
from metaplug.tasks.splits import SPLITS
from metaplug.tasks.torchmeta.compatibility import apply
from metaplug.tasks.torchmeta.data import naming_damage, open_splits
from metaplug.tasks.torchmeta.toys import TOYS, WORDS, points
from metaplug.tasks.toys.functions import UNBOUNDED, FunctionStream


@dataclass(frozen=True)
class _Images:
    """A set of images: its path below torchmeta.datasets, its side in pixels, its channels."""

    path: str
    size: int
    channels: int = 3


IMAGES = {
    "omniglot": _Images("omniglot.OmniglotClassDataset", 28, 1),
    "miniimagenet": _Images("miniimagenet.MiniImagenetClassDataset", 84),
    "tieredimagenet": _Images("tieredimagenet.TieredImagenetClassDataset", 84),
    "cifar-fs": _Images("cifar100.cifar_fs.CIFARFSClassDataset", 32),
    "fc100": _Images("cifar100.fc100.FC100ClassDataset", 32),
    "cub": _Images("cub.CUBClassDataset", 84),
    "doublemnist": _Images("doublemnist.DoubleMNISTClassDataset", 64, 1),
    "triplemnist": _Images("triplemnist.TripleMNISTClassDataset", 84, 1),
}


class TorchmetaConfig(EpisodeOptions):
    """The place and the reading of the images; or the noise of a toy."""

    root: Path | None = Field(
        None, description="Images: folder of all data sets; null: torchmeta in the cache folder."
    )
    download: bool = Field(
        False, description="Images: whether archives that are missing are downloaded."
    )
    size: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Images: side in pixels; null: as torchmeta's helper has it.",
    )
    noise_std: float = Field(
        0.0, ge=0, le=1000, description="Toys: standard deviation of the noise on the targets."
    )


@final
class Torchmeta(TaskSource):
    """The data sets of torchmeta 1.8.0: `torchmeta:NAME` on the command line.

    Images, with torchmeta's splits: omniglot, miniimagenet, tieredimagenet, cifar-fs, fc100, cub,
    doublemnist, triplemnist. They are read once, into one uint8 tensor a split, and tasks are
    drawn from there as by every other source of images. Omniglot is 28 x 28 with bright ink; it
    and the numbers of MNIST have one channel, the others three. Super-classes are Omniglot's
    alphabets, and those of cifar-fs, fc100 and tieredimagenet.

    Toys, for regression, with torchmeta's functions and ranges: sinusoid, harmonic,
    sinusoid-and-line.

    Args:
        name: one of these.
        ways, shots, queries, seed: as for ImageEpisodes; a toy has no ways, and shots and queries
            count its points.
        settings: fields of TorchmetaConfig.

    Raises:
        RequestError: torchmeta is not installed, the name is unknown, a setting is wrong or says
            nothing of this data set, an archive is missing and is not to be downloaded; or as
            ImageEpisodes raises.
        RunError: a download fails, or a file is damaged or refused; it is named, with its origin
            and its place.
    """

    Config = TorchmetaConfig
    argument = "name"

    @classmethod
    def has_ways(cls, argument: str) -> bool:
        """Whether it is a data set of images."""
        return argument not in TOYS

    def __init__(
        self,
        name: str,
        *,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        if name not in IMAGES and name not in TOYS:
            raise unknown("data set of torchmeta", name, [*IMAGES, *TOYS])
        self.config = config = validated(TorchmetaConfig, settings, "torchmeta")
        of_toys = config.model_fields_set & {"noise_std"}
        if unused := sorted(config.model_fields_set - of_toys if name in TOYS else of_toys):
            reason = "a toy has no images" if name in TOYS else "only toys have noise"
            raise RequestError(
                f"torchmeta:{name} has no use for {quoted(unused)}, since {reason}: leave it out"
            )
        torchmeta = apply()
        if name in TOYS:
            self.kind, self.input_shape, self.outputs = "regression", (1,), 1
            identity = f"torchmeta's {name.replace('-', '_')}", f"{config.noise_std}"
            own = partial(points, name, torchmeta.toy, config.noise_std), WORDS, identity
            self.train, self.val, self.test = (
                FunctionStream(*own, split=split, seed=seed, shots=shots, queries=queries)
                for split in SPLITS
            )
            origin = f"computed: torchmeta's toy {name}"
            self._description = self._described(origin, "none needed", UNBOUNDED)
        else:
            sizes = {"ways": ways, "shots": shots, "queries": queries, "seed": seed}
            source = _images(name, torchmeta, config, sizes)
            self.kind, self.input_shape = source.kind, source.input_shape
            self.outputs, self._description = source.outputs, source.describe()
            self.train, self.val, self.test = source.train, source.val, source.test

    def describe(self) -> dict[str, Any]:
        """The data in words and numbers, ready for JSON."""
        return self._description


def _images(
    name: str, torchmeta: Any, config: TorchmetaConfig, sizes: dict[str, int]
) -> ImageSource:
    root = (config.root or cache_folder() / "torchmeta").expanduser()
    dataset = attrgetter(IMAGES[name].path)(torchmeta.datasets)
    side, colour = config.size or IMAGES[name].size, IMAGES[name].channels == 3
    transforms = import_module("torchvision.transforms")
    resize = [transforms.Resize((side, side))]
    if name == "cub":
        # Birds come in all shapes: as in torchmeta's helper, the middle of an image is cut out.
        resize = [transforms.Resize(int(1.5 * side)), transforms.CenterCrop(side)]
    convert = partial(converted, mode="colour" if colour else "grey")
    transform = transforms.Compose([convert, *resize, to_array])
    title = f"torchmeta:{name}"
    splits = open_splits(dataset, title, root, download=config.download, transform=transform)
    with naming_damage(title, root / dataset.folder):
        read = {split: _read(splits[split], name, side, config.memory_mib) for split in SPLITS}
    origin, licence = (
        f"torchmeta's data set {name}, in {root}",
        "its authors'; torchmeta states none",
    )
    return ImageSource(read, config, origin=origin, licence=licence, **sizes)


def _read(classes: Any, name: str, side: int, memory_mib: int) -> ClassImages:
    """All images of one split."""
    # Not len(classes), in which turned copies would count.
    examples = [classes[index] for index in range(classes.num_classes)]
    counts = tuple(map(len, examples))
    images = allocate((sum(counts), IMAGES[name].channels, side, side), memory_mib)
    names, place = [], 0
    for own, count in zip(examples, counts, strict=True):
        read: list[Any] = [own[index][0] for index in range(count)]
        if name == "omniglot":
            # torchmeta has a class's files in the order of the file system, which differs.
            read.sort(key=lambda image: image.tobytes())
        images[place : place + count] = read
        place += count
        label, _ = own[0][1]
        names.append(label if isinstance(label, str) else "/".join(label))
    classes.close()
    above = tuple(whole.rpartition("/")[0] for whole in names)
    superclasses = above if all(above) else None
    return ClassImages(tuple(names), torch.from_numpy(images), counts, superclasses=superclasses)
