"""Class folders on disk and in zips: which image files are there, checked before any is opened."""

from __future__ import annotations

import stat
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from metaplug.errors import RequestError, one_line, reason
from metaplug.tasks.images.walking import walk
from metaplug.tasks.reading import UNPRINTABLE, read_regular

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ClassFile:
    """One image file, on disk or in a zip.

    Attributes:
        name: its path below the root, by which the files of a class are sorted.
        path: of the file, or of the zip.
    """

    name: str
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
            Exception: the file cannot be read: whatever zipfile raises, or an OSError.
        """
        size = self.size
        if size > _MOST_BYTES:
            raise RequestError(
                f"the image {self} has {size} bytes, more than the {_MOST_BYTES} that are read: "
                "make it smaller, or remove it"
            )
        if not (self.archive and self.member):
            return read_regular(self.path, _MOST_BYTES)
        with self.archive.open(self.member) as file:
            # read() without a number unpacks all that is there, whatever size is stated.
            data = file.read(size + 1)
        if len(data) != size:
            raise ValueError(f"it has {len(data)} bytes, but the zip states {size}")
        return data


Classes = Mapping[str, Sequence[ClassFile]]
"""By class name, its images in order."""


def find_classes(root: Path, stack: ExitStack) -> Classes:
    """All classes below a folder or in a zip, sorted by name; zips stay open until `stack` closes.

    Raises:
        RequestError: there is none, an image stands in no class, a class stands twice with other
            images, a name cannot be printed, a link leads to nothing or two lead to one folder, or
            a zip is damaged or points outside.
    """
    try:
        classes = _merged(_groups(root, stack))
    except (OSError, RecursionError) as error:
        raise RequestError(
            f"cannot read the folder {root}: {reason(error)}; give one that you may read"
        ) from None
    if not classes:
        raise RequestError(
            f"tasks from the folder {root}: it holds no images ({', '.join(SUFFIXES)}); give a "
            "folder, or a zip, with a folder of images for each class"
        )
    if "" in classes:
        raise RequestError(
            f"the image {classes[''][0]} stands in no class folder: move it into the folder of its "
            "class"
        )
    return dict(sorted(classes.items()))


def _groups(root: Path, stack: ExitStack) -> list[dict[str, list[ClassFile]]]:
    """The classes of the folder itself and of each zip."""
    if root.is_file():
        return [_by_class(_in_zip(root, stack))]
    if not root.is_dir():
        raise RequestError(
            f"tasks from the folder {root}: there is no such folder or zip; give the path of one"
        )
    zips = (path for path in root.iterdir() if path.suffix.lower() == ".zip" and path.is_file())
    files = [_on_disk(root), *(_in_zip(path, stack) for path in sorted(zips))]
    return [_by_class(own) for own in files]


def _merged(groups: Iterable[dict[str, list[ClassFile]]]) -> dict[str, list[ClassFile]]:
    classes: dict[str, list[ClassFile]] = {}
    for group in groups:
        for name, files in group.items():
            first = classes.setdefault(name, files)
            if first is not files and _listing(first) != _listing(files):
                raise RequestError(
                    f"the class '{name}' stands twice, with other images: {first[0]} and "
                    f"{files[0]}; rename one, or put its images together"
                )
    return classes


def _listing(files: Sequence[ClassFile]) -> list[tuple[str, int, int]]:
    """Name, size and checksum of each file."""
    return [
        (
            PurePosixPath(file.name).name,
            file.size,
            file.member.CRC if file.member else zlib.crc32(file.read()),
        )
        for file in files
    ]


def _by_class(files: Iterable[ClassFile]) -> dict[str, list[ClassFile]]:
    classes: dict[str, list[ClassFile]] = {}
    for file in sorted(files, key=lambda file: file.name):
        classes.setdefault(file.name.rpartition("/")[0], []).append(file)
    return classes


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _on_disk(root: Path) -> list[ClassFile]:
    paths = (Path(folder, name) for folder, _, names in walk(root, _refuse) for name in names)
    found = [ClassFile(path.relative_to(root).as_posix(), path) for path in paths]
    files = [file for file in found if _is_image(file.name)]
    for file in found:
        if not (_is_image(file.name) or _is_hidden(file.name) or file.path.exists()):
            raise RequestError(
                f"{str(file.path)!a} is a link to nothing, behind which a class may have stood: "
                "mend it, or remove it"
            )
    for file in files:
        if UNPRINTABLE.search(file.name):
            raise RequestError(
                f"the name of the image {str(file.path)!a} is not UTF-8, or has a line break or "
                "the like: rename it"
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


def _in_zip(path: Path, stack: ExitStack) -> list[ClassFile]:
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except Exception as error:  # zipfile fails in many ways
        raise RequestError(
            f"{path} is no readable zip ({reason(error)}): it may be empty or cut short; copy or "
            "download it again"
        ) from None
    for member in archive.infolist():
        if points_outside(member.filename) or stat.S_ISLNK(member.external_attr >> 16):
            raise RequestError(
                f"{path} is refused, since its member '{one_line(member.filename, 80)}' points "
                "outside it: make the zip anew without it"
            )
    images = [member for member in archive.infolist() if _is_image(member.filename)]
    _check_members(path, images)
    parts = [PurePosixPath(member.filename).parts for member in images]
    # The one folder around everything is no part of a class's name.
    around = len({own[0] for own in parts}) == 1 and all(len(own) > 2 for own in parts)
    return [
        ClassFile("/".join(own[around:]), path, archive, member)
        for own, member in zip(parts, images, strict=True)
    ]


def points_outside(name: str) -> bool:
    """Whether the name of an archive's member leads out of the folder that it is unpacked into."""
    # Windows' reading of a name is the stricter one: it knows drives, and both slashes.
    inside = PureWindowsPath(name)
    return bool(inside.anchor) or ".." in inside.parts


def _check_members(path: Path, images: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse names that are doubtful, and members that take more to read than their share."""
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
            fault = "is packed in another way than most zips"  # LZMA takes what memory it is told
        if fault is not None:
            raise RequestError(
                f"{path} is refused, since its member '{one_line(member.filename, 80)}' {fault}: "
                "make the zip anew without that"
            )
        seen.add(member.filename)
    if sum(member.compress_size for member in images) > path.stat().st_size:
        raise RequestError(
            f"{path} is refused, since its members overlap, as a few bytes would unpack to very "
            "many: make the zip anew"
        )
