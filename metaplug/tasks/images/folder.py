"""Tasks from anyone's images: a folder of class folders, or zips of them, read in place."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, Literal, final

import numpy as np
import PIL
import torch
from PIL import features
from pydantic import Field

from metaplug.errors import RequestError, one_line, quoted, unknown
from metaplug.settings import validated
from metaplug.tasks.episodes import EpisodeOptions
from metaplug.tasks.identities import digest
from metaplug.tasks.images.class_files import Classes, ClassFile, find_classes
from metaplug.tasks.images.class_images import ClassImages, allocate
from metaplug.tasks.images.decoded import DecodedImages, read_decoded, write_decoded
from metaplug.tasks.images.fingerprint import fingerprint
from metaplug.tasks.images.pixels import Mode, read_image
from metaplug.tasks.reading import Names, cache_folder, read_regular
from metaplug.tasks.sources import ImageSource
from metaplug.tasks.splits import (
    MOST_BYTES,
    SPLITS,
    SPLITS_FORM,
    SplitFractions,
    by_fractions,
    in_two_splits,
    read_splits,
)

_FORMAT = 2
"""Of what is kept; counts up with any change to pixels or digests, or to what is refused."""


class FolderConfig(EpisodeOptions, SplitFractions):
    """The reading and splitting of a folder of images."""

    size: int | None = Field(
        28, ge=1, le=1024, description="Side of an image, in pixels; null keeps the images' own."
    )
    mode: Mode = Field("grey", description="One channel, or three.")
    invert: bool | Literal["auto"] = Field(
        "auto", description="Exchange dark and bright; auto: where grey training images are bright."
    )
    splits: Path | None = Field(
        None, description="JSON file of class names by split; null: splits.json beside the data."
    )
    cache_mib: int = Field(
        2048,
        ge=0,
        le=2**20,
        description=(
            "Decoded images are kept in the cache folder, up to so many MiB of all data sets "
            "together; the longest unused make room. A data set beyond that, or beyond memory_mib, "
            "is decoded at every start; 0 keeps none."
        ),
    )


@final
class Folder(ImageSource):
    """Images in class folders, nested or flat, on disk or in zips: `folder:PATH`.

    A class is a folder that directly holds images; its name is its path below the root
    (`Greek/character01`). The root is PATH, or in a zip the one folder around everything, where
    there is one. Zips that stand in PATH belong to it; a class that stands twice, with the same
    files, counts once. Hidden files and files with other suffixes than images have are passed
    over. Symbolic links are followed, other than to folders in the root and around it.

    Classes are split by a file {"train": [names], "val": [names], "test": [names]}, where a name
    takes every class below it; else by folders `train`, `val` and `test` at the top; else by
    `fractions`, in the order of a hash of their names. No seed changes a split.

    Decoded images of a thousand and more are kept in `cache_folder()`, with a checksum: a second
    start opens no image, as long as the paths, sizes and times of the files, the lists of members
    of the zips, and the settings are the same (see `fingerprint` for what escapes that).

    Args:
        path: a folder, or a zip.
        ways, shots, queries, seed: as for ImageEpisodes.
        settings: fields of FolderConfig. The defaults suit ink on paper, such as Omniglot:
            28 x 28, grey, ink bright on dark.

    Attributes:
        inverted: whether dark and bright are exchanged in the images.

    Raises:
        RequestError: a setting, file, zip or split is wrong; the file is named. Or as
            ImageEpisodes raises.
    """

    Config = FolderConfig
    argument = "path"

    config: FolderConfig

    def __init__(
        self,
        path: str | Path,
        *,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        config = validated(FolderConfig, settings, "folder")
        root = Path(path).expanduser()
        place, cache_bytes = _place(root, config), config.cache_mib * 2**20
        most_bytes = min(cache_bytes, config.memory_mib * 2**20)
        kept = read_decoded(place, most_bytes) if place else None
        decoded = kept or _decoded(root, config)
        self.inverted = decoded.inverted
        super().__init__(
            decoded.splits,
            config,
            origin=str(root),
            ways=ways,
            shots=shots,
            queries=queries,
            seed=seed,
        )
        # Only now are the splits known to be apart. Files that changed while they were read give
        # another place: which of the two their images belong to is not known.
        if place and not kept and place == _place(root, config):
            write_decoded(place, decoded, most_bytes=most_bytes, folder_bytes=cache_bytes)

    def describe(self) -> dict[str, Any]:
        """The data in words and numbers, ready for JSON."""
        return super().describe() | {"inverted": self.inverted}

    def resolved(self) -> dict[str, Any]:
        """Size and mode, and whether the training images were inverted."""
        own = self.config.model_dump(mode="json", include={"size", "mode"})
        return own | {"invert": self.inverted}


def _place(root: Path, config: FolderConfig) -> Path | None:
    """Where the decoded images are kept, by all that decides them; None for nowhere."""
    if config.cache_mib == 0:
        return None
    settings = config.model_dump_json(include={"size", "mode", "invert", "fractions"})
    try:
        listing = fingerprint(root)
        by_file = _splits_file(root, config)
        splits = read_regular(by_file, MOST_BYTES) if by_file else b""
        folder = cache_folder() / "images"
    except (OSError, RuntimeError, ValueError):  # `_decoded` says why; or there is no home folder
        return None
    # Pillow's JPEG library may round otherwise, and is not always the one that it comes with.
    decoders = (PIL.__version__, str(features.version("jpg")))
    versions = (str(_FORMAT), version("metaplug"), *decoders)
    return folder / f"{digest(*versions, settings, splits, listing)}.bin"


def _decoded(root: Path, config: FolderConfig) -> DecodedImages:
    with ExitStack() as stack:
        classes, chosen = _split(find_classes(root, stack), root, config)
        known = Names("class")
        for part, names in chosen.items():
            for name in names:
                known.add(name, f"the {part} split of the images in {root}")
        images = {split: _read(classes, names, config) for split, names in chosen.items()}
    train = images["train"].images
    bright = config.mode == "grey" and int(train.sum()) > 127.5 * train.numel()
    inverted = bright if config.invert == "auto" else config.invert
    if inverted:
        for split in images.values():
            # Computed now, of the files' own pixels: inverted or not, a class stays the same one.
            _ = split.digests
            split.images.bitwise_not_()
    return DecodedImages(images, inverted)


def _splits_file(root: Path, config: FolderConfig) -> Path | None:
    beside = (root if root.is_dir() else root.parent) / "splits.json"
    return config.splits or (beside if beside.is_file() else None)


def _split(
    classes: Classes, root: Path, config: FolderConfig
) -> tuple[Classes, dict[str, list[str]]]:
    """The classes, and the names of each split's; a folder of a split is no part of a name."""
    if by_file := _splits_file(root, config):
        return classes, _by_file(by_file, list(classes))
    if {name.partition("/")[0] for name in classes} <= set(SPLITS):
        return _by_top_folder(classes)
    return classes, by_fractions(list(classes), config.fractions)


