"""Studies: their files, their cells, and runs that are computed once whatever happens."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.studies import TINY, tiny_study

from metaplug import RequestError
from metaplug.cli.main import main
from metaplug.cli.study import run
from metaplug.evaluation.curves import best_point
from metaplug.experiments.build import build
from metaplug.experiments.configuration import ExperimentConfig, ModelSettings
from metaplug.experiments.configuration import to_yaml as config_yaml
from metaplug.experiments.json_values import to_json
from metaplug.experiments.loggers.jsonl import Jsonl
from metaplug.experiments.resolving import assign, resolve
from metaplug.experiments.study.cells import Cell, cells_of
from metaplug.experiments.study.folder import begin, begun, cell_folder, finished, to_yaml
from metaplug.experiments.study.identity import _source, digest_of
from metaplug.experiments.study.results import StudyResult, read_results
from metaplug.experiments.study.running import Workers, check, compute
from metaplug.experiments.study.schema import Study, read_study
from metaplug.experiments.study.values import to_values

GRID: dict[str, Any] = {
    "base": TINY,
    "variants": ["maml", "maml+gradient-sharing"],
    "axes": {"learner.inner_lr": [0.01, 0.02], "plugins.gradient-sharing.gate": [0.1, 0.9]},
    "seeds": 2,
}


def computed(study: Study, folder: Path, **workers: Any) -> StudyResult:
    """The result of a study, computed where it is not there."""
    cells = cells_of(study, "")
    begin(study, cells, folder)
    failures = [failed for _, failed in compute(cells, folder, Workers(**workers)) if failed]
    assert failures == []
    found = read_results(study, cells, folder)
    assert found is not None
    assert not found.missing
    return found


def labels(study: Study) -> list[str]:
    return [cell.label for cell in cells_of(study, "")]


# Cells.


def test_the_grid_is_every_variant_at_every_value_that_concerns_it_with_every_seed() -> None:
    assert labels(Study.model_validate(GRID)) == [
        f"{row}, seed {seed}"
        for seed in (0, 1)
        for row in (
            "maml, inner_lr 0.01",
            "maml, inner_lr 0.02",
            "maml+gradient-sharing, inner_lr 0.01, gate 0.1",
            "maml+gradient-sharing, inner_lr 0.01, gate 0.9",
            "maml+gradient-sharing, inner_lr 0.02, gate 0.1",
            "maml+gradient-sharing, inner_lr 0.02, gate 0.9",
        )
    ]


def test_what_is_excluded_is_left_out() -> None:
    exclude = [
        {"variant": "maml", "learner.inner_lr": 0.02},
        {"plugins.gradient-sharing.gate": [0.1, 0.9], "seed": 1},
    ]
    assert labels(Study.model_validate({**GRID, "exclude": exclude})) == [
        "maml, inner_lr 0.01, seed 0",
        "maml+gradient-sharing, inner_lr 0.01, gate 0.1, seed 0",
        "maml+gradient-sharing, inner_lr 0.01, gate 0.9, seed 0",
        "maml+gradient-sharing, inner_lr 0.02, gate 0.1, seed 0",
        "maml+gradient-sharing, inner_lr 0.02, gate 0.9, seed 0",
        "maml, inner_lr 0.01, seed 1",
    ]


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    axes = "variants: [maml]\naxes: {learner.inner_lr: [1e-2, 1E+1]}"
    text = f"{axes}\nexclude: [{{learner.inner_lr: 1e1}}]"
    (tmp_path / "mine.yaml").write_text(text)
    [cell] = cells_of(read_study(tmp_path / "mine.yaml"), "")
    assert cell.setting == {"learner.inner_lr": 0.01}
    (tmp_path / "mine.yaml").write_text(text.replace("1E+1", "0.01"))
    with pytest.raises(RequestError, match=r"a value of learner\.inner_lr stands twice"):
        read_study(tmp_path / "mine.yaml")


def test_labels_are_shown_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    label = "[red]x[/red] [/] $a_{b$ c$ :smile:"
    Path("mine.yaml").write_text(to_yaml(tiny_study("maml", {"label": label, "preset": "anil"})))
    for words in ((), ("--dry-run",)):
        with pytest.raises(SystemExit) as stopped:
            main(["study", "mine.yaml", *words])
        assert not stopped.value.code
        assert label in capfd.readouterr().out
    assert label in Path("runs/mine/table.txt").read_text()


def test_a_variant_may_set_fields_that_others_have_from_the_base() -> None:
    hot = {"label": "hot", "preset": "maml", "set": {"learner.inner_steps": 2}}
    plain, other = cells_of(tiny_study("maml", hot), "")
    assert (plain.config.learner.inner_steps, other.config.learner.inner_steps) == (1, 2)
    assert (plain.config.runtime.threads, other.variant) == (1, "hot")


def test_a_cell_is_named_by_what_its_figures_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = cells_of(tiny_study(), "")[0]
    config = cell.config
    assert len(cell.digest) == 16
    assert digest_of(config.model_copy(update={"seed": 1})) != cell.digest
    moved = config.runtime.model_copy(update={"threads": 2, "task_batching": "sequential"})
    assert digest_of(config.model_copy(update={"runtime": moved})) == cell.digest
    coarse = config.runtime.model_copy(update={"precision": "bfloat16"})
    assert digest_of(config.model_copy(update={"runtime": coarse})) != cell.digest
    monkeypatch.setattr(torch, "__version__", "0.0.0")
    assert digest_of(config) != cell.digest


def test_a_cell_is_computed_anew_after_its_models_code_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "package_of_models"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported to name a cell')")
    files = tmp_path / "module_of_models.py", package / "inner.py"

    def digests() -> list[str]:
        _source.cache_clear()  # as in another process
        names = "module_of_models:make", "package_of_models.inner:make"
        models = [ModelSettings(name=name) for name in names]
        return [digest_of(ExperimentConfig(model=model)) for model in models]

    for file in files:
        file.write_text("def make(inputs, outputs): ...")
    before = digests()
    assert digests() == before
    for file in files:
        file.write_text("def make(inputs, outputs, depth=2): ...")
    assert not {*digests()} & {*before}
    assert "package_of_models" not in sys.modules


def test_a_study_is_read_back_from_what_it_writes(tmp_path: Path) -> None:
    study = Study.model_validate({**GRID, "exclude": [{"seed": 1, "variant": "maml"}]})
    (tmp_path / "study.yaml").write_text(to_yaml(study))
    assert read_study(tmp_path / "study.yaml") == study
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**GRID, "base": "base.yaml"}))
    assert read_study(tmp_path / "mine.yaml") == Study.model_validate(GRID)


def test_a_study_is_read_where_its_plugin_and_preset_files_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plugin = "from metaplug import hookimpl\n@hookimpl\ndef transform_gradients(gradients):\n    "
    Path("my_idea.py").write_text(f'{plugin}"""None."""\n    return gradients\n')
    Path("mine.yaml").write_text("plugins: [gradient-sharing]\n")
    study = tiny_study("maml", "mine.yaml+./my_idea.py")
    cells = cells_of(study, "")
    begin(study, cells, tmp_path / "done")
    Path("my_idea.py").unlink()
    Path("mine.yaml").unlink()
    monkeypatch.chdir("/")
    found, again = begun(tmp_path / "done")
    assert found == study
    assert [cell.digest for cell in again] == [cell.digest for cell in cells]


def test_a_variant_takes_the_algorithm_of_a_configuration(tmp_path: Path) -> None:
    tuned = {
        **TINY,
        "plugins": ["gradient-sharing"],
        "learner": {"inner_lr": 0.3, "inner_steps": 2},
    }
    (tmp_path / "best.yaml").write_text(yaml.safe_dump({**tuned, "seed": 5}))
    variants = [
        {"label": "tuned", "config": "best.yaml"},
        {"label": "hotter", "config": "best.yaml", "set": {"learner.inner_lr": 0.6}},
    ]
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"base": TINY, "variants": variants}))
    tuned_cell, hotter = cells_of(read_study(file), str(file))
    assert (tuned_cell.config.learner.inner_lr, hotter.config.learner.inner_lr) == (0.3, 0.6)
    assert [cell.config.learner.inner_steps for cell in (tuned_cell, hotter)] == [2, 2]
    assert [cell.seed for cell in (tuned_cell, hotter)] == [0, 0]
    assert hotter.config.plugins[0].plugin == "gradient-sharing"
    variants[0]["preset"] = "anil"
    file.write_text(yaml.safe_dump({"base": TINY, "variants": variants}))
    with pytest.raises(RequestError) as error:
        read_study(file)
    assert str(error.value) == (
        f"{file}, variant 'tuned': both its config and the variant give preset; leave one of them "
        "out"
    )


@pytest.mark.parametrize(
    ("field", "value", "base"),
    [
        ("tasks.source", "sinusoid", {"tasks": {"source": "glyphs"}}),
        ("tasks.settings.alphabets", ["latin"], {"tasks": {"settings": {"alphabets": ["greek"]}}}),
        ("model.settings.filters", 64, {"model": {"settings": {"filters": 8}}}),
        ("training.tasks_per_batch", 2, {"training": {"tasks_per_batch": 4}}),
    ],
)
def test_what_a_configuration_shares_with_others_is_not_lost(
    field: str, value: Any, base: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(assign({}, field, value)))
    file = tmp_path / "mine.yaml"
    study = {"variants": [{"label": "tuned", "config": "best.yaml"}]}
    file.write_text(yaml.safe_dump({**study, "base": {"tasks": {"ways": 3}}}))
    with pytest.raises(RequestError) as error:
        read_study(file)
    assert str(error.value) == (
        f"{file}, variant 'tuned': {tmp_path / 'best.yaml'} has {field} = {value!r}, and the study "
        "leaves it out: give it in base, which all variants share"
    )
    for more in ({"base": base}, {"axes": {field: [value]}}):
        file.write_text(yaml.safe_dump({**study, **more}))
        assert read_study(file).variants[0].label == "tuned"


def test_a_variants_file_leaves_to_preset_and_base_what_it_does_not_give(tmp_path: Path) -> None:
    (tmp_path / "reptile.yaml").write_text("preset: reptile\nlearner: {inner_lr: 0.1}\n")
    base = {**TINY, "learner": {"inner_steps": 1}}
    variants = ["reptile", {"label": "file", "config": "reptile.yaml"}]
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"base": base, "variants": variants}))
    plain, ours = (cell.config.learner for cell in cells_of(read_study(file), str(file)))
    assert ours == plain.model_copy(update={"inner_lr": 0.1})
    assert (ours.meta_optimizer, ours.inner_steps) == ("sgd", 1)


def test_a_file_may_have_what_its_preset_gives_every_run(tmp_path: Path) -> None:
    whole = resolve([("", {"preset": "maml++-reference"})]).config
    (tmp_path / "best.yaml").write_text(config_yaml(whole))
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"variants": [{"label": "tuned", "config": "best.yaml"}]}))
    (cell,) = cells_of(read_study(file), str(file))
    assert cell.config.model == whole.model != ModelSettings()


@pytest.mark.parametrize(
    "more",
    [
        {"base": {"tasks": {}, "model": {"settings": {}}}},
        {"axes": {"model.settings": [{"filters": 8}, {"pooling": "max"}]}},
    ],
)
def test_an_empty_section_or_half_an_axis_gives_no_field(
    more: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "best.yaml").write_text("model: {settings: {filters: 16}}\n")
    file = tmp_path / "mine.yaml"
    variants = [{"label": "tuned", "config": "best.yaml"}]
    file.write_text(yaml.safe_dump({"variants": variants, **more}))
    with pytest.raises(RequestError, match=r"model.settings.filters = 16, and the study leaves"):
        read_study(file)
    assert read_study(file, ["model.settings.filters"]).variants[0].label == "tuned"


def test_a_setting_may_stand_once_in_a_variant(tmp_path: Path) -> None:
    plugin = {"plugin": "gradient-sharing", "settings": {"gate": 0.3}}
    variant = {"label": "mine", "plugins": [plugin], "set": {"plugins.gradient-sharing.gate": 0.7}}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"base": TINY, "variants": [variant]}))
    with pytest.raises(RequestError, match=r"both set and the list of plugins give plugins\.grad"):
        cells_of(read_study(file), str(file))


# Wrong files.

WRONG: list[tuple[str, str]] = [
    ("", "mine.yaml: 'variants' is required: give it a value"),
    ("- maml", "mine.yaml holds a list, not a mapping of settings: begin with a line such as"),
    ("variants: [maml", "mine.yaml, line 1 is not valid YAML"),
    ("variants: []", "mine.yaml: variants = []: "),
    ("variants: [mamll]", "unknown preset at the start of 'mamll': did you mean 'maml'?"),
    ("variants: [maml+sharing]", "unknown plugin 'sharing': did you mean"),
    (
        "variants: [maml, maml]",
        "mine.yaml: the variant 'maml' stands twice, and would be compared with itself: leave one "
        "out",
    ),
    (
        "variants: [maml]\naxes: {inner_lr: [0.1]}",
        "variant 'maml, inner_lr 0.1': maml: unknown field 'inner_lr': did you mean "
        "'learner.inner_lr'?",
    ),
    ("variants: [maml]\nbaseline: anil", "the baseline 'anil' is no variant: give one of 'maml'"),
    (
        "variants: [maml]\ntuned: [learner.inner_lr]",
        "mine.yaml: tuned names learner.inner_lr, which is no axis: add it to axes",
    ),
    (
        "variants: [maml]\naxes: {tasks.shots: [1]}\ntuned: [tasks.shots]",
        "mine.yaml: tuned names tasks.shots, which changes the tasks or the budget, so validation "
        "cannot choose it: leave it out",
    ),
    (
        "variants: [maml]\nseeds: 0",
        "mine.yaml: seeds = 0: give how many, from 1 to 1000, or a list of seeds",
    ),
    (
        "variants: [maml]\nseeds: [1, 1]",
        "mine.yaml: seeds = [1, 1]: a seed stands twice, and would be counted twice: leave one out",
    ),
    ("variants: [maml]\naxis: {a: [1]}", "mine.yaml: unknown field 'axis': did you mean 'axes'?"),
    ("variants: [maml]\naxes: {learner.inner_lr: []}", "mine.yaml: axes.learner.inner_lr = []: "),
    (
        "variants: [maml]\naxes: {learner.inner_lr: 0.1}",
        "axes.learner.inner_lr = 0.1: input should",
    ),
    (
        "variants: [maml]\naxes: {learner.inner_lr: [0.1, 0.1]}",
        "a value of learner.inner_lr stands twice: leave one out",
    ),
    (
        "variants: [maml]\naxes: {learner.inner_rl: [0.1]}",
        "variant 'maml, inner_rl 0.1': maml: unknown field 'learner.inner_rl': did you mean "
        "'inner_lr'?",
    ),
    (
        "variants: [maml]\naxes: {learner.inner_lr: [fast]}",
        "variant 'maml, inner_lr fast': maml: learner.inner_lr = 'fast': ",
    ),
    (
        "variants: [maml]\naxes: {plugins.gradient-sharing.gate: [0.1]}",
        "mine.yaml, axes: plugins.gradient-sharing.gate is of a plugin that no variant has: add it "
        "to one, or leave the axis out",
    ),
    ("variants: [maml]\naxes: {seed: [0, 1]}", "mine.yaml, axes: seed is no axis: give seeds"),
    (
        "variants: [maml]\naxes: {runtime.threads: [1, 2]}",
        "mine.yaml, axes: runtime.threads is no axis: it changes no result, so give it in base",
    ),
    (
        "variants: [maml]\naxes: {loggers: [[tensorboard], []]}",
        "mine.yaml, axes: loggers is no axis: it changes no result, so give it in base",
    ),
    (
        "variants: [maml]\nbase: {seed: 3}",
        "mine.yaml, base.seed: it would be the same for all runs; give it in seeds",
    ),
    (
        "variants: [maml]\nbase: {preset: maml}",
        "mine.yaml, base.preset: it would be the same for all runs; give it in variants",
    ),
    (
        "variants: [maml]\naxes: {tasks.settings.a: [1], tasks.settings: [{a: 2}]}",
        "mine.yaml, axes: tasks.settings holds tasks.settings.a, so the one would replace the "
        "other: write the values of tasks.settings.a into those of tasks.settings, or leave "
        "tasks.settings out",
    ),
    (
        "variants: [{label: slow, set: {learner.inner_lr: 0.1}}]\naxes: {learner.inner_lr: [0.2]}",
        "mine.yaml, variant 'slow': it sets learner.inner_lr, and the axis learner.inner_lr would "
        "replace that: leave one of them out",
    ),
    (
        "variants: ['maml+gradient-sharing:gate=0.9']\n"
        "axes: {plugins.gradient-sharing.gate: [0.1]}",
        "mine.yaml, variant 'maml+gradient-sharing:gate=0.9': it sets "
        "plugins.gradient-sharing.gate, and the axis plugins.gradient-sharing.gate would replace "
        "that: leave one of them out",
    ),
    ('variants: [{label: "a\\nb"}]', "it names a row of tables: give one line of text"),
    ("variants: [maml]\nbase: none.yaml", "cannot read none.yaml: No such file"),
    (
        "variants: [maml]\nexclude: [{variant: anil}]",
        "mine.yaml, exclude, entry 1: variant is never 'anil'; it is one of maml",
    ),
    (
        "variants: [maml]\nexclude: [{sed: 0}]",
        "mine.yaml, exclude, entry 1: unknown axis 'sed': did you mean 'seed'?",
    ),
    (
        "variants: [maml]\nexclude: [{}]",
        "mine.yaml, exclude, entry 1: it names nothing, and would leave no cell; give values",
    ),
    (
        "variants: [maml]\nexclude: [{variant: maml}]",
        "mine.yaml, exclude: no cell is left; exclude less",
    ),
    (
        "variants: [maml, anil]\nexclude: [{variant: maml}]",
        "mine.yaml, exclude: no cell of the baseline 'maml' is left, so nothing would be compared; "
        "exclude less, or give another baseline",
    ),
    (
        "variants: [maml]\nbase: {training: {validation_tasks: 50}}",
        "training.validation_tasks = 50: too few to compare by, as the target would be mostly "
        "noise; use at least 200",
    ),
    (
        "variants: [maml, {label: short, set: {training.iterations: 5}}]",
        "variants 'maml' and 'short' differ in training.iterations (400 and 5), so a comparison "
        "would not be fair: set training.iterations for both",
    ),
    (
        "variants: [maml]\nseeds: 1000\n"
        f"axes: {{learner.inner_lr: [{', '.join(str(each / 100) for each in range(1, 12))}]}}",
        "mine.yaml: 11000 cells, more than the 10000 that a study may have: take fewer values",
    ),
    ("variants: [maml]\ntarget: .nan", "mine.yaml: target = nan: "),
    ("variants: [maml]\nseeds: yes", "mine.yaml: seeds = True: "),
]


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_a_wrong_file_is_one_line(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["study", "mine.yaml"])
    shown = capfd.readouterr()
    assert (stopped.value.code, shown.out) == (2, "")
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("metaplug: ")
    assert said in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(to_yaml(tiny_study()))
    mend = "give another --name or --out"
    for name, content, said in (
        ("one", "config.yaml", "one holds a run, not a study"),
        ("two", "thesis.tex", "two is not empty, and holds no study"),
    ):
        Path(name).mkdir()
        Path(name, content).write_text("mine")
        with pytest.raises(SystemExit):
            main(["study", "mine.yaml", "--out", ".", "--name", name])
        assert capfd.readouterr().err == f"metaplug: {said}: {mend}\n"
        assert [path.name for path in Path(name).iterdir()] == [content]
    Path("three").write_text("")
    with pytest.raises(SystemExit):
        main(["study", "mine.yaml", "--out", ".", "--name", "three"])
    said = f"three is a file, not a folder for a study: {mend}"
    assert capfd.readouterr().err == f"metaplug: {said}\n"


# Runs.


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResult]:
    folder = tmp_path_factory.mktemp("studies") / "whole"
    return folder, computed(Study.model_validate(GRID), folder)


def without_times(found: StudyResult) -> str:
    """All values of a study but the seconds, and the versions of what was loaded."""

    def strip(values: Any) -> Any:
        if isinstance(values, dict):
            apart = {"seconds", "of_seconds", "acceleration_percent_of_seconds", "versions"}
            kept = {key: strip(each) for key, each in values.items() if key not in apart}
            for key in {"curve", "mean_curve"} & kept.keys():
                kept[key] = [point[:3] for point in kept[key]]
            return kept
        return [strip(each) for each in values] if isinstance(values, list) else values

    return to_json(strip(json.loads(to_json(to_values(found)))))


def test_variants_see_the_same_tasks_and_begin_with_the_same_weights(tmp_path: Path) -> None:
    same = {"label": "same", "preset": "maml"}
    found = computed(tiny_study("maml", same, "maml+gradient-sharing", seeds=[3, 4]), tmp_path)
    maml, other, shared = found.rows
    assert maml.seeds == (3, 4)
    for one, two, three in zip(maml.runs, other.runs, shared.runs, strict=True):
        assert one.curve == two.curve  # the same run
        assert torch.equal(one.test.per_task, two.test.per_task)
        assert [point.iteration for point in three.curve] == [2, 4]
        assert [point.mean for point in three.curve] != [point.mean for point in one.curve]
    assert found.acceleration(other, maml).percent == (0.0, 0.0)
    values = json.loads(to_json(to_values(found)))
    assert values["baseline"] == "maml"
    assert values["rows"][1]["acceleration_percent"]["mean_over_seeds_that_reached"] == 0.0
    assert values["rows"][2]["plugins"]["transform_gradients"] == ["gradient-sharing"]
    assert values["rows"][0]["runs"][1]["versions"]["torch"] == torch.__version__
    # Two variants of one configuration are one cell.
    assert len(list((tmp_path / "cells").iterdir())) == 4


def test_the_test_is_by_the_weights_that_validated_best(tmp_path: Path) -> None:
    # So high a meta learning rate that the last validation is not the best.
    base = {**TINY, "training": {**TINY["training"], "iterations": 8}}
    study = tiny_study("maml", base=base, axes={"learner.meta_lr": [1.0]})
    [run] = computed(study, tmp_path).rows[0].runs
    best = best_point("mean squared error", run.curve).iteration
    assert best < 8
    short = build(run.config)
    short.learner.fit(short.tasks.train, iterations=best, tasks_per_batch=2)
    again = short.learner.evaluate(short.tasks.test, num_tasks=5)
    assert torch.equal(again.per_task, run.test.per_task)


def test_nothing_is_computed_twice_and_a_grown_study_computes_what_is_new(
    whole: tuple[Path, StudyResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = whole
    seen: list[Cell] = []
    real = build

    def spied(config: Any, **given: Any) -> Any:
        seen.append(config)
        return real(config, **given)

    monkeypatch.setattr("metaplug.experiments.runs.training.build", spied)
    assert without_times(computed(Study.model_validate(GRID), folder)) == without_times(found)
    assert seen == []
    grown = {**GRID, "seeds": 3, "axes": {**GRID["axes"], "learner.inner_lr": [0.01, 0.02, 0.03]}}
    fewer = {"exclude": [{"learner.inner_lr": 0.03, "seed": [0, 1]}]}
    more = computed(Study.model_validate({**grown, **fewer}), folder)
    assert {config.seed for config in seen} == {2}
    assert len(seen) == 9
    assert len(more.rows) == 9


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_same_bit_for_bit_however_many_run_at_once(
    whole: tuple[Path, StudyResult], tmp_path: Path, jobs: int
) -> None:
    found = computed(Study.model_validate(GRID), tmp_path / "again", jobs=jobs)
    assert without_times(found) == without_times(whole[1])


def test_a_run_that_fails_is_named_and_the_others_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    wild = {"label": "wild", "set": {"learner.inner_lr": 1000.0, "learner.inner_steps": 8}}
    Path("mine.yaml").write_text(to_yaml(tiny_study(wild, "maml", "anil")))
    with pytest.raises(SystemExit) as stopped:
        main(["study", "mine.yaml"])
    shown = capfd.readouterr()
    assert stopped.value.code == 1
    assert "metaplug: 1 of 3 runs failed, first wild, seed 0: iteration 1 stopped, " in shown.err
    rows = json.loads(Path("runs/mine/results.json").read_text())["rows"]
    assert [row["label"] for row in rows] == ["maml", "anil"]
    assert "Not finished: 1 run, first wild, seed 0." in shown.out
    # Of a study that replaces it and has no result, the folder says nothing.
    Path("mine.yaml").write_text(to_yaml(tiny_study(wild)))
    with pytest.raises(SystemExit):
        main(["study", "mine.yaml"])
    assert sorted(path.name for path in Path("runs/mine").iterdir()) == [
        "cells",
        "cells.json",
        "study.yaml",
    ]


def test_a_logger_is_told_a_run_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    real = Jsonl.start
    monkeypatch.setattr(Jsonl, "start", lambda self, run: told.append(run.name) or real(self, run))
    computed(tiny_study(axes={"learner.inner_lr": [0.01]}), tmp_path)
    assert told == ["maml, inner_lr 0.01, seed 0", "maml+gradient-sharing, inner_lr 0.01, seed 0"]


def test_a_run_that_a_worker_left_elsewhere_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(seeds=[0])
    cells = cells_of(study, "")
    begin(study, cells, tmp_path)
    monkeypatch.setattr("metaplug.experiments.study.running._compute", lambda job: "finished")
    found = [failed.text for _, failed in compute(cells, tmp_path, Workers()) if failed]
    assert found == [
        "it is finished, but not in this folder: workers on other machines must see the study's "
        "folder under the same path; give one of a shared file system by --out"
    ] * len(cells)


def test_every_value_is_tried_before_the_first_run(tmp_path: Path) -> None:
    cells = cells_of(tiny_study("maml", "maml++"), "")
    with pytest.raises(RequestError) as error:
        check(cells, lambda cell, experiment: None)
    assert str(error.value).startswith("variant 'maml++': plugin 'per-step-batch-norm' needs")
    built: list[str] = []
    grid = cells_of(Study.model_validate(GRID), "")
    check(grid, lambda cell, experiment: built.append(cell.label))
    assert built == [
        "maml, inner_lr 0.01, seed 0",
        "maml+gradient-sharing, inner_lr 0.01, gate 0.1, seed 0",
    ]


def test_the_command_lists_computes_and_lists_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(to_yaml(tiny_study(seeds=[0])))

    def lines(*words: str) -> tuple[str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["study", "mine.yaml", *words])
        assert not stopped.value.code
        shown = capfd.readouterr()
        return shown.out, shown.err

    assert lines("--dry-run")[0].count("to compute") == 2
    assert not Path("runs").exists()
    out, err = lines("--json")
    assert [row["label"] for row in json.loads(out)["rows"]] == ["maml", "maml+gradient-sharing"]
    assert "maml, seed 0: iteration 2  loss " in err
    assert "2 of 2 runs: maml+gradient-sharing, seed 0 is finished" in err
    assert lines("--dry-run")[0].count("finished") == 2
    out, err = lines("--set", "training.iterations=6")
    assert err.startswith("2 runs in runs/mine, 0 of them finished already\n")
    with pytest.raises(SystemExit):
        main(["study", "mine.yaml", "--name", "../up"])
    assert capfd.readouterr().err == (
        "metaplug: --name ../up: a name is no path; give the folder that holds studies by --out, "
        "and a plain name\n"
    )


@pytest.mark.parametrize("given", ["learner.inner_lr=0.3", "learner={inner_lr: 0.3}"])
def test_what_an_axis_gives_is_not_set(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(to_yaml(Study.model_validate(GRID)))
    with pytest.raises(SystemExit) as stopped:
        main(["study", "mine.yaml", "--dry-run", "--set", given])
    assert stopped.value.code == 2
    path = given.partition("=")[0]
    assert capfd.readouterr().err == (
        f"metaplug: --set {path}: learner.inner_lr is an axis of the study; change it there\n"
    )


# Ends of all kinds.


def command(folder: Path, *words: str) -> subprocess.Popen[str]:
    """A study in a process of its own."""
    arguments = [sys.executable, "-m", "metaplug", "study", str(folder / "mine.yaml")]
    return subprocess.Popen(
        [*arguments, "--out", str(folder / "runs"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def longer(**fields: Any) -> Study:
    """A study whose runs take a while."""
    training = {**TINY["training"], "iterations": 60, "validate_every": 10}
    return tiny_study(base={**TINY, "training": training}, seeds=2, **fields)


def lines_of(folder: Path) -> int:
    """The iterations that all cells have made."""
    files = folder.glob("runs/mine/cells/*/metrics.jsonl")
    return sum(file.read_bytes().count(b"\n") for file in files)


def some_iterations(folder: Path, many: int = 1) -> None:
    """Wait until cells have made some iterations, a minute at most."""
    end = time.monotonic() + 60
    while lines_of(folder) < many:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ctrl_c_stops_after_a_step_and_the_same_command_goes_on(tmp_path: Path) -> None:
    study = longer()
    (tmp_path / "mine.yaml").write_text(to_yaml(study))
    first = command(tmp_path, "--jobs", "2")
    some_iterations(tmp_path)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does, workers included
    out, err = first.communicate(timeout=60)
    assert (first.returncode, out) == (130, "")
    assert "stopping after this step; Ctrl-C again stops at once" in err
    assert err.endswith(
        f"of 4 runs in {tmp_path}/runs/mine are finished, and those that were under way have a "
        "checkpoint: the same command goes on\n"
    )
    assert "Traceback" not in err
    assert not list((tmp_path / "runs/mine").glob(".stop*"))
    second = command(tmp_path, "--jobs", "1")  # which trains in its own process
    some_iterations(tmp_path, 1 + lines_of(tmp_path))
    second.send_signal(signal.SIGINT)
    assert second.communicate(timeout=60)[0] == ""
    assert second.returncode == 130
    assert lines_of(tmp_path) < 240
    third = command(tmp_path, "--json")
    out, err = third.communicate(timeout=60)
    assert third.returncode == 0, err
    found = read_results(study, cells_of(study, ""), tmp_path / "runs/mine")
    assert found is not None
    assert without_times(found) == without_times(computed(study, tmp_path / "alone"))


@pytest.mark.slow
def test_killed_at_ten_moments_the_table_is_the_same(tmp_path: Path) -> None:
    study, chance = longer(), random.Random(3)
    expected = without_times(computed(study, tmp_path / "alone"))
    for kill in range(10):
        folder = tmp_path / f"kill{kill}"
        folder.mkdir()
        (folder / "mine.yaml").write_text(to_yaml(study))
        process = command(folder, "--jobs", str(1 + kill % 2))
        some_iterations(folder, chance.randrange(1, 200))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        again = command(folder, "--jobs", "2")
        _, err = again.communicate(timeout=120)
        assert again.returncode == 0, err
        found = read_results(study, cells_of(study, ""), folder / "runs/mine")
        assert found is not None
        assert without_times(found) == expected


def test_two_studies_in_one_folder_share_the_work(tmp_path: Path) -> None:
    study = longer()
    (tmp_path / "mine.yaml").write_text(to_yaml(study))
    both = [command(tmp_path), command(tmp_path)]
    shown = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], shown
    found = read_results(study, cells_of(study, ""), tmp_path / "runs/mine")
    assert found is not None
    assert without_times(found) == without_times(computed(study, tmp_path / "alone"))
    # Each run was trained once, by one of the two.
    sessions = [
        json.loads((cell_folder(cell, tmp_path / "runs/mine") / "run.json").read_text())["sessions"]
        for cell in cells_of(study, "")
    ]
    assert [len(each) for each in sessions] == [1] * 4


def test_what_a_folder_says_is_of_the_study_that_ended_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, other = tiny_study("maml", seeds=[0]), tiny_study("anil", seeds=[0])
    cells = cells_of(study, "")

    def computes(*given: Any, **more: Any) -> Any:
        begin(other, cells_of(other, ""), tmp_path)  # as another process does meanwhile
        return compute(*given, **more)

    monkeypatch.setattr("metaplug.experiments.study.running.compute", computes)
    run(study, cells, tmp_path, Workers(), json_to=None)
    assert begun(tmp_path)[0] == study
    assert [
        row["label"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]
    ] == ["maml"]


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, folder = tiny_study(seeds=[0]), tmp_path / "full"
    cells = cells_of(study, "")
    begin(study, cells, folder)
    real, written = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        written[0] += 1
        if written[0] > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fsync)
        failures = [failed for _, failed in compute(cells, folder, Workers())]
    texts = [failed.text for failed in failures if failed]
    assert texts
    assert all("No space left on device" in text for text in texts)
    assert without_times(computed(study, folder)) == without_times(
        computed(study, tmp_path / "alone")
    )
    assert all(finished(cell, folder) for cell in cells)
