"""The studies and recipes in docs/studies: all can be read, and say how they are run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from metaplug.experiments.resolving import resolve
from metaplug.experiments.study.cells import cells_of
from metaplug.experiments.study.schema import read_study
from metaplug.yaml_text import read_yaml

FOLDER = Path("docs/studies")
STUDIES = sorted(FOLDER.glob("*.yaml"))
RECIPES = sorted((FOLDER / "recipes").glob("*.yaml"))
OMNIGLOT = Path("../shared/data/omniglot-full/splits.json")
needs_omniglot = pytest.mark.skipif(
    not OMNIGLOT.is_file(), reason="omniglot-full is not in shared/data beside the project"
)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_has_cells_and_names_its_command(path: Path) -> None:
    study = read_study(path)
    cells = cells_of(study, str(path), to_compute=False)
    assert {cell.variant for cell in cells} == {variant.label for variant in study.variants}
    command = rf"^#   metaplug study {path} (--keep {path.with_suffix('.jsonl')} )?--jobs 2$"
    assert re.search(command, path.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_configuration_that_names_its_source(path: Path) -> None:
    config = resolve([(str(path), read_yaml(path))]).config
    text = path.read_text(encoding="utf-8")
    assert f"\n#   metaplug train {path}\n" in text
    assert "# Published: " in text
    assert config.training.iterations >= 40_000


@needs_omniglot
def test_near_and_far_tasks_have_equally_many_characters() -> None:
    usual = json.loads(OMNIGLOT.read_text())
    near, far = (
        json.loads((FOLDER / f"splits/{name}.json").read_text())
        for name in ("one_alphabet", "all_alphabets")
    )
    assert near["train"] == ["Tifinagh"]
    tifinagh = [name for name in usual["train"] if name.startswith("Tifinagh/")]
    assert len(far["train"]) == len(tifinagh) == 55
    assert {*far["train"]} <= {*usual["train"]}
    alphabets = {name.partition("/")[0] for name in usual["train"]}
    assert {name.partition("/")[0] for name in far["train"]} == alphabets
    for split in ("val", "test"):
        assert near[split] == far[split]
        taken = [
            one
            for names in usual.values()
            for one in names
            if any(one == name or one.startswith(f"{name}/") for name in near[split])
        ]
        assert sorted(taken) == sorted(usual[split])
