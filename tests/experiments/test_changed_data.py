"""Data that change after a run was trained: read as then, or refused, never mixed in silence."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_runs import stop_after, tiny
from support.tiny_tokenizer import save_tokenizer, write_texts

from metaplug import RequestError, checkpoint
from metaplug.cli.main import main
from metaplug.experiments.build import build
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.runs import load, train
from metaplug.experiments.runs.repeating import compare_runs
from metaplug.experiments.study.cells import cells_of
from metaplug.experiments.study.keeping import read_kept
from metaplug.experiments.study.schema import read_study
from metaplug.experiments.study.unpacking import kept_results
from metaplug.experiments.support_sets import read_support
from metaplug.experiments.tuning import tune
from metaplug.experiments.tuning.space import Asked

SPLITS = ("train", "val", "test")


def draw(folder: Path, shades: dict[str, int], salt: int = 0) -> Path:
    """Four classes a split, of noise around the split's shade."""
    for split, shade in shades.items():
        shutil.rmtree(folder / split, ignore_errors=True)
        for place in range(4):
            (folder / split / f"{split}{place}").mkdir(parents=True)
            for index in range(3):
                drawn = np.random.default_rng([salt, SPLITS.index(split), place, index])
                noise = drawn.integers(0, 40, (28, 28)) + shade
                image = Image.fromarray(noise.astype(np.uint8))
                image.save(folder / split / f"{split}{place}" / f"{index}.png")
    return folder


def images(folder: Path, **fields: Any) -> ExperimentConfig:
    tasks = {"source": f"folder:{folder}", "ways": 2, "shots": 1, "queries": 1}
    return tiny(plugins=[], tasks=tasks | fields)


def rewritten(file: Path) -> None:
    """Make a checkpoint one of a version that kept nothing of its data."""
    state = checkpoint.read(file)
    del state["data"]
    checkpoint.write(file, state)


