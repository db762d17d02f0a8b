"""The data of a torchmeta data set: archives that are fetched, verified, and built into HDF5."""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from metaplug.errors import MetaplugError, RequestError, RunError, said_by
from metaplug.tasks.images.class_files import points_outside
from metaplug.tasks.splits import SPLITS

_MOST_GROWTH = 20
"""How many times its own size an archive may unpack to; those of the data sets stay below 3."""


@dataclass(frozen=True)
class Archive:
    """A file that torchmeta builds a data set from, with the MD5 sum that torchmeta knows.

    `drive` is its name on Google Drive, if it lies there.
    """

    name: str
    md5: str
    url: str
    drive: str | None = None


def open_splits(
    dataset: Any, title: str, root: Path, *, download: bool, transform: Any
) -> Mapping[str, Any]:
    """torchmeta's class data sets of the three splits, built first where they are not there.

    Args:
        dataset: torchmeta's class, such as OmniglotClassDataset.
        title: the data set's name in messages.
        root: the folder with a folder for each data set.
        download: whether archives that are missing are downloaded. Those that are there are used,
            and verified, in either case.
        transform: of an image when it is read.

    Raises:
        RequestError: an archive is missing and is not to be downloaded.
        RunError: a download or a building fails, or an archive is not the right one, would unpack
            to too much, or reaches outside.
    """
    folder = root / dataset.folder
    with naming_damage(title, folder):
        splits = _opened(dataset, root, transform)
    if splits is not None:
        return splits
    try:
        _provide(dataset, title, root, download=download)
    except MetaplugError:
        raise
    except Exception as error:  # whatever torchmeta meets while it builds
        raise RunError(
            f"{title}: building its data in {folder} fails ({said_by(error)}): give it room and "
            "leave to write there, or get its archives again"
        ) from error
    splits = _opened(dataset, root, transform)
    if splits is None:
        raise RunError(
            f"{title}: torchmeta built not all of its data in {folder}: get its archives again"
        )
    return splits


@contextmanager
def naming_damage(title: str, folder: Path) -> Iterator[None]:
    """Turn the error of a damaged file into one line.

    Raises:
        RunError: a file in the folder cannot be read, or lacks a class.
    """
    try:
        yield
    except MetaplugError:
        raise
    except Exception as error:  # h5py, JSON and Pillow fail in many ways on broken bytes
        raise RunError(
            f"{title}: its data in {folder} are damaged ({said_by(error)}): remove the files .hdf5 "
            "and .json there, and they are built anew"
        ) from error


def archives_of(dataset: Any) -> list[Archive]:
    """The archives that a class of torchmeta builds its data from, as its attributes say."""
    given: Mapping[str, Any] = {name: getattr(dataset, name) for name in dir(dataset)}
    if "zips_md5" in given:
        prefix = given["download_url_prefix"]
        return [
            Archive(f"{name}.zip", md5, f"{prefix}/{name}.zip")
            for name, md5 in given["zips_md5"].items()
        ]
    if "download_url" in given:
        return [Archive(f"{given['gz_folder']}.tar.gz", given["gz_md5"], given["download_url"])]
    kind = next(kind for kind in ("gz", "tar", "tgz", "zip") if f"{kind}_md5" in given)
    drive = given["gdrive_id"]
    url = f"https://drive.google.com/uc?id={drive}"
    return [Archive(given[f"{kind}_filename"], given[f"{kind}_md5"], url, drive)]


def check_members(path: Path) -> None:
    """Look into an archive before anything of it is unpacked.

    Raises:
        RunError: it would unpack to more than `_MOST_GROWTH` times its size, or a member is
            neither a file nor a folder inside it.
    """
    most, total = _MOST_GROWTH * path.stat().st_size, 0
    for name, size, plain in _members(path):
        if points_outside(name) or not plain:
            raise RunError(
                f"{path} is refused, since its member '{name}' points outside it, or is no file: "
                "get it again from its authors"
            )
        total += size + 512  # an empty file takes room too
        if total > most:
            raise RunError(
                f"{path} is refused, since it unpacks to more than {_MOST_GROWTH} times its own "
                "size: get it again from its authors"
            )


def _opened(dataset: Any, root: Path, transform: Any) -> dict[str, Any] | None:
    try:
        return {
            split: dataset(str(root), meta_split=split, transform=transform) for split in SPLITS
        }
    except RuntimeError:  # torchmeta's word for files that are not there
        return None


def _provide(dataset: Any, title: str, root: Path, *, download: bool) -> None:
    folder = root / dataset.folder
    wanted = archives_of(dataset)
    missing = [archive for archive in wanted if not (folder / archive.name).is_file()]
    if missing and not download:
        files = " and ".join(f"{archive.name} (from {archive.url})" for archive in missing)
        raise RequestError(
            f"{title}: its data are not in {folder}: set 'download' to true, or put there by hand "
            f"{files}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for archive in missing:
        _fetch(archive, folder)
    for archive in wanted:
        path = folder / archive.name
        if not _torchvision_utils().check_integrity(str(path), archive.md5):
            raise RunError(
                f"{title}: {path} is not the file that torchmeta knows (MD5 {archive.md5}), or is "
                "cut short: remove it and set 'download' to true, or get it again from "
                f"{archive.url}"
            )
        check_members(path)
    _build(dataset, root, wanted)


def _torchvision_utils() -> Any:
    return import_module("torchvision.datasets.utils")


def _fetch(archive: Archive, folder: Path) -> None:
    utils, partial = _torchvision_utils(), folder / f"{archive.name}.partial"
    try:
        where = (str(folder), partial.name, archive.md5)
        if archive.drive is None:
            utils.download_url(archive.url, *where)
        else:
            utils.download_file_from_google_drive(archive.drive, *where)
        partial.replace(folder / archive.name)
    except Exception as error:  # torchvision and gdown fail in many ways
        partial.unlink(missing_ok=True)
        raise RunError(
            f"cannot download {archive.name} from {archive.url} ({said_by(error)}): put it in "
            f"{folder} by hand"
        ) from None


def _members(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Of every member, its name, its unpacked size in bytes, and whether it is a file or folder."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                link = stat.S_ISLNK(member.external_attr >> 16)
                yield member.filename, member.file_size, not link
    else:
        with tarfile.open(path) as tar:
            for entry in tar:
                yield entry.name, entry.size, entry.isfile() or entry.isdir()


def _build(dataset: Any, root: Path, archives: Sequence[Archive]) -> None:
    """Let torchmeta build in a folder beside, and move what it made when it is whole.

    Another process may be at the same work.
    """
    with TemporaryDirectory(prefix=".building-", dir=root) as work:
        inner = Path(work, dataset.folder)
        inner.mkdir()
        for archive in archives:
            _link(root / dataset.folder / archive.name, inner / archive.name)
            if archive.name.endswith(".zip"):
                # torchmeta takes a zip that is there for unpacked (Omniglot), or passes over
                # broken members (MNIST).
                with zipfile.ZipFile(inner / archive.name) as unpacked:
                    unpacked.extractall(inner)
        with warnings.catch_warnings():
            # Python 3.12 and 3.13 ask for a filter of a tar's members, which are checked already.
            warnings.simplefilter("ignore", DeprecationWarning)
            dataset(work, meta_split="train", download=True)
        for path in [path for path in inner.rglob("*") if path.suffix in (".hdf5", ".json")]:
            target = root / dataset.folder / path.relative_to(inner)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
