"""Folder: any layout of class folders and zips, its splits, and a clear line for every fault."""

import io
import json
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metaplug.errors import RequestError
from metaplug.tasks import Folder
from metaplug.tasks.images import class_files

OMNIGLOT = Path(__file__).parents[3] / "shared" / "data" / "omniglot"
SIZES = {"ways": 2, "shots": 1, "queries": 1}


@pytest.fixture(autouse=True)
def _no_earlier_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METAPLUG_CACHE", str(tmp_path_factory.mktemp("cache")))


def png(value: int = 200, size: tuple[int, int] = (6, 6), mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def write(root: Path, classes: str | list[str], images: int = 2) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for image in range(images):
            (root / name / f"{image}.png").write_bytes(png(10 * number + image))
    return root


def write_zip(path: Path, names: list[str], content: Callable[[int], bytes] = png) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(name, content(number))
    return path


def names(source: Folder) -> list[list[str]]:
    return [list(stream.classes.names) for stream in (source.train, source.val, source.test)]


def message_of(make: Callable[[], object]) -> str:
    with pytest.raises(RequestError) as error:
        make()
    message = str(error.value)
    assert "\n" not in message
    return message


# Layouts


def test_a_flat_folder_is_split_by_fractions_whatever_the_seed(tmp_path: Path) -> None:
    write(tmp_path, "abcdefghij")
    source = Folder(tmp_path, **SIZES, fractions=(0.6, 0.2, 0.2))
    assert [len(part) for part in names(source)] == [6, 2, 2]
    assert sorted(chain.from_iterable(names(source))) == list("abcdefghij")
    assert names(Folder(tmp_path, **SIZES, fractions=(0.6, 0.2, 0.2), seed=5)) == names(source)


def test_pixels_arrive_as_they_are(tmp_path: Path) -> None:
    write(tmp_path, ["train/a", "train/b", "val/c", "val/d", "test/e", "test/f"])
    source = Folder(tmp_path, **SIZES, invert=False)
    assert names(source) == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert source.test.classes.images.shape == (4, 1, 28, 28)
    # Classes are numbered in the order given: e is 4 and f is 5.
    assert source.test.classes.images[:, 0, 0, 0].tolist() == [40, 41, 50, 51]
    assert source.describe()["inverted"] is False


def test_nested_classes_have_their_path_as_name(tmp_path: Path) -> None:
    write(tmp_path, ["train/x/a", "train/y/a", "val/z/a", "val/z/b", "test/z/c", "test/z/d"])
    assert names(Folder(tmp_path, **SIZES)) == [["x/a", "y/a"], ["z/a", "z/b"], ["z/c", "z/d"]]


def test_hidden_and_other_files_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, ["train/a", "train/b", "val/c", "val/d", "test/e", "test/f"])
    (tmp_path / "train" / "a" / "._0.png").write_bytes(b"no image")
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "README.md").write_text("no image")
    write(tmp_path / "__MACOSX", "a")
    assert names(Folder(tmp_path, **SIZES))[0] == ["a", "b"]


def test_links_to_folders_elsewhere_are_followed(tmp_path: Path) -> None:
    pool = write(tmp_path / "pool", ["a", "b", "cc/c", "cc/d", "e", "f"])
    (pool / "cc" / "back").symlink_to(tmp_path)  # around the root
    (pool / "cc" / ".hidden").symlink_to(pool / "a")
    root = tmp_path / "root"
    for split, linked in {"train": "ab", "test": "ef"}.items():
        (root / split).mkdir(parents=True)
        for name in linked:
            (root / split / name).symlink_to(pool / name)
    (root / "val").symlink_to(Path("../pool/cc"))
    (root / "train" / "again").symlink_to("../test")
    (root / "train" / "circle").symlink_to(root)
    (tmp_path / "link").symlink_to(root)
    for path in (root, tmp_path / "link"):
        source = Folder(path, **SIZES, invert=False)
        assert names(source) == [["a", "b"], ["c", "d"], ["e", "f"]]
        assert source.test.classes.images[:, 0, 0, 0].tolist() == [40, 41, 50, 51]


