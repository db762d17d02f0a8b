"""Data files that are broken or meant to do harm are read, or refused in a line that names them.

Nothing is executed, nothing hangs.
"""

import csv
import errno
import io
import json
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import EpsImagePlugin, Image, features
from support.fuzz import amount, fuzz

from metaplug.errors import RequestError
from metaplug.tasks import ClassImages, Folder, Tabular, reading
from metaplug.tasks.glyphs import source as glyphs
from metaplug.tasks.identities import digest
from metaplug.tasks.images import class_files, decoded
from metaplug.tasks.images.class_images import allocate
from metaplug.tasks.images.decoded import DecodedImages, read_decoded, write_decoded
from metaplug.tasks.torchmeta import compatibility

SIZES = {"ways": 2, "shots": 1, "queries": 1}
EVEN = {"fractions": (0.4, 0.3, 0.3)}
CLASSES = ("train/a", "train/b", "val/c", "val/d", "test/e", "test/f")


def picture(number: int = 0, mode: str = "RGB", side: int = 12) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 4), np.uint8)
    return (
        Image.fromarray(pixels, "RGBA").convert(mode)
        if mode != "P"
        else picture(number).quantize(16)
    )


def encoded(kind: str, mode: str = "RGB", number: int = 0, side: int = 12, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture(number, mode, side).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for number, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for image in range(2):
            (root / name / f"{image}.png").write_bytes(encoded("PNG", "L", 10 * number + image))
    return root


PICTURES = {
    "png": [
        *(encoded("PNG", mode) for mode in ("L", "RGB", "RGBA", "P", "1")),
        encoded("PNG", "P", transparency=3),
        encoded("PNG", "L", side=40, icc_profile=bytes(200)),
    ],
    "jpg": [
        encoded("JPEG", "L"),
        encoded("JPEG"),
        encoded("JPEG", side=40, progressive=True),
        encoded("JPEG", "CMYK"),
    ],
    "gif": [
        encoded("GIF", "P"),
        encoded(
            "GIF",
            "P",
            save_all=True,
            append_images=[picture(1, "P"), picture(2, "P")],
            transparency=2,
        ),
    ],
    "bmp": [encoded("BMP", mode) for mode in ("1", "L", "RGB", "RGBA", "P")],
    "tif": [
        encoded("TIFF", mode, side=20, compression=packing)
        for mode, packing in [
            ("L", None),
            ("RGB", "tiff_lzw"),
            ("RGB", "tiff_deflate"),
            ("RGB", "jpeg"),
            ("L", "packbits"),
            ("1", "group4"),
        ]
        if packing is None or features.check("libtiff")
    ],
    "webp": [encoded("WEBP"), encoded("WEBP", "RGBA", lossless=True)]
    if features.check("webp")
    else [],
    "ppm": [encoded("PPM", mode) for mode in ("1", "L", "RGB")]
    + [b"P3 2 2 255 1 2 3 4 5 6 7 8 9 10 11 12\n", b"P2 2 2 15 0 1 2 3\n"],
}


def message_of(make: Callable[[], object]) -> str:
    with pytest.raises(RequestError) as error:
        make()
    message = str(error.value)
    assert "\n" not in message
    return message


# Fuzzed


@pytest.mark.parametrize("suffix", PICTURES)
def test_mutated_images(suffix: str, images: Path, request: pytest.FixtureRequest) -> None:
    if not (seeds := PICTURES[suffix]):
        pytest.skip(f"this Pillow does not read {suffix}")
    path = images / "train" / "a" / f"2.{suffix}"
    load = lambda: Folder(images, **SIZES, mode="colour", size=8)  # noqa: E731
    # libtiff says on standard error what it finds wrong, and Pillow has no way to silence it.
    report = fuzz(load, path, seeds, amount(request, 30, 800), silent=suffix != "tif")
    assert not report.failures, report
    assert report.refused


def test_mutated_splits(images: Path, request: pytest.FixtureRequest) -> None:
    path = images / "splits.json"
    whole = {
        split: [name for name in CLASSES if name.startswith(split)]
        for split in ("train", "val", "test")
    }
    seeds = [json.dumps(given).encode() for given in (whole, {split: [split] for split in whole})]
    says = ["split has", "the class '"]
    report = fuzz(
        lambda: Folder(images, **SIZES, size=8),
        path,
        seeds,
        amount(request, 30, 1200),
        text=True,
        says=says,
    )
    assert not report.failures, report
    assert report.refused


def test_mutated_zips(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    seeds = []
    for packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", packing) as archive:
            for number, name in enumerate(CLASSES):
                for image in range(2):
                    archive.writestr(
                        f"{name}/{image}.png", encoded("PNG", "L", 10 * number + image, 6)
                    )
        seeds.append(buffer.getvalue())
    path = tmp_path / "zips" / "set.zip"
    path.parent.mkdir()
    says = ["split has", "have the same images"]
    report = fuzz(
        lambda: Folder(path, **SIZES, size=6),
        path,
        seeds[:2] * 3 + seeds[2:],
        amount(request, 60, 1500),
        says=says,
    )
    assert not report.failures, report
    assert report.refused


@pytest.mark.parametrize(
    "separator",
    [("comma", ","), ("semicolon", ";"), ("tab", "\t"), ("bar", "|")],
    ids=lambda pair: pair[0],
)
def test_mutated_tables(
    separator: tuple[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name, character = separator
    seeds = []
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        text = io.StringIO()
        writer = csv.writer(text, delimiter=character, quoting=quoting)
        writer.writerows(
            [
                ["task", "x", "target"],
                *([task, number, 1.5 * number] for number in range(4) for task in "abcdef"),
            ]
        )
        seeds.append(text.getvalue().encode())
    path = tmp_path / "tables" / "table.csv"
    path.parent.mkdir()
    load = lambda: Tabular(path, shots=1, queries=1, separator=name, **EVEN)  # noqa: E731
    path.write_bytes(seeds[0])
    load()
    says = ["rows of every task", f"tasks of the table {path}"]
    options = {"says": says, "modules": ["pyarrow"], "mib": 4096}
    report = fuzz(load, path, seeds, amount(request, 30, 600), text=True, **options)
    assert not report.failures, report
    assert report.refused


@pytest.mark.parametrize("name", ["data.hdf5", "vinyals_val_labels.json"])
def test_mutated_data_of_torchmeta(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    try:
        compatibility.apply()
    except RequestError as error:
        pytest.skip(str(error))
    import h5py

    from metaplug.tasks.torchmeta.source import Torchmeta

    folder = tmp_path / "omniglot"
    folder.mkdir()
    generator = np.random.default_rng(0)
    with h5py.File(folder / "data.hdf5", "w") as file:
        for split in ("train", "val", "test"):
            labels = [
                ["images_background", f"{alphabet}_{split}", name]
                for alphabet in "AB"
                for name in ("one", "two")
            ]
            (folder / f"vinyals_{split}_labels.json").write_text(json.dumps(labels))
            for label in labels:
                file.create_dataset(
                    "/".join(label), data=generator.integers(0, 256, (2, 20, 20), np.uint8)
                )
    load = lambda: Torchmeta("omniglot", **SIZES, root=tmp_path, size=10)  # noqa: E731
    load()
    path = folder / name
    report = fuzz(
        load,
        path,
        [path.read_bytes()],
        amount(request, 30, 1000),
        text=path.suffix == ".json",
        says=[str(folder), "split has", "the class '"],
    )
    assert not report.failures, report


def test_mutated_parquet(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = tmp_path / "tables" / "table.parquet"
    path.parent.mkdir()
    seeds = []
    for packing in ("none", "snappy", "gzip", "zstd"):
        names = [name for _ in range(4) for name in "abcdef"]
        columns = {
            "task": names,
            "x": list(range(24)),
            "target": [0.5 * place for place in range(24)],
        }
        pq.write_table(pa.table(columns), path, compression=packing, row_group_size=10)
        seeds.append(path.read_bytes())
    load = lambda: Tabular(path, shots=1, queries=1, **EVEN)  # noqa: E731
    load()
    report = fuzz(
        load,
        path,
        seeds,
        amount(request, 30, 1000),
        says=["rows of every task"],
        modules=["pyarrow"],
        mib=4096,
    )
    assert not report.failures, report
    assert report.refused


def test_mutated_caches_of_letters(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = tmp_path / "cache" / "letters.bin"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 1, 28, 28), np.uint8)
    styles = np.arange(40) % 16
    glyphs._write(path, pixels, styles)

    def load() -> None:
        found = glyphs._read(path, 40)
        if found is None:
            raise RequestError(f"{path}: rendered anew")
        assert (found[0] == pixels).all()
        assert (found[1] == styles).all()

    load()
    report = fuzz(load, path, [path.read_bytes()], amount(request, 30, 600))
    assert not report.failures, report
    assert report.refused


def test_mutated_caches_of_images(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded, "_FEWEST", 1)
    path = tmp_path / "cache" / "images.bin"
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), np.uint8))
    split = ClassImages(("a", "b"), pixels, (30, 10), superclasses=("x", "y"))
    write_decoded(path, DecodedImages({"train": split}, True), most_bytes=2**20, folder_bytes=2**20)

    def load() -> None:
        found = read_decoded(path, 2**20)
        if found is None:
            raise RequestError(f"{path}: decoded anew")
        assert torch.equal(found.splits["train"].images, pixels)
        assert found.splits["train"].digests == split.digests

    load()
    report = fuzz(load, path, [path.read_bytes()], amount(request, 30, 600))
    assert not report.failures, report
    assert report.refused


@pytest.mark.parametrize(
    ("load", "finding"),
    [
        (lambda: os.system("true"), "did what is forbidden: os.system"),
        (
            lambda: Path("/tmp/metaplug-not-owned").write_text("x"),
            "did what is forbidden: open '/tmp/metaplug-not-owned' to write",
        ),
        (lambda: pickle.loads(b"cposix\nsystem\n."), "did what is forbidden: pickle.find_class"),
        (lambda: time.sleep(5), "stopped: out of time"),
        (os.abort, "the process ended with -6"),
        (lambda: bytearray(2**40), "MemoryError"),
        (lambda: os.write(2, b"words"), "said: b'words'"),
        (lambda: {}["x"], "KeyError"),
    ],
)
def test_what_the_harness_finds(load: Callable[[], object], finding: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    report = fuzz(load, tmp_path / "a" / "file", [b"seed"], 2, seconds=0.3)
    assert [finding in failure for failure in report.failures] == [True, True], report


# Folders


@pytest.fixture
def image(images: Path) -> Path:
    """Where a test puts what is no image."""
    return images / "train" / "a" / "2.png"


def refusal(images: Path) -> str:
    return message_of(lambda: Folder(images, **SIZES))


def test_an_eps_by_the_name_of_a_png_is_not_given_to_ghostscript(
    image: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was run")
    )
    image.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n%%EndComments\n(%pipe%id) (r) "
        b"file\n%%EOF\n"
    )
    with Image.open(image) as opened:
        assert opened.format == "EPS"  # what Pillow takes it for by itself
    assert (
        refusal(images)
        == f"the image {image} cannot be read (no known image format): replace it, or remove it"
    )


@pytest.mark.parametrize("kind", ["pipe", "device", "nothing", "loop"])
def test_what_is_no_file_is_refused_unopened(kind: str, image: Path, images: Path) -> None:
    if kind == "pipe":
        os.mkfifo(image)
    else:
        image.symlink_to({"device": "/dev/zero", "nothing": images / "none", "loop": image}[kind])
    assert (
        refusal(images)
        == f"the image {image} is no file, but a pipe, a device or a link to nothing: remove it"
    )


def test_links_that_turn_in_a_circle_are_passed_over(images: Path) -> None:
    (images / "train" / "a" / "again").symlink_to(images)
    assert Folder(images, **SIZES).describe()["splits"]["train"] == {"classes": 2, "images": 4}


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\nb", b"\x1b[2J", "\u202egnp".encode()])
def test_a_name_that_cannot_be_printed_is_refused(name: bytes, images: Path) -> None:
    path = os.path.join(os.fsencode(images), b"train", name)  # noqa: PTH118
    os.mkdir(path)  # noqa: PTH102
    (Path(os.fsdecode(path)) / "0.png").write_bytes(encoded("PNG"))
    assert refusal(images) == (
        f"the name of the image {os.fsdecode(path) + '/0.png'!a} is not UTF-8, or has a line break "
        "or the like: rename it"
    )


def test_a_file_that_changes_vanishes_or_may_not_be_read_is_named(
    image: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image.symlink_to("/proc/self/status")  # which has no size, but content
    assert (
        refusal(images)
        == f"the image {image} cannot be read (it changes while it is read): replace it, or "
        "remove it"
    )
    image.unlink()
    image.write_bytes(encoded("PNG"))
    opened = os.open

    def vanished(path: Any, *rest: Any) -> int:
        if path == image:
            raise OSError(fault, os.strerror(fault))
        return opened(path, *rest)

    monkeypatch.setattr(reading.os, "open", vanished)
    for fault in (errno.ENOENT, errno.EACCES, errno.EIO):
        assert (
            refusal(images)
            == f"the image {image} cannot be read ({os.strerror(fault)}): replace it, or remove it"
        )


def test_a_jpeg_of_many_scans_is_refused(images: Path) -> None:
    path = images / "train" / "a" / "2.jpg"
    path.write_bytes(encoded("JPEG", progressive=True) + b"\xff\xda" * 1000)
    assert (
        refusal(images)
        == f"the image {path} cannot be read (it has more than the 1000 scans that are read): "
        "replace it, or remove it"
    )


def test_no_memory_is_taken_on_the_word_of_an_image(image: Path, images: Path) -> None:
    image.write_bytes(bytes(16))
    with image.open("r+b") as file:
        file.truncate(10 * 2**30)
    assert refusal(images) == (
        f"the image {image} has {10 * 2**30} bytes, more than the {class_files._MOST_BYTES} that "
        "are read: make it smaller, or remove it"
    )


def test_images_beyond_the_disk_are_refused_before_any_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    assert message_of(lambda: allocate((1000, 1, 64, 64), 1)) == (
        "1000 images need 3 MiB, more than memory_mib = 1, and a file of that size in /tmp cannot "
        "be had (No space left on device): "
        "lower 'size', or point TMPDIR to a larger disk"
    )


# Zips


def write_zip(
    path: Path, packing: int = zipfile.ZIP_DEFLATED, content: bytes | None = None
) -> Path:
    with zipfile.ZipFile(path, "w", packing) as archive:
        for number, name in enumerate(CLASSES):
            for image in range(2):
                archive.writestr(
                    f"{name}/{image}.png", content or encoded("PNG", "L", 10 * number + image, 6)
                )
    return path


def patched(path: Path, change: Callable[[bytearray, int], None]) -> Path:
    """The zip with every entry of its directory changed."""
    data = bytearray(path.read_bytes())
    place = data.find(b"PK\x01\x02")
    while place >= 0:
        change(data, place)
        place = data.find(b"PK\x01\x02", place + 4)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_packed_in_another_way_is_refused(packing: int, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", packing)
    assert refusal(path) == (
        f"{path} is refused, since its member 'train/a/0.png' is packed in another way than most "
        "zips: make the zip anew without that"
    )


def test_an_encrypted_member_and_one_that_stands_twice_are_refused(tmp_path: Path) -> None:
    path = patched(
        write_zip(tmp_path / "set.zip"),
        lambda data, place: data.__setitem__(place + 8, data[place + 8] | 1),
    )
    assert (
        refusal(path)
        == f"{path} is refused, since its member 'train/a/0.png' is encrypted: make the zip anew "
        "without that"
    )
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(write_zip(path), "a") as archive,
    ):
        archive.writestr("train/a/0.png", encoded("PNG"))
    assert (
        refusal(path)
        == f"{path} is refused, since its member 'train/a/0.png' stands in it twice: make the zip "
        "anew without that"
    )


def test_members_that_overlap_are_refused(tmp_path: Path) -> None:
    content = encoded("PNG", side=100) + bytes(5000)
    path = write_zip(tmp_path / "set.zip", zipfile.ZIP_STORED, content)
    data = path.read_bytes()
    start, first = data.find(b"PK\x01\x02"), data.find(b"PK\x03\x04", 4)
    # The first member alone, and a directory that points every name to it.
    directory = bytearray(data[start:-22])
    for place in (
        place for place in range(len(directory)) if directory[place : place + 4] == b"PK\x01\x02"
    ):
        directory[place + 42 : place + 46] = bytes(4)
    end = data[-22:-10] + struct.pack("<II", len(directory), first) + b"\0\0"
    path.write_bytes(data[:first] + directory + end)
    assert refusal(path) == (
        f"{path} is refused, since its members overlap, as a few bytes would unpack to very many: "
        "make the zip anew"
    )


def test_a_size_that_lies_is_not_believed(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", content=encoded("PNG") + bytes(2**25))
    patched(
        path,
        lambda data, place: data.__setitem__(slice(place + 24, place + 28), struct.pack("<I", 100)),
    )
    tracemalloc.start()
    message = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        message
        == f"the image {path}/train/a/0.png cannot be read (Bad CRC-32 for file 'train/a/0.png'): "
        "replace it, or remove it"
    )
    assert peak < 2**22


# Splits


FORM = '{"train": [names], "val": [names], "test": [names]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"train": ["a"], "train": ["b"]}',
            f" are not JSON (the key 'train' stands twice): write {FORM}",
        ),
        ('{"train": [NaN]}', f" are not JSON (NaN is no number in JSON): write {FORM}"),
        ('{"train": [[1]]}', f" are not lists of class names by split: write {FORM}"),
        ('{"tr\\u001b[2Jain": []}', ": unknown split 'tr?[2Jain': did you mean 'train'?"),
        ('{"train": ["\\ud800"], "val": [], "test": []}', ", train: unknown class '?': known: "),
        ("[" * 100_000, " are not JSON (maximum recursion depth exceeded"),
        (
            '{"train": [' + "9" * 5000 + "]}",
            " are not JSON (Exceeds the limit (4300 digits) for integer string conversion",
        ),
        (
            '{"train": ["' + "x" * 10**6 + '"], "val": [], "test": []}',
            ", train: unknown class '" + "x" * 80 + "...': known: ",
        ),
    ],
)
def test_hostile_splits_are_refused(content: str, message: str, images: Path) -> None:
    path = images / "splits.json"
    path.write_text(content)
    assert refusal(images).startswith(f"the splits {path}{message}")


def test_splits_that_are_no_file_are_refused_unopened(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert message_of(lambda: Folder(images, **SIZES, splits=path)) == (
        f"cannot read the splits {path}: it is no regular file; give a JSON file {FORM}"
    )


# Tables


def table(path: Path, *lines: str) -> Path:
    path.write_bytes("\n".join(["task,x,target", *lines, ""]).encode())
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "a,1_000,2",
            "row 2, column 'x': '1_000' is not a number; correct it, or leave out that row or "
            "column",
        ),
        (
            "a,\u0663,2",
            "row 2, column 'x': '\u0663' is not a number; correct it, or leave out that row or "
            "column",
        ),
        (
            "a,0x10,2",
            "row 2, column 'x': '0x10' is not a number; correct it, or leave out that row or "
            "column",
        ),
        (
            "a,1\u00a0,2",
            "row 2, column 'x': '1' is not a number; correct it, or leave out that row or column",
        ),
        (
            "a," + "9" * 5000 + ",2",
            f"row 2, column 'x': '{'9' * 80}...' is NaN, Inf or too large for float32; correct it, "
            "or",
        ),
        (
            "a," + "9" * 140_000 + ",2",
            f"row 2, column 'x': '{'9' * 80}...' is NaN, Inf or too large for float32; correct it, "
            "or",
        ),
        (
            "a,1\0,2",
            "row 2, column 'x': '1?' is not a number; correct it, or leave out that row or column",
        ),
        (
            "a\x1b[2J,1,2",
            "row 2, column 'task': 'a?[2J' is no name, as it has more than 200 characters, a line "
            "break or the like: rename it",
        ),
        (
            '"a\nb",1,2',
            "row 2, column 'task': 'a b' is no name, as it has more than 200 characters, a line "
            "break or the like: rename it",
        ),
    ],
)
def test_hostile_lines_are_refused(line: str, message: str, tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", line)
    assert message_of(lambda: Tabular(path)).startswith(f"the table {path}, {message}")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("a," + "," * 2**20, "CSV parse error: Row #2: Expected 3 columns, got 1048578: a,,,,"),
        ("a," + "9" * 2**21 + ",2", "straddling object straddles two block boundaries"),
    ],
)
def test_endless_lines_are_refused(line: str, fault: str, tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", line)
    message = message_of(lambda: Tabular(path))
    assert message.startswith(f"the table {path} is no readable CSV file in UTF-8 ({fault}")
    assert len(message) < 600


def test_usual_numbers_are_read(tmp_path: Path) -> None:
    cells = ["1", "+1", "-1.", ".5", "1e3", "1E-3", " 2 ", "-0"]
    path = table(
        tmp_path / "t.csv", *(f"{task},{cell},{cell}" for task in "abcdef" for cell in cells)
    )
    values = Tabular(path, shots=1, queries=1, **EVEN, standardise=False).val.rows.values
    assert values[: len(cells), 0].tolist() == pytest.approx([1, 1, -1, 0.5, 1000, 0.001, 2, 0])


def test_a_file_beyond_the_memory_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)
    tracemalloc.start()
    message = message_of(lambda: Tabular(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        message
        == f"the table {path} is no readable CSV file in UTF-8 (CSV parse error: Empty CSV file "
        "or block: cannot infer number of columns): correct it there"
    )
    assert peak < 2**24


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_a_table_that_is_no_file_is_refused_unopened(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    {"pipe": os.mkfifo, "folder": Path.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[
        kind
    ](path)
    assert message_of(lambda: Tabular(path)) == (
        f"cannot read the table {path}: it is no regular file; give a CSV or Parquet file that you "
        "may read"
    )


# The same images under two names


def test_a_class_of_two_splits_under_two_names_is_refused(images: Path) -> None:
    for number in range(2):  # in another order
        (images / "test" / "e" / f"{number}.png").write_bytes(
            (images / "train" / "b" / f"{1 - number}.png").read_bytes()
        )
    assert refusal(images) == (
        "the class 'b' of the train split and the class 'e' of the test split have the same "
        "images, so they would not be new to the "
        "model: leave one of them out"
    )
    (images / "test" / "e" / "0.png").write_bytes(encoded("PNG", "L", 99))
    Folder(images, **SIZES)


def test_a_class_that_stands_twice_with_files_of_other_content_is_refused(tmp_path: Path) -> None:
    zips = [write_zip(tmp_path / f"{name}.zip", zipfile.ZIP_STORED) for name in ("one", "two")]
    Folder(tmp_path, **SIZES)
    with zipfile.ZipFile(zips[0]) as first, zipfile.ZipFile(zips[1], "w") as second:
        for member in first.infolist():
            second.writestr(member.filename, bytes(member.file_size))
    assert refusal(tmp_path) == (
        f"the class 'test/e' stands twice, with other images: {zips[0]}/test/e/0.png and "
        f"{zips[1]}/test/e/0.png; rename one, or put its "
        "images together"
    )


def test_digests_are_of_the_images_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 1, 5, 5), dtype=torch.uint8, generator=generator)
    one = ClassImages(("a", "b"), images, (2, 4))
    other = ClassImages(("c", "d"), images[[2, 5, 4, 3, 1, 0]], (4, 2))
    assert one.digests == other.digests[::-1]
    assert one.digests[0] == digest(
        *sorted(digest(image.numpy().tobytes()) for image in images[:2])
    )
    for changed in (
        images.clone().index_fill_(0, torch.tensor([1]), 7),
        images[[0, 0, 2, 3, 4, 5]],
    ):
        assert [
            x == y
            for x, y in zip(
                ClassImages(("a", "b"), changed, (2, 4)).digests, one.digests, strict=True
            )
        ] == [False, True]


# The cache


def test_a_folder_where_the_cache_should_be_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, styles = np.zeros((3, 1, 28, 28), np.uint8), np.zeros(3, np.int64)
    path = tmp_path / "letters.bin"
    path.mkdir()
    glyphs._write(path, pixels, styles)
    assert glyphs._read(path, 3) is None
    assert [path.name for path in tmp_path.iterdir()] == ["letters.bin"]
    path.rmdir()
    os.mkfifo(path)
    assert glyphs._read(path, 3) is None
