"""Tasks from anyone's images: a folder of class folders, or zips of them. Nothing is unpacked to disk."""

from __future__ import annotations

import os
import stat
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import Field

from metaplug.errors import RequestError, one_line, quoted, reason, unknown
from metaplug.settings import validated
from metaplug.tasks.episodes import ClassImages, EpisodeOptions, allocate
from metaplug.tasks.reading import UNPRINTABLE, read_regular
from metaplug.tasks.sources import (
    SPLITS,
    SPLITS_FORM,
    ImageSource,
    SplitFractions,
    by_fractions,
    read_splits,
)

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Pillow goes by the content, not by the name: without the list, an EPS named .png would be given to Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MOST_SCANS = 1000
"""Of a progressive JPEG. Cameras write about ten; each takes the time of the whole image, and only a few bytes."""
_MOST_BYTES = 64 * 2**20
_MOST_PIXELS = 50_000_000
_SPLIT_FILE = "splits.json"


class FolderConfig(EpisodeOptions, SplitFractions):
    """How a folder of images is read and split."""

    size: int | None = Field(
        28,
        ge=1,
        le=1024,
        description="Side of an image after resizing, in pixels; null keeps the images' own size.",
    )
    mode: Literal["grey", "colour"] = Field("grey", description="One channel, or three.")
    invert: bool | Literal["auto"] = Field(
        "auto",
        description="Whether dark and bright change places; auto: for grey images whose training part is mostly bright (ink on paper).",
    )
    splits: Path | None = Field(
        None,
        description="JSON file of class names by split; null takes splits.json beside the data, if there.",
    )


@dataclass(frozen=True)
class _File:
    """One image, on disk or in a zip."""

    name: str
    """Its path below the root, which sorts it within its class."""
    path: Path
    archive: zipfile.ZipFile | None = None
    member: zipfile.ZipInfo | None = None

    def __str__(self) -> str:
        return f"{self.path}/{self.member.filename}" if self.member else str(self.path)

    @property
    def size(self) -> int:
        return self.member.file_size if self.member else self.path.stat().st_size

    def read(self) -> bytes:
        """All bytes.

        Raises:
            RequestError: there are more than are read.
            Exception: whatever zipfile raises, or an OSError, as the file cannot be read.
        """
        size = self.size
        if size > _MOST_BYTES:
            raise RequestError(
                f"the image {self} has {size} bytes, more than the {_MOST_BYTES} that are read: make it smaller, or remove it"
            )
        if not (self.archive and self.member):
            return read_regular(self.path, _MOST_BYTES)
        with self.archive.open(self.member) as file:
            data = file.read(
                size + 1
            )  # read() without a number unpacks all that is there, whatever the size that is stated
        if len(data) != size:
            raise ValueError(f"it has {len(data)} bytes, but the zip states {size}")
        return data


Classes = Mapping[str, Sequence[_File]]
"""By class name, its images in order."""


@final
class Folder(ImageSource):
    """Images in class folders, nested or flat, on disk or in zips: `folder:PATH` on the command line.

    A class is a folder that directly holds images; its name is its path below the root (`Greek/character01`). The root is PATH, or in a
    zip the one folder around everything, where there is one. Zips that stand in PATH belong to it; a class that stands twice, with the
    same files, counts once. Files with other suffixes than images have, hidden ones, and folders behind symbolic links are passed over.

    Classes are split by a file {"train": [names], "val": [names], "test": [names]}, where a name takes every class below it; else by
    folders `train`, `val` and `test` at the top; else by `fractions`, in the order of a hash of their names. No seed changes a split.

    Args:
        path: a folder, or a zip.
        ways, shots, queries, seed: as for ImageEpisodes.
        settings: fields of FolderConfig. The defaults suit ink on paper, such as Omniglot: 28 x 28, grey, ink bright on dark.

    Raises:
        RequestError: a setting, file, zip or split is wrong; the file is named. Or as ImageEpisodes raises.
    """

    Config = FolderConfig
    argument = "path"

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
        with ExitStack() as stack:
            classes, split_names = _split(_find(root, stack), root, config)
            images = {
                split: _read_split(classes, names, config) for split, names in split_names.items()
            }
        train = images["train"].images
        mostly_bright = config.mode == "grey" and int(train.sum()) > 127.5 * train.numel()
        self._inverted = mostly_bright if config.invert == "auto" else config.invert
        if self._inverted:
            for split in images.values():
                split.images.bitwise_not_()
        super().__init__(
            images,
            config=config,
            origin=str(root),
            licence="not stated",
            ways=ways,
            shots=shots,
            queries=queries,
            seed=seed,
        )

    def describe(self) -> dict[str, Any]:
        """The data in words and numbers, ready for JSON."""
        return super().describe() | {"inverted": self._inverted}