def test_two_links_to_one_folder_are_refused(tmp_path: Path) -> None:
    pool = write(tmp_path / "pool", ["a", "b"])
    root = write(tmp_path / "root", "cdefgh")
    for name in ("first", "second"):
        (root / name).symlink_to(pool)
    text = message_of(lambda: Folder(root, **SIZES))
    first, second = sorted((f"{root}/first", f"{root}/second"), key=text.find)
    assert text == (
        f"the folders {first} and {second} are one by links, whose images would count twice: "
        "remove a link"
    )
    (root / "second").unlink()
    (pool / "a" / "deeper").symlink_to(tmp_path / "other")
    (write(tmp_path / "other", "x") / "back").symlink_to(pool / "a")
    assert "are one by links" in message_of(lambda: Folder(root, **SIZES))


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    write(tmp_path, "abcdefghij")
    (tmp_path / ".hidden").symlink_to(tmp_path / "none")
    Folder(tmp_path, **SIZES, fractions=(0.6, 0.2, 0.2))
    (tmp_path / "unmounted").symlink_to(tmp_path / "none")
    assert message_of(lambda: Folder(tmp_path, **SIZES)) == (
        f"'{tmp_path / 'unmounted'}' is a link to nothing, behind which a class may have stood: "
        "mend it, or remove it"
    )


def test_the_root_of_a_zip_is_the_folder_around_everything(tmp_path: Path) -> None:
    members = [
        f"set/{split}/{split}{letter}/{i}.png"
        for split in ("train", "val", "test")
        for letter in "ab"
        for i in range(2)
    ]
    source = Folder(write_zip(tmp_path / "set.zip", members), **SIZES)
    assert names(source) == [["traina", "trainb"], ["vala", "valb"], ["testa", "testb"]]


def test_a_zip_reads_like_the_folder_it_was_made_of(tmp_path: Path) -> None:
    write(tmp_path / "data", "abcdef")
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "data")
    share = (0.4, 0.3, 0.3)
    one, other = (
        Folder(tmp_path / name, **SIZES, fractions=share) for name in ("data", "packed.zip")
    )
    assert names(one) == names(other)
    assert torch.equal(one.train.classes.images, other.train.classes.images)


def test_several_zips_are_one_set_and_a_class_twice_counts_once(tmp_path: Path) -> None:
    write_zip(
        tmp_path / "one.zip",
        [f"one/{c}/{i}.png" for c in "abcd" for i in range(2)],
        lambda number: png(1 + number),
    )
    write_zip(
        tmp_path / "two.zip",
        [f"two/{c}/{i}.png" for c in "cdef" for i in range(2)],
        lambda number: png(5 + number),
    )
    source = Folder(tmp_path, **SIZES, fractions=(0.4, 0.3, 0.3))
    assert sorted(chain.from_iterable(names(source))) == list("abcdef")
    assert source.describe()["splits"]["train"] == {"classes": 2, "images": 4}


def test_a_class_twice_with_other_images_is_refused(tmp_path: Path) -> None:
    write_zip(tmp_path / "Greek.zip", [f"Greek/{c}/greek{i}.png" for c in "ab" for i in range(2)])
    write_zip(tmp_path / "Latin.zip", [f"Latin/{c}/latin{i}.png" for c in "ab" for i in range(2)])
    assert message_of(lambda: Folder(tmp_path, **SIZES)) == (
        f"the class 'a' stands twice, with other images: {tmp_path}/Greek.zip/Greek/a/greek0.png "
        "and "
        f"{tmp_path}/Latin.zip/Latin/a/latin0.png; rename one, or put its images together"
    )


# Splits


def test_a_name_in_the_splits_takes_all_below_it(tmp_path: Path) -> None:
    write(tmp_path, ["x/a", "x/b", "xy/c", "xy/d", "z/e", "z/f", "w/g"])
    (tmp_path / "splits.json").write_text(
        '{"train": ["x"], "val": ["xy/c", "xy/d"], "test": ["z"]}'
    )
    assert names(Folder(tmp_path, **SIZES)) == [["x/a", "x/b"], ["xy/c", "xy/d"], ["z/e", "z/f"]]


