"""The page of results has the tables and pictures that its kept runs give."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

STUDIES = Path(__file__).parent.parent / "docs" / "studies"
STUDY = "omniglot_5way"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(STUDIES)
    return importlib.import_module("tables")


def test_tables_and_pictures_are_those_of_the_kept_runs(tables: ModuleType) -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    marked = {(study, kind) for _, study, kind, _ in tables.MARKED.findall(page)}
    kinds = {*tables.KINDS, *tables.PICTURES, "runs"}
    names = {path.stem for path in STUDIES.glob("*.jsonl")}
    assert marked >= {(name, kind) for name in names for kind in kinds}
    assert tables.differing(page) == []


def test_what_differs_is_named(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = f"# Mine\n<!-- table {STUDY} tuned -->\nold\n<!-- end -->\n"
    assert tables.differing(page) == [f"table {STUDY} tuned"]
    assert tables.differing(tables.filled(page)) == []
    monkeypatch.setattr(tables, "IMAGES", tmp_path)
    page = tables.filled(f"<!-- table {STUDY} rates -->\n<!-- end -->")
    assert tables.differing(page) == [f"{STUDY}-rates.png"]  # there is none


def test_pictures_may_differ_in_smoothing_alone(tables: ModuleType, tmp_path: Path) -> None:
    image = np.full((100, 100, 3), 255, dtype=np.uint8)
    image[40:42] = 0
    smoothed, moved = image.copy(), np.roll(image, 1, axis=0)
    smoothed[40:42] = 20
    smoothed[10, :40] = 0
    files = [tmp_path / f"{name}.png" for name in ("one", "smoothed", "moved", "small")]
    for file, pixels in zip(files, (image, smoothed, moved, image[1:]), strict=True):
        Image.fromarray(pixels).save(file)
    assert [tables.look_alike(files[0], file) for file in files] == [True, True, False, False]