def _find(root: Path, stack: ExitStack) -> dict[str, list[_File]]:
    """All classes below the root, in order of their names; zips stay open until the stack closes."""
    try:
        return _found(root, stack)
    except (OSError, RecursionError) as error:
        raise RequestError(
            f"cannot read the folder {root}: {reason(error)}; give one that you may read"
        ) from None


def _found(root: Path, stack: ExitStack) -> dict[str, list[_File]]:
    if root.is_dir():
        found = [_group(_files_of(root))]
        zips = sorted(
            path for path in root.iterdir() if path.suffix.lower() == ".zip" and path.is_file()
        )
    elif root.is_file():
        found, zips = [], [root]
    else:
        raise RequestError(
            f"tasks from the folder {root}: there is no such folder or zip; give the path of one"
        )
    found += [_group(_members_of(path, stack)) for path in zips]
    classes: dict[str, list[_File]] = {}
    for group in found:
        for name, files in group.items():
            first = classes.setdefault(name, files)
            if first is not files and _listing(first) != _listing(files):
                raise RequestError(
                    f"the class '{name}' stands twice, with other images: {first[0]} and {files[0]}; rename one, or put its images together"
                )
    if not classes:
        raise RequestError(
            f"tasks from the folder {root}: it holds no images ({', '.join(SUFFIXES)}); give a folder, or a zip, with a folder of images "
            f"for each class"
        )
    if "" in classes:
        raise RequestError(
            f"the image {classes[''][0]} stands in no class folder: move it into the folder of its class"
        )
    return dict(sorted(classes.items()))


def _listing(files: Sequence[_File]) -> list[tuple[str, int, int]]:
    sums = (file.member.CRC if file.member else zlib.crc32(file.read()) for file in files)
    return [
        (PurePosixPath(file.name).name, file.size, crc)
        for file, crc in zip(files, sums, strict=True)
    ]


def _group(files: Iterable[_File]) -> dict[str, list[_File]]:
    classes: dict[str, list[_File]] = {}
    for file in sorted(files, key=lambda file: file.name):
        parent = str(PurePosixPath(file.name).parent)
        classes.setdefault("" if parent == "." else parent, []).append(file)
    return classes


