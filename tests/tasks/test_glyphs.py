"""Glyphs: the committed letters, their images, their difficulty, and the cache."""

import json
import logging
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from metaplug.errors import RequestError, RunError
from metaplug.tasks import Glyphs, ImageEpisodes
from metaplug.tasks.cache import write_cached
from metaplug.tasks.glyphs import rendering as glyph_rendering
from metaplug.tasks.glyphs import source as glyphs
from metaplug.tasks.glyphs.rendering import UPRIGHT, draw_letter, load_faces, warp

TABLE = json.loads(glyphs.TABLE_PATH.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that this module fills once."""
    return tmp_path_factory.mktemp("glyphs")


@pytest.fixture(autouse=True)
def _use_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAPLUG_CACHE", str(cache))


@pytest.fixture
def _small_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five letters a split and an empty cache of its own, where a test renders more than once."""
    small = json.loads(json.dumps(TABLE))
    small["plain"] = {
        "train": {"ffff": "abdeg"},
        "val": {"ffff": "αβδζθ"},
        "test": {"0fff": "ԱԲԳԴԵ"},
    }
    small["pixels"]["plain"] = "a93ce6327545a18cc3d74fc61539ba171d2633dfe385531e66ca533dd5313032"
    path = tmp_path / "table.json"
    path.write_text(json.dumps(small), encoding="utf-8")
    monkeypatch.setattr(glyphs, "TABLE_PATH", path)
    monkeypatch.setenv("METAPLUG_CACHE", str(tmp_path / "cache"))


def images(source: Glyphs) -> list[torch.Tensor]:
    return [stream.classes.images for stream in (source.train, source.val, source.test)]


def nearest_neighbour_accuracy(stream: ImageEpisodes, num_tasks: int) -> float:
    batch = stream.batch(0, range(num_tasks))
    nearest = torch.cdist(batch.query_x.flatten(2), batch.support_x.flatten(2)).argmin(-1)
    return float((batch.support_y.gather(1, nearest) == batch.query_y).float().mean())


def test_the_data_set_is_described() -> None:
    assert Glyphs(ways=3).describe() == {
        "kind": "classification",
        "input_shape": [1, 28, 28],
        "outputs": 3,
        "origin": "letters from matplotlib's DejaVu and STIX fonts",
        "licence": "fonts: Bitstream Vera licence (DejaVu), SIL Open Font License 1.1 (STIX)",
        "splits": {
            "train": {"classes": 326, "images": 6520},
            "val": {"classes": 72, "images": 1440},
            "test": {"classes": 172, "images": 3440},
        },
    }


def test_every_split_has_its_own_scripts() -> None:
    source = Glyphs()
    scripts = [
        {name.split(" ")[0] for name in stream.classes.names}
        for stream in (source.train, source.val, source.test)
    ]
    assert scripts == [{"LATIN", "CYRILLIC"}, {"GREEK", "LAO"}, {"GEORGIAN", "ARMENIAN"}]


def test_plain_letters_are_the_same_with_accented_ones() -> None:
    letters = {
        group: {
            letter for split in TABLE[group].values() for part in split.values() for letter in part
        }
        for group in glyphs.GROUPS
    }
    assert (len(letters["plain"]), len(letters["accented"])) == (570, 299)
    assert all(unicodedata.normalize("NFKD", letter) == letter for letter in letters["plain"])
    assert not any(
        unicodedata.normalize("NFKD", letter) == letter for letter in letters["accented"]
    )


def test_every_image_has_ink_and_a_margin() -> None:
    for part in images(Glyphs()):
        assert int(part.flatten(1).amax(1).min()) > 200
        border = torch.cat([part[..., 0, :], part[..., -1, :], part[..., 0], part[..., -1]], -1)
        assert float((border > 0).any(-1).float().mean()) < 0.05


def test_every_class_has_all_its_faces() -> None:
    classes = Glyphs().test.classes
    faces = classes.styles.reshape(len(classes.names), 20)
    owned = glyphs.letters_of(TABLE["plain"]["test"])
    for row, letter in enumerate(owned):
        assert classes.names[row] == unicodedata.name(letter)
        found, counts = np.unique(faces[row], return_counts=True)
        assert list(found) == owned[letter]
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("ways", "accuracy"), [(5, 0.64), (20, 0.41)])
def test_pixels_alone_do_not_solve_the_test_tasks(ways: int, accuracy: float) -> None:
    assert nearest_neighbour_accuracy(Glyphs(ways=ways).test, 300) == pytest.approx(
        accuracy, abs=0.04
    )


def test_support_and_query_come_from_different_faces() -> None:
    stream = Glyphs().train
    choice = stream.chooser.choose(0, range(100))
    support, query = (
        stream.classes.styles[part.places].reshape(100, 5, -1)
        for part in (choice.support, choice.query)
    )
    assert not (support == query).any()