def test_splits_may_stand_beside_a_zip_or_be_named(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", [f"{c}/{i}.png" for c in "abcdef" for i in range(2)])
    (tmp_path / "splits.json").write_text(
        '{"train": ["a", "b"], "val": ["c", "d"], "test": ["e", "f"]}'
    )
    (tmp_path / "other.json").write_text(
        '{"train": ["e", "f"], "val": ["c", "d"], "test": ["a", "b"]}'
    )
    assert names(Folder(path, **SIZES)) == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert names(Folder(path, **SIZES, splits=tmp_path / "other.json")) == [
        ["e", "f"],
        ["c", "d"],
        ["a", "b"],
    ]


FORM = '{"train": [names], "val": [names], "test": [names]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"train": ["a", "lather"], "val": ["b"], "test": ["c"]}',
            ", train: unknown class 'lather': did you mean 'leather'?",
        ),
        (
            '{"train": ["a", "b"], "val": ["a"], "test": ["c"]}',
            "the class 'a' stands in the train and in the val split, so it would not be new to the "
            "model: keep it in one",
        ),
        (
            '{"train": ["a"], "valid": ["b"], "test": ["c"]}',
            ": unknown split 'valid': did you mean 'val'?",
        ),
        ('{"train": ["a"], "test": ["c"]}', f" do not name 'val': write {FORM}"),
        ('{"train": "a"}', f" are not lists of class names by split: write {FORM}"),
        ("[1]", f" are not lists of class names by split: write {FORM}"),
        (
            "{",
            " are not JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
            f"(char 1)): write {FORM}",
        ),
    ],
)
def test_wrong_splits_are_refused(content: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, ["a", "b", "c", "leather"])
    path = tmp_path / "splits.json"
    path.write_text(content)
    expected = message if message.startswith("the class") else f"the splits {path}{message}"
    assert message_of(lambda: Folder(tmp_path, **SIZES)) == expected


def test_splits_that_are_not_there_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "abc")
    path = tmp_path / "none.json"
    assert message_of(lambda: Folder(tmp_path, **SIZES, splits=path)) == (
        f"cannot read the splits {path}: No such file or directory; give a JSON file {FORM}"
    )


def test_classes_whose_names_look_alike_are_refused(tmp_path: Path) -> None:
    write(tmp_path, ["train/\u00e9", "val/c", "test/e\u0301"])
    assert message_of(lambda: Folder(tmp_path, **SIZES)) == (
        f"the test split of the images in {tmp_path}: the class 'e\\u0301' looks as '\\xe9' does, "
        "and would be another one: write both alike"
    )


def test_a_class_in_two_split_folders_is_refused(tmp_path: Path) -> None:
    write(tmp_path, ["train/a", "train/b", "val/c", "val/a", "test/e"])
    assert message_of(lambda: Folder(tmp_path, **SIZES)) == (
        "the class 'a' stands in the train and in the val split, so it would not be new to the "
        "model: keep it in one"
    )


def test_fractions_must_be_whole(tmp_path: Path) -> None:
    assert message_of(lambda: Folder(tmp_path, **SIZES, fractions=(0.6, 0.3, 0.2))) == (
        "folder: fractions = (0.6, 0.3, 0.2): they must be at least 0 and sum to 1"
    )


def test_too_few_classes_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "abc")
    assert message_of(lambda: Folder(tmp_path, **SIZES)) == (
        "2-way tasks need 2 classes, but the val split has 0: lower ways, or give that split more "
        "classes"
    )


# Pixels


@pytest.fixture
def split_folder(tmp_path: Path) -> Path:
    return write(tmp_path, ["train/a", "train/b", "val/c", "val/d", "test/e", "test/f"])


def test_paper_becomes_dark_and_ink_bright(tmp_path: Path) -> None:
    for number, name in enumerate(("train/a", "train/b", "val/c", "val/d", "test/e", "test/f")):
        (tmp_path / name).mkdir(parents=True)
        page = Image.new("1", (105, 105), 1)
        page.paste(0, (40, 0, 60, 105))
        page.putpixel((2 * number, 0), 0)  # classes of two splits may not have the same images
        for image in range(2):
            page.save(tmp_path / name / f"{image}.png")
    source = Folder(tmp_path, **SIZES)
    assert source.describe()["inverted"] is True
    row = source.train.batch(0, [0]).support_x[0, 0, 0, 14]
    assert (float(row.max()), float(row[0]), float(row[-1])) == (1, 0, 0)
    assert float(row.mean()) == pytest.approx(20 / 105, abs=0.01)
    assert Folder(tmp_path, **SIZES, invert=False).describe()["inverted"] is False