def _is_image(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return name.lower().endswith(SUFFIXES) and not any(
        part.startswith(".") or part == "__MACOSX" for part in parts
    )


def _files_of(root: Path) -> list[_File]:
    paths = (
        Path(folder, name) for folder, _, names in os.walk(root, onerror=_refuse) for name in names
    )
    files = [
        file
        for path in paths
        if _is_image((file := _File(path.relative_to(root).as_posix(), path)).name)
    ]
    for file in files:
        if UNPRINTABLE.search(file.name):
            raise RequestError(
                f"the name of the image {str(file.path)!a} is not UTF-8, or has a line break or the like: rename it"
            )
        if not file.path.is_file():
            raise RequestError(
                f"the image {file} is no file, but a pipe, a device or a link to nothing: remove it"
            )
    return files


def _refuse(error: OSError) -> None:
    raise RequestError(
        f"cannot read the folder {error.filename}: {error.strerror}; give one that you may read"
    ) from None


def _members_of(path: Path, stack: ExitStack) -> list[_File]:
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except Exception as error:  # zipfile fails in many ways
        raise RequestError(
            f"{path} is no readable zip ({reason(error)}): it may be empty or cut short; copy or download it again"
        ) from None
    for member in archive.infolist():
        # Windows' reading of a name is the stricter one: it knows drives, and both slashes.
        name = PureWindowsPath(member.filename)
        if name.anchor or ".." in name.parts or stat.S_ISLNK(member.external_attr >> 16):
            raise RequestError(
                f"{path} is refused, since its member '{one_line(member.filename, 80)}' points outside it: make the zip anew without it"
            )
    images = [member for member in archive.infolist() if _is_image(member.filename)]
    _check(path, images)
    tops = {PurePosixPath(member.filename).parts[0] for member in images}
    wrapping = int(
        len(tops) == 1 and all(len(PurePosixPath(member.filename).parts) > 2 for member in images)
    )
    return [
        _File(
            str(PurePosixPath(*PurePosixPath(member.filename).parts[wrapping:])),
            path,
            archive,
            member,
        )
        for member in images
    ]


def _check(path: Path, images: Sequence[zipfile.ZipInfo]) -> None:
    """That no member takes more to read than its share of the zip, and each has a name of its own."""
    seen: set[str] = set()
    for member in images:
        fault = None
        if UNPRINTABLE.search(member.filename):
            fault = "has a line break or the like in its name"
        elif len(member.filename) > 1000:
            fault = "has more than 1000 characters in its name"
        elif member.filename in seen:
            fault = "stands in it twice"
        elif member.flag_bits & 1:
            fault = "is encrypted"
        elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            fault = (
                "is packed in another way than most zips"  # LZMA takes what memory it is told to
            )
        if fault is not None:
            raise RequestError(
                f"{path} is refused, since its member '{one_line(member.filename, 80)}' {fault}: make the zip anew without that"
            )
        seen.add(member.filename)
    if sum(member.compress_size for member in images) > path.stat().st_size:
        raise RequestError(
            f"{path} is refused, since its members overlap, as a few bytes would unpack to very many: make the zip anew"
        )


def _split(
    classes: Classes, root: Path, config: FolderConfig
) -> tuple[Classes, dict[str, list[str]]]:
    """The classes, and the names of every split's; folders that name a split are no part of a class's name."""
    beside = (root if root.is_dir() else root.parent) / _SPLIT_FILE
    if config.splits or beside.is_file():
        return classes, _read_splits(config.splits or beside, list(classes))
    if {PurePosixPath(name).parts[0] for name in classes} <= set(SPLITS):
        return _split_by_folder(classes)
    return classes, by_fractions(list(classes), config.fractions)


def _split_by_folder(classes: Classes) -> tuple[Classes, dict[str, list[str]]]:
    renamed: dict[str, Sequence[_File]] = {}
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    for whole, files in classes.items():
        split, _, name = whole.partition("/")
        if not name:
            raise RequestError(
                f"the image {files[0]} stands in the folder of the {split} split, but in no class folder: move it into one"
            )
        if name in renamed:
            raise _in_two_splits(
                name, next(other for other in SPLITS if name in names[other]), split
            )
        renamed[name] = files
        names[split].append(name)
    return renamed, names


def _read_splits(path: Path, classes: Sequence[str]) -> dict[str, list[str]]:
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
                raise RequestError(
                    f"the splits {path}, {split}: {unknown('class', one_line(name, 80), [*sorted(above), *classes])}"
                )
            for one in taken:
                if owner.setdefault(one, split) != split:
                    raise _in_two_splits(one, owner[one], split)
    return {split: [name for name in classes if owner.get(name) == split] for split in SPLITS}


def _in_two_splits(name: str, one: str, other: str) -> RequestError:
    return RequestError(
        f"the class '{name}' stands in the {one} and in the {other} split, so it would not be new to the model: keep it in one"
    )


def _read_split(classes: Classes, names: Sequence[str], config: FolderConfig) -> ClassImages:
    files = [file for name in names for file in classes[name]]
    side, channels = config.size or 0, 1 if config.mode == "grey" else 3
    images = np.empty((0, channels, side, side), np.uint8)
    for place, file in enumerate(files):
        pixels = _read_image(file, config)
        if place == 0:
            images = allocate((len(files), *pixels.shape), config.memory_mib)
        if pixels.shape != images.shape[1:]:
            raise RequestError(
                f"the image {file} has {pixels.shape[2]} x {pixels.shape[1]} pixels, the first one {images.shape[3]} x {images.shape[2]}, "
                f"but one model takes one size: set 'size'"
            )
        images[place] = pixels
    above = tuple(str(PurePosixPath(name).parent) for name in names)
    superclasses = None if set(above) <= {"."} else above
    return ClassImages(
        tuple(names),
        torch.from_numpy(images),
        tuple(len(classes[name]) for name in names),
        superclasses=superclasses,
    )


def _read_image(file: _File, config: FolderConfig) -> NDArray[np.uint8]:
    """(channels, height, width)."""
    try:
        data = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise Image.DecompressionBombError
                if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > _MOST_SCANS:
                    raise ValueError(f"it has more than the {_MOST_SCANS} scans that are read")
                pixels = _convert(image, config)
    except RequestError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RequestError(
            f"the image {file} has more than the {_MOST_PIXELS} pixels that are read: make it smaller, or remove it"
        ) from None
    except (
        Exception
    ) as error:  # on broken bytes Pillow raises struct.error, IndexError, KeyError and many more
        words = (
            "no known image format" if isinstance(error, UnidentifiedImageError) else reason(error)
        )
        raise RequestError(
            f"the image {file} cannot be read ({words}): replace it, or remove it"
        ) from None
    return pixels


def _convert(image: Image.Image, config: FolderConfig) -> NDArray[np.uint8]:
    if image.mode[0] in "IF":
        raise ValueError(f"its mode {image.mode} has more than 8 bits a channel")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        # Without its paper, ink on a transparent ground would be black on black.
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("L" if config.mode == "grey" else "RGB")
    if config.size is not None and image.size != (config.size, config.size):
        image = image.resize((config.size, config.size), Image.Resampling.BOX)
    pixels = np.asarray(image)
    return (
        pixels[None] if config.mode == "grey" else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    )