def _by_top_folder(classes: Classes) -> tuple[Classes, dict[str, list[str]]]:
    renamed: dict[str, Sequence[ClassFile]] = {}
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    for whole, files in classes.items():
        split, _, name = whole.partition("/")
        if not name:
            raise RequestError(
                f"the image {files[0]} stands in the folder of the {split} split, but in no class "
                "folder: move it into one"
            )
        if name in renamed:
            raise in_two_splits(
                "class", name, next(other for other in SPLITS if name in names[other]), split
            )
        renamed[name] = files
        names[split].append(name)
    return renamed, names


def _by_file(path: Path, classes: Sequence[str]) -> dict[str, list[str]]:
    given = read_splits(path, "class")
    if not all(isinstance(name, str) for names in given.values() for name in names):
        raise RequestError(
            f"the splits {path} are not lists of class names by split: write {SPLITS_FORM}"
        )
    if missing := [split for split in SPLITS if split not in given]:
        raise RequestError(f"the splits {path} do not name {quoted(missing)}: write {SPLITS_FORM}")
    above = {str(parent) for name in classes for parent in PurePosixPath(name).parents} - {"."}
    owner: dict[str, str] = {}
    for split in SPLITS:
        for name in given[split]:
            taken = [one for one in classes if one == name or one.startswith(f"{name}/")]
            if not taken:
                known = [*sorted(above), *classes]
                raise RequestError(
                    f"the splits {path}, {split}: {unknown('class', one_line(name, 80), known)}"
                )
            for one in taken:
                if owner.setdefault(one, split) != split:
                    raise in_two_splits("class", one, owner[one], split)
    return {split: [name for name in classes if owner.get(name) == split] for split in SPLITS}


def _read(classes: Classes, names: Sequence[str], config: FolderConfig) -> ClassImages:
    files = [file for name in names for file in classes[name]]
    side, channels = config.size or 0, 1 if config.mode == "grey" else 3
    images = np.empty((0, channels, side, side), np.uint8)
    for place, file in enumerate(files):
        pixels = read_image(file, file.read, config.mode, config.size)
        if place == 0:
            images = allocate((len(files), *pixels.shape), config.memory_mib)
        (_, height, width), (_, first_height, first_width) = pixels.shape, images.shape[1:]
        if (height, width) != (first_height, first_width):
            raise RequestError(
                f"the image {file} has {width} x {height} pixels, the first one {first_width} x "
                f"{first_height}, but one model takes one size: set 'size'"
            )
        images[place] = pixels
    above = tuple(str(PurePosixPath(name).parent) for name in names)
    counts = tuple(len(classes[name]) for name in names)
    superclasses = None if set(above) <= {"."} else above
    return ClassImages(tuple(names), torch.from_numpy(images), counts, superclasses=superclasses)