def test_a_class_is_known_by_its_images_before_they_are_inverted(split_folder: Path) -> None:
    one, other = (Folder(split_folder, **SIZES, invert=invert) for invert in (False, True))
    assert one.test.identities == other.test.identities
    assert torch.equal(one.test.classes.images, 255 - other.test.classes.images)


def test_colour_has_three_channels_and_stays(split_folder: Path) -> None:
    (split_folder / "train" / "a" / "0.png").write_bytes(png(250, mode="RGB"))
    source = Folder(split_folder, **SIZES, mode="colour", size=4)
    assert source.input_shape == (3, 4, 4)
    assert source.train.classes.images[0, :, 0, 0].tolist() == [250, 0, 0]
    assert source.describe()["inverted"] is False


def test_a_transparent_ground_is_paper(split_folder: Path) -> None:
    Image.new("RGBA", (6, 6), (0, 0, 0, 0)).save(split_folder / "train" / "a" / "0.png")
    assert Folder(split_folder, **SIZES, invert=False).train.classes.images[
        0
    ].unique().tolist() == [255]


def test_images_keep_their_size_where_asked(split_folder: Path) -> None:
    assert Folder(split_folder, **SIZES, size=None).input_shape == (1, 6, 6)
    path = split_folder / "train" / "b" / "1.png"
    path.write_bytes(png(size=(7, 6)))
    assert message_of(lambda: Folder(split_folder, **SIZES, size=None)) == (
        f"the image {path} has 7 x 6 pixels, the first one 6 x 6, but one model takes one size: "
        "set 'size'"
    )


# What is broken or hostile


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none"
    assert message_of(lambda: Folder(path, **SIZES)) == (
        f"tasks from the folder {path}: there is no such folder or zip; give the path of one"
    )


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    assert message_of(lambda: Folder(tmp_path, **SIZES)) == (
        f"tasks from the folder {tmp_path}: it holds no images (.bmp, .gif, .jpeg, .jpg, .pgm, "
        ".png, .ppm, .tif, .tiff, .webp); "
        "give a folder, or a zip, with a folder of images for each class"
    )


def test_an_image_outside_all_classes_is_named(tmp_path: Path) -> None:
    write(tmp_path, "abc")
    (tmp_path / "cover.png").write_bytes(png())
    assert message_of(lambda: Folder(tmp_path, **SIZES)) == (
        f"the image {tmp_path}/cover.png stands in no class folder: move it into the folder of its "
        "class"
    )


def test_an_image_beside_the_classes_of_a_split_is_named(split_folder: Path) -> None:
    (split_folder / "val" / "cover.png").write_bytes(png())
    assert message_of(lambda: Folder(split_folder, **SIZES)) == (
        f"the image {split_folder}/val/cover.png stands in the folder of the val split, but in no "
        "class folder: move it into one"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no known image format"),
        (b"no image", "no known image format"),
        (png(size=(60, 60))[:-40], ""),
    ],
)
def test_an_unreadable_image_is_named(content: bytes, reason: str, split_folder: Path) -> None:
    path = split_folder / "val" / "d" / "1.png"
    path.write_bytes(content)
    message = message_of(lambda: Folder(split_folder, **SIZES))
    assert message.startswith(f"the image {path} cannot be read ({reason}")
    assert message.endswith("): replace it, or remove it")


def test_an_unreadable_image_in_a_zip_is_named(tmp_path: Path) -> None:
    members = [f"{c}/{i}.png" for c in "abcdef" for i in range(2)]
    path = write_zip(
        tmp_path / "set.zip",
        members,
        lambda number: b"no image" if members[number] == "d/1.png" else png(),
    )
    assert message_of(lambda: Folder(path, **SIZES, fractions=(0.4, 0.3, 0.3))) == (
        f"the image {path}/d/1.png cannot be read (no known image format): replace it, or remove it"
    )


