"""Every data set of torchmeta as tasks: its classes, splits, downloads and toy functions, with tasks that are drawn from one seed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter, methodcaller
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from pydantic import Field

from metaplug.errors import RequestError, quoted, unknown
from metaplug.settings import validated
from metaplug.tasks.episodes import ClassImages, EpisodeOptions, allocate
from metaplug.tasks.glyphs.source import cache_folder
from metaplug.tasks.sources import SPLITS, ImageSource, TaskSource
from metaplug.tasks.torchmeta.data import naming_damage, open_splits
from metaplug.tasks.torchmeta.mends import apply
from metaplug.tasks.torchmeta.toys import TOYS, ToyStream


@dataclass(frozen=True)
class _Images:
    """Where torchmeta has a set of images (below torchmeta.datasets), their side as its helper has it, in pixels, and their channels."""

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
    """Where the images are and how they are read; or the noise of a toy."""

    root: Path | None = Field(
        None,
        description="Images: the folder with a folder for each data set; null: the folder torchmeta in metaplug's cache folder.",
    )
    download: bool = Field(
        False, description="Images: whether archives that are missing are downloaded."
    )
    size: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Images: side after resizing, in pixels; null: as torchmeta's helper has it, 28 for Omniglot.",
    )
    noise_std: float = Field(
        0.0, ge=0, le=1000, description="Toys: standard deviation of the noise on the targets."
    )


@final
class Torchmeta(TaskSource):
    """The data sets of torchmeta 1.8.0: `torchmeta:NAME` on the command line.

    Images, with torchmeta's splits: omniglot, miniimagenet, tieredimagenet, cifar-fs, fc100, cub, doublemnist, triplemnist. They are
    read once, into one uint8 tensor a split, and tasks are drawn from there as by every other source of images. Omniglot is 28 x 28
    with bright ink; it and the numbers of MNIST have one channel, the others three. Super-classes are Omniglot's alphabets, and those
    of cifar-fs, fc100 and tieredimagenet.

    Toys, for regression, with torchmeta's functions and ranges: sinusoid, harmonic, sinusoid-and-line.

    Args:
        name: one of these.
        ways, shots, queries, seed: as for ImageEpisodes; a toy has no ways, and shots and queries count its points.
        settings: fields of TorchmetaConfig.

    Raises:
        RequestError: torchmeta is not installed, the name is unknown, a setting is wrong or says nothing of this data set, an archive is
            missing and is not to be downloaded; or as ImageEpisodes raises.
        RunError: a download fails, or a file is damaged or refused; it is named, with its origin and its place.
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
        if idle := sorted(config.model_fields_set - of_toys if name in TOYS else of_toys):
            reason = "a toy has no images" if name in TOYS else "only toys have noise"
            raise RequestError(
                f"torchmeta:{name} has no use for {quoted(idle)}, since {reason}: leave it out"
            )
        torchmeta = apply()
        if name in TOYS:
            self.kind, self.input_shape, self.outputs = "regression", (1,), 1
            self.train, self.val, self.test = (
                ToyStream(
                    TOYS[name],
                    torchmeta.toy,
                    config.noise_std,
                    split=split,
                    shots=shots,
                    queries=queries,
                    seed=seed,
                )
                for split in SPLITS
            )
            self._description = {
                "kind": self.kind,
                "input_shape": [1],
                "outputs": 1,
                "origin": f"computed: torchmeta's toy {name}",
                "licence": "none needed",
                "splits": {split: {"tasks": "unbounded"} for split in SPLITS},
            }
        else:
            root = (config.root or cache_folder() / "torchmeta").expanduser()
            source = ImageSource(
                _read(attrgetter(IMAGES[name].path)(torchmeta.datasets), name, root, config),
                config=config,
                origin=f"torchmeta's data set {name}, in {root}",
                licence="its authors'; torchmeta states none",
                ways=ways,
                shots=shots,
                queries=queries,
                seed=seed,
            )
            self.kind, self.input_shape, self.outputs = (
                source.kind,
                source.input_shape,
                source.outputs,
            )
            self.train, self.val, self.test = source.train, source.val, source.test
            self._description = source.describe()

    def describe(self) -> dict[str, Any]:
        """The data in words and numbers, ready for JSON."""
        return self._description


def _read(dataset: Any, name: str, root: Path, config: TorchmetaConfig) -> dict[str, ClassImages]:
    """All images of a data set, by split."""
    size = config.size or IMAGES[name].size
    transforms = import_module("torchvision.transforms")
    # Birds come in all shapes: as in torchmeta's helper, the middle of an image is cut out.
    resize = (
        [transforms.Resize(int(1.5 * size)), transforms.CenterCrop(size)]
        if name == "cub"
        else [transforms.Resize((size, size))]
    )
    transform = transforms.Compose(
        [methodcaller("convert", "L" if IMAGES[name].channels == 1 else "RGB"), *resize]
    )
    splits = open_splits(
        dataset, f"torchmeta:{name}", root, download=config.download, transform=transform
    )
    with naming_damage(f"torchmeta:{name}", root / dataset.folder):
        return {
            split: _read_split(classes, name, size, config.memory_mib)
            for split, classes in splits.items()
        }


def _read_split(classes: Any, name: str, size: int, memory_mib: int) -> ClassImages:
    # Not len(classes), in which turned copies would count.
    examples = [classes[index] for index in range(classes.num_classes)]
    counts = [len(own) for own in examples]
    images = allocate((sum(counts), IMAGES[name].channels, size, size), memory_mib)
    names, place = [], 0
    for own, count in zip(examples, counts, strict=True):
        read = [
            np.asarray(own[index][0]).reshape(size, size, -1).transpose(2, 0, 1)
            for index in range(count)
        ]
        if name == "omniglot":
            # torchmeta lists the files of a class in the order of the file system, which differs between machines.
            read.sort(key=lambda image: image.tobytes())
        images[place : place + count] = read
        place += count
        label, _ = own[0][1]
        names.append(label if isinstance(label, str) else "/".join(label))
    classes.close()
    above = tuple(whole.rpartition("/")[0] for whole in names)
    return ClassImages(
        tuple(names),
        torch.from_numpy(images),
        tuple(counts),
        superclasses=above if all(above) else None,
    )
