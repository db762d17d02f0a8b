"""Decoded images in the cache: read instead of every image, and only where they are still those."""

import io
import logging
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metaplug.errors import RequestError
from metaplug.tasks import Folder
from metaplug.tasks.cache import write_cached
from metaplug.tasks.images import class_images, decoded
from metaplug.tasks.images import folder as folder_source
from metaplug.tasks.images.fingerprint import fingerprint
from metaplug.tasks.splits import SPLITS

CLASSES = ("x/a", "x/b", "y/c", "y/d", "z/e", "z/f")
OPTIONS: dict[str, Any] = {
    "ways": 2,
    "shots": 1,
    "queries": 1,
    "size": 6,
    "fractions": (0.4, 0.3, 0.3),
}


def png(seed: int) -> bytes:
    """An image of 6 x 6 random pixels; all of them take the same number of bytes."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6), np.uint8)
    Image.fromarray(pixels).save(buffer, "png", compress_level=0)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that keeps sets of any size."""
    monkeypatch.setenv("METAPLUG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoded, "_FEWEST", 1)
    return tmp_path / "cache" / "images"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for number, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for image in range(3):
            (root / name / f"{image}.png").write_bytes(png(10 * number + image))
    return root


@pytest.fixture
def zipped(images: Path, tmp_path: Path) -> Path:
    return Path(shutil.make_archive(str(tmp_path / "zips" / "set"), "zip", images)).parent


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that are decoded."""
    names: list[str] = []
    read_image = folder_source.read_image

    def noted(name: object, *rest: Any) -> Any:
        names.append(str(name))
        return read_image(name, *rest)

    monkeypatch.setattr(folder_source, "read_image", noted)
    return names


def same(one: Folder, other: Folder) -> bool:
    classes = [(getattr(one, split).classes, getattr(other, split).classes) for split in SPLITS]
    return one.describe() == other.describe() and all(
        torch.equal(mine.images, its.images)
        and (mine.names, mine.counts, mine.superclasses, mine.digests)
        == (its.names, its.counts, its.superclasses, its.digests)
        for mine, its in classes
    )


# A second start


@pytest.mark.parametrize("kind", ["images", "zipped"])
@pytest.mark.parametrize("invert", ["auto", True])
def test_a_second_start_reads_no_image(
    kind: str, invert: object, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = request.getfixturevalue(kind)
    first = Folder(root, **OPTIONS, invert=invert)
    for name in ("read_image", "find_classes"):
        monkeypatch.setattr(folder_source, name, None)
    monkeypatch.setattr(class_images, "digest", None)
    second = Folder(root, **OPTIONS, invert=invert)
    assert same(first, second)
    assert second.train.identities == first.train.identities
    assert second.train.classes.superclasses is not None
    second.train.classes.images.bitwise_not_()  # which warns where memory is not to be written


def test_every_setting_that_decides_pixels_or_splits_has_its_own(
    images: Path, tmp_path: Path, cache: Path, reads: list[str]
) -> None:
    (tmp_path / "splits.json").write_text('{"train": ["x"], "val": ["y"], "test": ["z"]}')
    settings: list[dict[str, Any]] = [
        {},
        {"size": 4},
        {"size": None},
        {"mode": "colour"},
        {"invert": True},
        {"fractions": (0.3, 0.3, 0.4)},
        {"splits": tmp_path / "splits.json"},
    ]
    first = [Folder(images, **OPTIONS | own) for own in settings]
    assert len(reads) == 18 * len(settings)
    assert len(list(cache.iterdir())) == len(settings)
    others = {"ways": 2, "seed": 1, "memory_mib": 100, "cache_mib": 100, "rotate": True}
    again = [Folder(images, **OPTIONS | own | others) for own in settings]
    assert len(reads) == 18 * len(settings)
    assert all(map(same, first, again))


# Stale


def rewrite(path: Path, content: bytes) -> None:
    """Change the content of a file alone: its size and mtime stay, as a copier may set them."""
    before = path.stat()
    assert before.st_size == len(content)
    time.sleep(0.02)  # ctime counts in steps of some milliseconds
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for image in range(3):
            archive.writestr(f"g/{image}.png", png(80 + image))


def write_class(path: Path) -> Path:
    path.mkdir()
    for image in range(3):
        (path / f"{image}.png").write_bytes(png(90 + image))
    return path


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda root: (root / "x" / "a" / "0.png").write_bytes(png(99)),
    "content alone": lambda root: rewrite(root / "x" / "a" / "0.png", png(99)),
    "one more": lambda root: (root / "x" / "a" / "2.png").write_bytes(png(99)),
    "one less": lambda root: (root / "x" / "a" / "0.png").unlink(),
    "a name": lambda root: (root / "x" / "a" / "0.png").rename(root / "x" / "a" / "9.png"),
    "a class": lambda root: (root / "x" / "a").rename(root / "x" / "h"),
    "a zip": lambda root: write_zip(root / "more.zip"),
    "a link": lambda root: (root / "x" / "far").symlink_to(write_class(root.parent / "elsewhere")),
    "splits": lambda root: (root / "splits.json").write_text(
        '{"train": ["z"], "val": ["y"], "test": ["x"]}'
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_decoded_anew(change: str, images: Path, reads: list[str]) -> None:
    Folder(images, **OPTIONS)
    reads.clear()
    CHANGES[change](images)
    found = Folder(images, **OPTIONS)
    assert reads
    assert same(found, Folder(images, **OPTIONS, cache_mib=0))


def test_a_zip_of_the_same_size_and_times_is_told_by_its_members(
    zipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zipped / "set.zip"
    status = path.stat()
    # As on a file system that does not tell the times.
    monkeypatch.setattr(os, "stat", lambda *args, **options: status)
    first = fingerprint(path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        crc = archive.getinfo("x/a/0.png").CRC.to_bytes(4, "little")
    path.write_bytes(content.replace(crc, bytes(4)))
    assert path.read_bytes() != content
    assert fingerprint(path) != first


def test_files_that_change_while_they_are_read_are_not_kept(
    images: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_file = folder_source.find_classes

    def find_and_change(*arguments: Any) -> Any:
        found = by_file(*arguments)
        CHANGES["content alone"](images)
        return found

    monkeypatch.setattr(folder_source, "find_classes", find_and_change)
    Folder(images, **OPTIONS)
    assert not cache.exists()


# Damaged, bounded, or not to be had


@pytest.mark.parametrize("damage", ["cut", "a pixel", "of others"])
def test_a_damaged_file_is_decoded_anew_and_replaced(
    damage: str,
    images: Path,
    cache: Path,
    reads: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = Folder(images, **OPTIONS)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(whole[:-10])
        case "a pixel":
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        case "of others":
            write_cached(cache / "others.bin", whole[32:], noun="images")
            (cache / "others.bin").replace(path)
    reads.clear()
    with caplog.at_level(logging.INFO, "metaplug"):
        assert same(Folder(images, **OPTIONS), first)
    assert caplog.messages == [f"the cached images in {path} fail their checksum: making them anew"]
    assert len(reads) == 18
    assert path.read_bytes() == whole


def test_a_set_beyond_the_bounds_is_not_kept(
    images: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "metaplug"):
        Folder(images, **OPTIONS, cache_mib=0)
        assert caplog.messages == []
        Folder(images, **OPTIONS | {"size": 400}, cache_mib=1)
        Folder(images, **OPTIONS | {"size": 400}, memory_mib=1)
    assert not cache.exists()
    assert [re.sub(r"have \d+", "have N", message) for message in caplog.messages] == [
        "the images are not cached (they have N bytes, more than the 1048576 that are kept): they "
        "are decoded at every start"
    ] * 2


def test_a_small_set_is_not_kept(
    images: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded, "_FEWEST", 19)
    Folder(images, **OPTIONS)
    assert not cache.exists()


def test_the_longest_unused_set_makes_room(images: Path, cache: Path, reads: list[str]) -> None:
    for age, side in enumerate((125, 126, 127)):  # of 0.27 MiB each
        Folder(images, **OPTIONS | {"size": side}, cache_mib=1)
        (path,) = (path for path in cache.iterdir() if path.stat().st_mtime > time.time() - 500)
        os.utime(path, (time.time() - 1000 * age - 1000,) * 2)
    Folder(images, **OPTIONS | {"size": 127}, cache_mib=1)  # the oldest, but used now
    Folder(images, **OPTIONS | {"size": 128}, cache_mib=1)
    assert sum(path.stat().st_size for path in cache.iterdir()) <= 2**20
    reads.clear()
    for side in (125, 127, 128):
        Folder(images, **OPTIONS | {"size": side}, cache_mib=1)
    assert reads == []
    Folder(images, **OPTIONS | {"size": 126}, cache_mib=1)
    assert len(reads) == 18


def test_a_refused_set_is_not_kept_and_refused_again(images: Path, cache: Path) -> None:
    for image in range(3):
        shutil.copy(images / "x" / "a" / f"{image}.png", images / "z" / "f" / f"{image}.png")
    (images / "splits.json").write_text('{"train": ["x"], "val": ["y"], "test": ["z"]}')
    for _ in range(2):
        with pytest.raises(RequestError) as error:
            Folder(images, **OPTIONS)
        assert str(error.value) == (
            "the class 'x/a' of the train split and the class 'z/f' of the test split have the "
            "same images, so they would not be new to the model: leave one of them out"
        )
    assert not cache.exists()


def test_a_folder_that_cannot_be_written_is_done_without(
    images: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.touch()
    with caplog.at_level(logging.INFO, "metaplug"):
        Folder(images, **OPTIONS)
    assert caplog.messages[1:] == [
        f"the images are not cached ([Errno 20] Not a directory: '{cache}'): they are made at "
        "every start"
    ]


def test_a_cache_that_may_only_be_read_is_read(
    images: Path, cache: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Folder(images, **OPTIONS)
    reads.clear()

    def refuse(*arguments: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    Folder(images, **OPTIONS)
    assert reads == []


def test_without_a_home_folder_nothing_is_kept(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(folder_source, "cache_folder", refuse)
    assert Folder(images, **OPTIONS).input_shape == (1, 6, 6)