def test_an_image_of_more_than_8_bits_is_named(split_folder: Path) -> None:
    path = split_folder / "val" / "d" / "1.png"
    Image.fromarray(np.full((6, 6), 40_000, np.uint16)).save(path)
    assert message_of(lambda: Folder(split_folder, **SIZES)) == (
        f"the image {path} cannot be read (its mode I;16 has more than 8 bits a channel): replace "
        "it, or remove it"
    )


def test_an_image_of_too_many_pixels_is_refused_unread(split_folder: Path) -> None:
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    path = split_folder / "test" / "e" / "0.png"
    path.write_bytes(content)
    assert message_of(lambda: Folder(split_folder, **SIZES)) == (
        f"the image {path} has more than the 50000000 pixels that are read: make it smaller, or "
        "remove it"
    )


def test_a_member_of_too_many_bytes_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_files, "_MOST_BYTES", 1000)
    members = [f"{c}/{i}.png" for c in "abcdef" for i in range(2)]
    path = write_zip(
        tmp_path / "set.zip",
        members,
        lambda number: bytes(1001) if members[number] == "d/1.png" else png(),
    )
    assert message_of(lambda: Folder(path, **SIZES, fractions=(0.4, 0.3, 0.3))) == (
        f"the image {path}/d/1.png has 1001 bytes, more than the 1000 that are read: make it "
        "smaller, or remove it"
    )


@pytest.mark.parametrize("keep", [0, 100, -30])
def test_an_empty_or_truncated_zip_is_named(keep: int, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", [f"{c}/{i}.png" for c in "abc" for i in range(2)])
    path.write_bytes(path.read_bytes()[:keep])
    assert message_of(lambda: Folder(path, **SIZES)) == (
        f"{path} is no readable zip (File is not a zip file): it may be empty or cut short; copy "
        "or download it again"
    )


@pytest.mark.parametrize(
    "member", ["../out.png", "a/../../out.png", "/etc/out.png", "C:/out.png", "a\\..\\out.png"]
)
def test_a_zip_that_points_outside_is_refused(member: str, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", ["a/0.png", member])
    assert message_of(lambda: Folder(path, **SIZES)) == (
        f"{path} is refused, since its member '{member}' points outside it: make the zip anew "
        "without it"
    )


def test_a_zip_with_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("a/0.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert message_of(lambda: Folder(tmp_path / "set.zip", **SIZES)) == (
        f"{tmp_path}/set.zip is refused, since its member 'a/0.png' points outside it: make the "
        "zip anew without it"
    )


def test_a_damaged_member_is_named(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", [f"{c}/{i}.png" for c in "abcdef" for i in range(2)])
    content = path.read_bytes()
    place = content.index(b"IDAT")
    path.write_bytes(content[:place] + b"XXXX" + content[place + 4 :])
    assert message_of(lambda: Folder(path, **SIZES, fractions=(0.4, 0.3, 0.3))) == (
        f"the image {path}/a/0.png cannot be read (Bad CRC-32 for file 'a/0.png'): replace it, or "
        "remove it"
    )


def test_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    assert (
        message_of(lambda: Folder(tmp_path, **SIZES, sise=28))
        == "folder: unknown field 'sise': did you mean 'size'?"
    )


# Real data


@pytest.mark.skipif(
    not OMNIGLOT.is_dir(), reason="the Omniglot images are not at ../shared/data/omniglot"
)
def test_omniglot_reads_without_options() -> None:
    source = Folder(OMNIGLOT)
    assert source.describe()["splits"] == {
        "train": {"classes": 161, "images": 3220},
        "val": {"classes": 42, "images": 840},
        "test": {"classes": 39, "images": 780},
    }
    splits = json.loads((OMNIGLOT / "splits.json").read_text())
    for stream in (source.train, source.val, source.test):
        assert {name.split("/")[0] for name in stream.classes.names} == set(splits[stream.split])
    assert source.describe()["inverted"] is True
    batch = source.train.batch(0, range(8))
    # Thin bright strokes on a dark ground.
    assert 0.03 < float(batch.support_x.mean()) < 0.15
    assert float(batch.support_x.max()) == 1
