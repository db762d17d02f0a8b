"""The page of results has the tables and pictures that its kept runs give."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

STUDIES = Path(__file__).parent.parent / "docs" / "studies"
STUDY = "omniglot_5way"
CODE = "```sh\nmetaplug\n```"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(STUDIES)
    return importlib.import_module("tables")


def test_every_kept_study_has_the_page_and_pictures_of_its_runs(tables: ModuleType) -> None:
    assert STUDY in tables.kept_studies()
    assert [each for study in tables.kept_studies() for each in tables.differing_of(study)] == []


def test_tables_of_the_overview_are_those_of_the_kept_runs(tables: ModuleType) -> None:
    assert tables.differing(tables.PAGE.read_text(encoding="utf-8")) == []


def test_the_overview_leads_to_every_page(tables: ModuleType) -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    assert [
        path.name for path in tables.PAGES.glob("*.md") if f"results/{path.name}" not in page
    ] == []


def test_what_was_learned_is_the_mean_of_the_last_figures(tables: ModuleType) -> None:
    lines = (STUDIES / f"{STUDY}.jsonl").read_text(encoding="utf-8").splitlines()
    runs = [
        run
        for run in map(json.loads, lines)
        if run["label"].startswith("maml+gradient-sharing, inner_lr 0.4,")
    ]
    ends = [run["metrics"][-1]["figures"] for run in runs]
    gates = [np.mean([end[f"gradient-sharing.gate/{step}"] for end in ends]) for step in range(3)]
    table = tables.block(STUDY, "learned").split("**gradient-sharing.gate of each inner step")[1]
    row = next(line for line in table.splitlines() if line.startswith("| maml+gradient-sharing "))
    assert len(runs) == 3
    assert row.split("|")[4].strip() == ", ".join(f"{gate:.2f}" for gate in gates)


def test_what_differs_is_named(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = f"# Mine\n<!-- table {STUDY} tuned -->\nold\n<!-- end -->\n"
    assert tables.differing(page) == [f"table {STUDY} tuned"]
    assert tables.differing(tables.filled(page)) == []
    monkeypatch.setattr(tables, "IMAGES", tmp_path)
    monkeypatch.setattr(tables, "PAGES", tmp_path)
    (tmp_path / f"{STUDY}.md").write_text(tables.page_of(STUDY), encoding="utf-8")
    pictures = [f"{STUDY}-{kind}.png" for kind in ("gains", "rates", "curves")]
    assert tables.differing_of(STUDY) == pictures  # there is none
    (tmp_path / f"{STUDY}.md").write_text("# Mine", encoding="utf-8")
    assert tables.differing_of(STUDY) == [f"{STUDY}.md", *pictures]


@pytest.mark.parametrize(
    ("comment", "title", "below"),
    [
        ("# Does it\n# help? It\n# may.\n#\n#   metaplug\n", "Does it help?", ["It may.", CODE]),
        ("# Does it help?\n#\n# It may.\nbase:\n# no\n", "Does it help?", ["It may."]),
    ],
)
def test_a_page_asks_what_the_study_asks(
    comment: str, title: str, below: list[str], tables: ModuleType
) -> None:
    assert tables.asked(comment) == (title, below)


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_study_begins_with_a_question(file: Path, tables: ModuleType) -> None:
    title, _ = tables.asked(file.read_text(encoding="utf-8"))
    assert title[-2].isalnum() and title.count("?") == 1


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