def refusal(make: Any) -> str:
    with pytest.raises(RequestError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on bright images, which are inverted, with a folder of dark training images beside."""
    folder = tmp_path_factory.mktemp("bright")
    draw(folder / "own", dict.fromkeys(SPLITS, 130))
    draw(folder / "other", {"train": 50, "val": 130, "test": 130})
    train(images(folder / "own"), folder / "run")
    return folder


# What was decided from the training data


def test_other_images_are_inverted_as_in_training(bright: Path) -> None:
    own = load(bright / "run")
    other = load(bright / "run", tasks={"source": f"folder:{bright}/other"})
    assert other.config.tasks.settings == {"size": 28, "mode": "grey", "invert": True}
    found = [each.learner.evaluate(each.tasks.test, num_tasks=20) for each in (own, other)]
    assert torch.equal(found[0].per_task, found[1].per_task)


def test_a_setting_that_is_given_counts_and_a_source_of_another_kind_takes_none(
    bright: Path,
) -> None:
    given = {"source": f"folder:{bright}/other", "settings": {"invert": False}}
    assert load(bright / "run", tasks=given).config.tasks.settings["invert"] is False
    glyphs = load(bright / "run", tasks={"source": "glyphs"})
    assert glyphs.config.tasks.settings == {}


def test_where_the_own_images_have_changed_they_are_inverted_as_in_training(
    tmp_path: Path,
) -> None:
    draw(tmp_path / "own", dict.fromkeys(SPLITS, 130))
    train(images(tmp_path / "own"), tmp_path / "run")
    draw(tmp_path / "own", {"train": 50})
    tasks = load(tmp_path / "run").tasks
    assert tasks.describe()["inverted"] is True
    support = read_support(tasks, tmp_path / "own" / "test")
    assert support.preprocessing["inverted"] is True


def test_trained_classes_are_known_whatever_their_polarity(bright: Path) -> None:
    settings = {"settings": {"invert": False}}
    experiment = load(bright / "run", tasks=settings)
    assert "draw on 4 of 4 classes that this learner is trained on" in refusal(
        lambda: experiment.learner.evaluate(experiment.tasks.train, num_tasks=2)
    )


def test_of_a_run_that_kept_nothing_of_its_folder_no_class_is_claimed_unseen(
    bright: Path, tmp_path: Path
) -> None:
    shutil.copytree(bright / "run", tmp_path / "run")
    rewritten(tmp_path / "run" / "best.safetensors")
    experiment = load(tmp_path / "run")
    assert experiment.learner.evaluate(experiment.tasks.test, num_tasks=2).training_classes is None


def write_table(path: Path, columns: list[str], scale: float) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, ["task", *columns])
        lines.writeheader()
        for task in range(15):
            for row in range(6):
                values = {"a": 10.0 + task + row, "b": 5.0 * row - task, "target": task * row + 1.0}
                scaled = {name: scale * value for name, value in values.items()}
                lines.writerow({"task": f"t{task}"} | scaled)
    return path


def test_other_tables_have_the_columns_and_the_moments_of_training(tmp_path: Path) -> None:
    own = write_table(tmp_path / "own.csv", ["a", "b", "target"], 1)
    other = write_table(tmp_path / "other.csv", ["target", "b", "a"], 3)
    source = {"source": f"tabular:{own}", "shots": 2, "queries": 2}
    train(tiny(plugins=[], tasks=source), tmp_path / "run")
    trained = load(tmp_path / "run").tasks
    found = load(tmp_path / "run", tasks={"source": f"tabular:{other}"}).tasks
    moments = trained.describe()["standardisation"]
    assert found.describe()["standardisation"] == moments
    mean, scale = (torch.tensor(moments[name], dtype=torch.float64) for name in ("mean", "scale"))
    raw = trained.test.rows.values.double() * scale + mean  # type: ignore[attr-defined]
    expected = ((3 * raw - mean) / scale).float()
    torch.testing.assert_close(found.test.rows.values, expected)  # type: ignore[attr-defined]


def test_moments_of_another_number_of_columns_are_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path / "own.csv", ["a", "b", "target"], 1)
    given = {"standardise": {"mean": [0.0], "scale": [1.0, 1.0, 1.0]}}
    config = tiny(plugins=[], tasks={"source": f"tabular:{table}", "shots": 2, "settings": given})
    assert refusal(lambda: build(config)) == (
        f"standardise has 1 means and 3 scales, but the table {table} has 3 columns of features "
        "and targets: give one of each for every column"
    )


def test_other_texts_have_the_tokens_of_training(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    from metaplug.tasks.text.source import Text

    table = write_texts(tmp_path / "own.csv")
    tokenizer = str(save_tokenizer(tmp_path / "tokenizer"))
    tasks = Text(table, ways=2, shots=1, queries=1, tokenizer=tokenizer, max_length=7)
    assert tasks.resolved() == {"tokenizer": tokenizer, "max_length": 7}


# Going on


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_run_does_not_go_on_with_other_data(split: str, tmp_path: Path) -> None:
    config = images(draw(tmp_path / "own", dict.fromkeys(SPLITS, 130)))
    assert train(config, tmp_path / "run", stop=stop_after(5)) is None
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    draw(tmp_path / "own", {split: 130}, salt=1)
    assert refusal(lambda: train(config, tmp_path / "run", resume=True)) == (
        f"{tmp_path}/run/last.safetensors is of other {split} data than folder:{tmp_path}/own has "
        "now, and one run cannot be of both: bring the data back as they were, or give another "
        "--name"
    )
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    draw(tmp_path / "own", {split: 130})
    assert train(config, tmp_path / "run", resume=True) is not None


def test_a_run_goes_on_with_other_test_data_and_where_nothing_was_kept(tmp_path: Path) -> None:
    config = images(draw(tmp_path / "own", dict.fromkeys(SPLITS, 130)))
    for changed in ("test", "train"):
        folder = tmp_path / f"run-{changed}"
        assert train(config, folder, stop=stop_after(5)) is None
        if changed == "train":
            rewritten(folder / "last.safetensors")
        draw(tmp_path / "own", {changed: 130}, salt=2)
        assert train(config, folder, resume=True) is not None


# Comparing


def called(*words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*words])
    assert not stopped.value.code


def test_a_study_pairs_no_tests_of_different_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = images(draw(tmp_path / "own", dict.fromkeys(SPLITS, 130))).model_dump(mode="json")
    base = {name: base[name] for name in ("tasks", "model", "learner", "training", "runtime")}
    base["training"]["validation_tasks"] = 200
    asked = {"base": base, "variants": ["maml"], "seeds": 1}
    Path("mine.yaml").write_text(json.dumps(asked))
    called("study", "mine.yaml", "--keep", "kept.jsonl")
    assert "other data" not in "".join(capfd.readouterr())

    draw(tmp_path / "own", {"test": 130}, salt=1)
    Path("mine.yaml").write_text(json.dumps(asked | {"variants": ["maml", "anil"]}))
    called("study", "mine.yaml", "--keep", "kept.jsonl")
    out, err = capfd.readouterr()
    assert " ".join(err.split()).startswith(
        f"1 finished run, first maml, seed 0, is of other data than folder:{tmp_path}/own has "
        "now, and will not be compared with new ones: bring the data back as they were, or give "
        "another --name 2 runs in"
    )
    assert (
        "Different data: 1 of 2 runs are of other data than the first of the same tasks, as anil, "
        "seed 0 is. Runs are compared on the same data alone: compute all of them on the same, "
        "under another --name."
    ) in " ".join(out.split())
    values = json.loads(Path("runs/mine/results.json").read_text())
    assert values["other_data"] == ["anil, seed 0"]
    assert [row["test_minus_baseline"] for row in values["rows"]][1] is None
    called("report", "runs/mine")
    assert "Different data: 1 of 2 runs" in Path("runs/mine/report.html").read_text()

    # Kept runs of older versions have no digests, and count as before.
    study = read_study(Path("mine.yaml"))
    kept = read_kept(Path("kept.jsonl"))
    assert [sorted(run.values["summary"]["data"]) for run in kept] == [sorted(SPLITS)] * 2
    for run in kept:
        del run.values["summary"]["data"]  # type: ignore[attr-defined]
    found = kept_results(study, cells_of(study, ""), kept)
    assert found is not None
    assert found.on_other_data == ()
    assert found.difference(found.rows[1], found.rows[0]) is not None


def test_a_run_that_is_trained_again_says_which_data_are_others(tmp_path: Path) -> None:
    config = images(draw(tmp_path / "own", dict.fromkeys(SPLITS, 130)))
    train(config, tmp_path / "run")
    train(config, tmp_path / "same")
    draw(tmp_path / "own", {"val": 130}, salt=1)
    train(config, tmp_path / "changed")
    assert compare_runs(tmp_path / "run", tmp_path / "same").changes == ()
    assert compare_runs(tmp_path / "run", tmp_path / "changed").changes == ("other val data",)


def test_a_search_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    config = images(draw(tmp_path / "own", dict.fromkeys(SPLITS, 130)))
    asked = [Asked("--search", "learner.inner_lr", "0.01..0.1")]
    assert tune(config, asked, tmp_path / "search", trials=1) is not None
    draw(tmp_path / "own", {"val": 130}, salt=1)
    assert refusal(lambda: tune(config, asked, tmp_path / "search", trials=2)) == (
        f"{tmp_path}/search was begun with other data than folder:{tmp_path}/own has now, and its "
        "trials could not be compared: bring the data back as they were, or give another --name"
    )
