"""Names of runs: short, safe, the same for the same options, and another one for another run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from metaplug.cli.resolving import resolve_options
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.run_names import LONGEST, differences, name_of


def config(*sets: str, preset: str = "maml", uses: tuple[str, ...] = ()) -> ExperimentConfig:
    return resolve_options({}, sets, preset=preset, uses=uses).config


SHARED = ("gradient-sharing:gate=0.3",)
NAMES: list[tuple[ExperimentConfig, str]] = [
    (config(), "maml-glyphs-5way-1shot-seed0"),
    (
        config("learner.inner_lr=0.1", "learner.inner_steps=5", uses=SHARED),
        "maml+gradient-sharing-gate0.3-glyphs-5way-1shot-lr0.1-steps5-seed0",
    ),
    (config("learner.inner_steps=16", preset="imaml"), "imaml-glyphs-5way-1shot-seed0"),
    (config("learner.inner_steps=3", preset="imaml"), "imaml-glyphs-5way-1shot-steps3-seed0"),
    (
        config("preset.derivative-order.switch=7", preset="maml++"),
        "maml++-derivative-order.switch7-glyphs-5way-1shot-seed0",
    ),
    (
        config("tasks.source=sinusoid", "tasks.shots=10", "tasks.queries=10", "seed=3"),
        "maml-sinusoid-10shot-queries10-seed3",
    ),
    (
        config("tasks.source=torchmeta:omniglot", "tasks.settings.rotate=true", "tasks.ways=20"),
        "maml-torchmeta-omniglot-rotate=true-20way-1shot-seed0",
    ),
    (
        config("model.name=mlp", "model.settings.hidden=[40, 40]", "runtime.precision=tf32"),
        "maml-glyphs-5way-1shot-precision=tf32-mlp-hidden=40,40-seed0",
    ),
    (config("runtime.threads=1", "loggers=[jsonl]"), "maml-glyphs-5way-1shot-seed0"),
]


@pytest.mark.parametrize(("made", "name"), NAMES, ids=[name for _, name in NAMES])
def test_a_name_says_what_differs_from_the_preset_and_the_defaults(
    made: ExperimentConfig, name: str
) -> None:
    assert name_of(made) == name == name_of(made.model_copy())


def test_what_differs_by_path() -> None:
    made = config(
        "learner.inner_lr=0.2",
        "preset.derivative-order.switch=7",
        "runtime.threads=1",
        preset="maml++",
        uses=SHARED,
    )
    assert differences(made) == {
        "preset.derivative-order.switch": 7,
        "plugins.gradient-sharing.gate": 0.3,
        "learner.inner_lr": 0.2,
    }
    assert differences(config("learner.inner_lr=0.1", preset="imaml")) == {}
    assert differences(config("seed=3"), config("learner.inner_lr=0.1")) == {
        "learner.inner_lr": 0.4,
        "seed": 3,
    }


def test_other_configurations_have_other_names(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "a/own.yaml": "plugins: [gradient-noise]",
        "b/own.yaml": "plugins: [drop-grad]",
        "maml.yaml": "plugins: [drop-grad]",
        "a/idea.py": "def transform_gradients(gradients):\n    return gradients\n",
        "b/idea.py": "def transform_gradients(gradients):\n    return None\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    sets = [
        *(f"tasks.source=folder:{path}" for path in ("images", "a/images", "b/images", "Images")),
        *(f"tasks.settings.mode={value}" for value in ("true", "'true'", "a", "[a]", "b", "/b")),
        *(f"tasks.settings.beta1={value}" for value in ("0.5", "[0.5]", "-0.5", "null", "{}")),
        *("tasks.settings.beta=15", "model.settings.beta=15", "learner.inner_lr=15"),
        *("learner.inner_lr=0.1", "learner.meta_lr=0.1", "training.iterations=5", "seed=1"),
    ]
    made = [config(each) for each in sets]
    made += [config(preset=str(tmp_path / file)) for file in files if file.endswith(".yaml")]
    made += [config(uses=(str(tmp_path / file),)) for file in files if file.endswith(".py")]
    made += [config(uses=uses) for uses in [("drop-grad",), ("drop-grad:p=0.1",), SHARED]]
    names = [name_of(each) for each in made]
    assert len({name.lower() for name in names}) == len(made)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+=,-]*[A-Za-z0-9]", name), name
    assert [re.sub(r"[0-9a-f]{8}$", "#", name) for name in names[:4]] == [
        "maml-folder-images-5way-1shot-seed0",
        *["maml-folder-images-5way-1shot-seed0-#"] * 2,
        "maml-folder-Images-5way-1shot-seed0-#",
    ]


def test_a_long_name_is_cut_between_words_and_ends_in_a_digest() -> None:
    def name(last: str) -> str:
        fields = [f"tasks.settings.a_long_field_{letter}=0.12345" for letter in "abcdef"]
        return name_of(config(*fields, f"tasks.settings.last={last}"))

    assert name("1") != name("2")
    assert re.fullmatch(
        r"maml-glyphs-a_long_field_a0\.12345-a_long_field_b0\.12345-a_long_field_c0\.12345-"
        r"a_long_field_d0\.12345-seed0-[0-9a-f]{8}",
        name("1"),
    )
    assert len(name("1")) <= LONGEST
    assert len(name_of(config(uses=tuple(f"drop-grad:p=0.{n}" for n in range(40))))) <= LONGEST


def test_the_name_of_a_file_stands_for_all_that_is_in_it() -> None:
    base = config("learner.inner_lr=0.1", "tasks.settings.rotate=true", uses=("drop-grad",))
    assert name_of(base, "My experiment", base) == "My experiment"
    made = config(
        *("learner.inner_lr=0.2", "tasks.settings.rotate=true", "tasks.shots=5", "seed=2"),
        uses=("drop-grad", *SHARED),
    )
    assert name_of(made, "mine", base) == (
        "mine-maml+drop-grad+gradient-sharing-gate0.3-5shot-lr0.2-seed2"
    )