def test_ink_is_bright() -> None:
    batch = Glyphs().train.batch(0, range(8))
    assert (float(batch.support_x.min()), float(batch.support_x.max())) == (0, 1)
    assert 0.05 < float(batch.query_x.mean()) < 0.3


def test_an_unchanged_letter_is_scaled_to_its_place() -> None:
    ink = np.full((40, 20), 255, np.uint8)
    image = warp(ink, UPRIGHT)
    # 21 of 28 pixels high, half as wide, in the middle; half pixels are half bright.
    assert np.flatnonzero(image.max(1)).tolist() == list(range(3, 25))
    assert np.flatnonzero(image.max(0)).tolist() == list(range(8, 20))
    assert int(image.astype(int).sum()) == pytest.approx(255 * 21 * 10.5, rel=0.02)


def test_a_shift_shifts() -> None:
    ink = draw_letter("R", load_faces(TABLE["fonts"])[0])
    assert (warp(ink, (0, 0, 0, 0, 6, -6))[:-1, 1:] == warp(ink, UPRIGHT)[1:, :-1]).all()


@pytest.mark.usefixtures("_small_table")
def test_a_second_start_reads_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    first = images(Glyphs())
    monkeypatch.setattr(glyphs, "render_classes", None)
    assert all(torch.equal(one, other) for one, other in zip(images(Glyphs()), first, strict=True))
    assert [path.suffix for path in glyphs.cache_folder().iterdir()] == [".bin"]


@pytest.mark.usefixtures("_small_table")
@pytest.mark.parametrize("damage", ["cut", "emptied", "exchanged", "longer", "not packed"])
def test_a_damaged_cache_is_rendered_anew(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    first = images(Glyphs())
    (path,) = glyphs.cache_folder().iterdir()
    whole = path.read_bytes()
    content = zlib.decompress(whole[32:])
    match damage:
        case "cut":
            path.write_bytes(whole[:-100])
        case "emptied":
            path.write_bytes(b"")
        case "exchanged":
            path.write_bytes(whole[:32] + zlib.compress(content[::-1]))
        case "longer":  # by all the memory that there is, were it unpacked
            write_cached(path, zlib.compress(content + bytes(2**26)), noun="letters")
        case "not packed":
            write_cached(path, content[:100], noun="letters")
    with caplog.at_level(logging.INFO, "metaplug"):
        again = images(Glyphs())
    assert all(torch.equal(one, other) for one, other in zip(again, first, strict=True))
    assert [record.message.endswith("making them anew") for record in caplog.records] == [True]
    caplog.clear()
    with caplog.at_level(logging.INFO, "metaplug"):
        Glyphs()
    assert caplog.records == []


@pytest.mark.usefixtures("_small_table")
def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("METAPLUG_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.INFO, "metaplug"):
        assert len(images(Glyphs())[0]) == 100
    assert caplog.records[-1].message.endswith("they are made at every start")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAPLUG_CACHE", "/chosen")
    assert glyphs.cache_folder() == Path("/chosen")
    monkeypatch.delenv("METAPLUG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert glyphs.cache_folder() == Path("/xdg/metaplug")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert glyphs.cache_folder() == Path.home() / ".cache" / "metaplug"


@pytest.mark.usefixtures("_small_table")
def test_other_pixels_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyph_rendering, "_SHIFT", 5)
    with pytest.warns(
        UserWarning, match="^the plain letters differ in some pixels from the tested ones"
    ):
        Glyphs()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "is missing"), (b"another", "is not the file that the data set was made with")],
)
@pytest.mark.usefixtures("_small_table")
def test_other_fonts_are_an_error(
    content: bytes | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "DejaVuSans.ttf"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(glyph_rendering, "font_folder", lambda: tmp_path)
    with pytest.raises(RunError) as error:
        Glyphs()
    assert str(error.value).startswith(
        f"glyphs are drawn with matplotlib's fonts, but {path} {reason}: install matplotlib"
    )


def test_more_ways_than_letters_are_refused() -> None:
    with pytest.raises(RequestError) as error:
        Glyphs(ways=100)
    assert (
        str(error.value)
        == "100-way tasks need 100 classes, but the val split has 72: lower ways, or give that "
        "split more classes"
    )


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(RequestError) as error:
        Glyphs(accent=True)
    assert str(error.value) == "glyphs: unknown field 'accent': did you mean 'accents'?"


@pytest.mark.slow
def test_accented_letters_come_on_top() -> None:
    plain, all_letters = Glyphs(), Glyphs(accents=True)
    sizes = {split: part["classes"] for split, part in all_letters.describe()["splits"].items()}
    assert sizes == {"train": 547, "val": 149, "test": 173}
    assert set(plain.train.classes.names) < set(all_letters.train.classes.names)


@pytest.mark.slow
def test_the_table_is_what_its_script_selects() -> None:
    from support.select_glyphs import select

    assert select() == TABLE
