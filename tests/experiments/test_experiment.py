"""One run in its folder: what it holds, and that killing and resuming it changes nothing."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from support.tiny_runs import assert_same, assert_same_run, stop_after, tiny

from metaplug import MetaLearner, RequestError, RunError, checkpoint, files
from metaplug.evaluation.history import Record
from metaplug.experiments.build import build, task_form
from metaplug.experiments.configuration import ExperimentConfig, to_yaml
from metaplug.experiments.json_values import environment, to_json
from metaplug.experiments.runs import load, read_metrics, train
from metaplug.experiments.runs.folder import RunFolder
from metaplug.experiments.runs.sessions import read_sessions
from metaplug.yaml_text import read_yaml


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(tiny(), folder) is not None
    return folder


def test_a_run_folder_holds_all_of_it(whole: Path) -> None:
    assert sorted(path.name for path in whole.iterdir()) == [
        *(
            ".lock",
            "best.safetensors",
            "config.yaml",
            "last.safetensors",
            "metrics.jsonl",
            "run.json",
            "summary.json",
        )
    ]
    lines = read_metrics(whole)
    assert [line["iteration"] for line in lines] == list(range(1, 13))
    assert [line["iteration"] for line in lines if "validation" in line] == [4, 8, 12]
    assert set(lines[3]) == {
        "iteration",
        "outer_loss",
        "meta_gradient_norm",
        "meta_lr",
        "figures",
        "validation",
    }
    assert set(lines[0]["figures"]) == {"gradient-sharing.gate/0", "gradient-sharing.momentum/0"}
    summary = json.loads((whole / "summary.json").read_text())
    best = min(
        (line for line in lines if "validation" in line),
        key=lambda line: line["validation"]["mean"],
    )
    assert summary["best_validation"]["iteration"] == best["iteration"]
    assert summary["best_validation"]["mean"] == best["validation"]["mean"]
    assert summary["test"]["num_tasks"] == 6
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["batching"]["choice"] == "vectorized"
    assert summary["precision"] == "float32"
    assert (whole / "config.yaml").read_text() == to_yaml(tiny())


def test_equal_seeds_give_identical_metrics(whole: Path, tmp_path: Path) -> None:
    train(tiny(), tmp_path / "again")
    assert_same_run(whole, tmp_path / "again")
    train(tiny(seed=1), tmp_path / "other")
    assert (whole / "metrics.jsonl").read_bytes() != (
        tmp_path / "other" / "metrics.jsonl"
    ).read_bytes()


def test_the_summary_tests_the_best_checkpoint(whole: Path) -> None:
    loaded = load(whole)
    summary = json.loads((whole / "summary.json").read_text())
    assert loaded.learner.iteration == summary["best_validation"]["iteration"]
    assert loaded.learner.evaluate(loaded.tasks.test, num_tasks=6).mean == summary["test"]["mean"]
    assert (
        loaded.learner.evaluate(loaded.tasks.val, num_tasks=4).mean
        == summary["best_validation"]["mean"]
    )


def test_a_checkpoint_is_a_learner(whole: Path) -> None:
    assert MetaLearner.load(whole / "last.safetensors").iteration == 12


def test_a_stopped_run_goes_on_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    for iterations in (1, 8, 12):
        folder = tmp_path / f"stopped-{iterations}"
        assert train(tiny(), folder, stop=stop_after(iterations)) is None
        assert not (folder / "summary.json").exists()
        assert MetaLearner.load(folder / "last.safetensors").iteration == iterations
        assert train(tiny(), folder, resume=True) is not None
        assert_same_run(whole, folder)


def test_an_incomplete_last_line_is_cut(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(tiny(), folder, stop=stop_after(6))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 7, "outer_lo')
    train(tiny(), folder, resume=True)
    assert_same_run(whole, folder)


def test_metrics_that_lack_lines_stop_a_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(tiny(), folder, stop=lambda: True)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(RunError) as error:
        train(tiny(), folder, resume=True)
    assert str(error.value) == (
        f"{folder}/metrics.jsonl lacks lines of the 1 iterations that its checkpoint has done: "
        f"bring them back, or train the run anew; "
        "its weights are whole"
    )


def test_a_run_that_is_there_is_refused(whole: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(RequestError) as error:
        train(tiny(), whole)
    assert (
        str(error.value)
        == f"the run folder {whole} already exists: give another --name or --out, or --resume "
        f"to go on with it"
    )
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_a_finished_run_is_left_as_it_is(whole: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert train(tiny(), whole, resume=True) == json.loads((whole / "summary.json").read_text())
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_another_configuration_cannot_resume_a_run(whole: Path) -> None:
    with pytest.raises(RequestError) as error:
        train(tiny(training__iterations=13), whole, resume=True)
    assert str(error.value) == (
        f"{whole} was begun with training.iterations = 12, which cannot become 13: "
        f"resume it as it was begun ({whole}/config.yaml), or give another --name"
    )


def test_settings_of_the_runtime_may_change_but_for_its_precision(tmp_path: Path) -> None:
    folder, seen = tmp_path / "run", []
    assert train(tiny(), folder, on_record=seen.append, stop=lambda: bool(seen)) is None
    with pytest.raises(
        RequestError,
        match=r"was begun with runtime.precision = 'float32', which cannot become 'bfloat16'",
    ):
        train(tiny(runtime__precision="bfloat16"), folder, resume=True)
    changed = tiny(runtime__checkpoint_steps=1)
    assert train(changed, folder, resume=True) is not None
    assert read_yaml(folder / "config.yaml") == changed.model_dump(mode="json")
    assert len(read_metrics(folder)) == 12


def test_a_configuration_that_was_edited_does_not_resume_another_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(tiny(), folder, stop=stop_after(5))
    other = tiny(learner={"inner_lr": 0.05, "inner_steps": 1})
    (folder / "config.yaml").write_text(to_yaml(other))
    with pytest.raises(RequestError) as error:
        train(other, folder, resume=True)
    assert str(error.value) == (
        f"{folder}/last.safetensors was trained with learner.inner_lr = 0.01, which cannot "
        f"become 0.05: "
        f"resume it as it was begun ({folder}/config.yaml), or give another --name"
    )
    (folder / "config.yaml").write_text("")
    with pytest.raises(RequestError) as error:
        train(tiny(), folder, resume=True)
    assert (
        str(error.value)
        == f"{folder}/config.yaml is empty, though a run has begun there: bring it back, or "
        f"give another --name"
    )


def test_without_its_last_checkpoint_a_run_goes_on_from_its_best(
    whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train(tiny(), folder, stop=stop_after(6))
    (folder / "last.safetensors").write_bytes(b"damaged")
    with pytest.raises(
        RunError,
        match=r"last\.safetensors is not a whole .*; or remove it, and --resume goes on from "
        r"best\.safetensors$",
    ):
        train(tiny(), folder, resume=True)
    (folder / "last.safetensors").unlink()
    begun: list[int] = []
    train(
        tiny(),
        folder,
        resume=True,
        on_start=lambda experiment: begun.append(experiment.learner.iteration),
    )
    assert begun == [4]
    assert_same_run(whole, folder)


def test_a_run_of_an_older_version_is_refused_and_left_as_it_is(
    whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train(tiny(), folder, stop=stop_after(6))
    for name in ("last", "best"):
        (folder / f"{name}.safetensors").unlink()
        torch.save({"format": 2}, folder / f"{name}.pt")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    said = "is of torch.save (.pt), as older versions of metaplug wrote: "
    said += "use the version that wrote it, or train again"
    with pytest.raises(RunError) as error:
        train(tiny(), folder, resume=True)
    assert str(error.value) == f"{folder}/last.pt {said}"
    with pytest.raises(RunError) as error:
        load(folder)
    assert str(error.value) == f"{folder}/best.pt {said}"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_damaged_metrics_are_said_before_the_rest_is_trained(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(tiny(), folder, stop=stop_after(6))
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[1], *lines[3:]]))
    with pytest.raises(RunError) as error:
        train(tiny(), folder, resume=True)
    assert (
        str(error.value)
        == f"{path}, line 3 is of iteration 2, so lines are missing or stand twice: train the "
        f"run anew"
    )


def test_a_lock_that_somebody_removed_ends_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def remove(record: Record) -> None:
        if record.step.iteration == 6:
            (folder / ".lock").unlink()

    with pytest.raises(
        RunError,
        match=r"^somebody removed .*/\.lock while this process was training there, and another "
        r"may have begun",
    ):
        train(tiny(), folder, on_record=remove)
    assert len(read_metrics(folder)) == 6
    assert MetaLearner.load(folder / "last.safetensors").iteration == 4


def test_a_stop_in_the_test_ends_it(whole: Path, tmp_path: Path) -> None:
    folder, trained = tmp_path / "run", []
    config = tiny()
    assert (
        train(config, folder, on_trained=lambda: trained.append(1), stop=lambda: bool(trained))
        is None
    )
    assert not (folder / "summary.json").exists()
    assert train(config, folder, resume=True) is not None
    assert_same_run(whole, folder)


def test_a_folder_of_something_else_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RequestError) as error:
        train(tiny(), tmp_path, resume=True)
    assert (
        str(error.value)
        == f"{tmp_path} holds no run to resume, as it has no config.yaml: give another --name "
        f"or --out"
    )
    with pytest.raises(RequestError) as error:
        train(tiny(), tmp_path / "notes.txt")
    assert (
        str(error.value)
        == f"{tmp_path}/notes.txt is a file, not a folder for a run: give another --name or --out"
    )


def test_resume_begins_where_nothing_is(whole: Path, tmp_path: Path) -> None:
    train(tiny(), tmp_path / "new", resume=True)
    assert_same_run(whole, tmp_path / "new")


def test_a_checkpoint_of_another_model_is_refused(whole: Path, tmp_path: Path) -> None:
    wider = tiny(model__settings={"hidden": [5]})
    train(wider, tmp_path / "wider", stop=lambda: True)
    saved = {**checkpoint.read(whole / "last.safetensors"), "config": to_yaml(wider)}
    checkpoint.write(
        tmp_path / "wider" / "last.safetensors",
        {name: value for name, value in saved.items() if name != "format"},
    )
    with pytest.raises(
        RunError,
        match=r"last\.safetensors belongs to another model: 'body\.0\.weight' is \(4, 1\) "
        r"there and \(5, 1\) here",
    ):
        train(wider, tmp_path / "wider", resume=True)


def test_a_wrong_request_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RequestError):
        train(
            tiny(plugins=[{"plugin": "gradient-sharing", "settings": {"gate": 2}}]),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_not_finite_stop_a_run_and_keep_its_checkpoint(tmp_path: Path) -> None:
    config = tiny(
        plugins=[],
        learner={"inner_lr": 0.01, "inner_steps": 1, "meta_lr": 10.0},
        training__iterations=400,
    )
    config = config.model_copy(
        update={"learner": config.learner.model_copy(update={"inner_lr": 1000.0, "inner_steps": 5})}
    )
    with pytest.raises(RunError, match=r"^iteration 1 stopped, nothing was updated: "):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


def test_validations_that_are_not_finite_are_never_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "metaplug.evaluation.score_tasks.Scorer.__call__",
        lambda *_: torch.full((4,), torch.nan, dtype=torch.float64),
    )
    skip = tiny(training__non_finite="skip")
    with pytest.warns(UserWarning, match="counts for nothing"), pytest.raises(RunError) as error:
        train(skip, tmp_path / "run")
    assert str(error.value) == (
        f"no validation of {tmp_path}/run was finite, so there is nothing to test: try a "
        f"smaller learning rate"
    )
    validation = read_metrics(tmp_path / "run")[3]["validation"]
    assert validation["metric"] == "mean squared error"
    assert [validation[name] for name in ("mean", "interval", "low", "high")] == [None] * 4


def test_a_file_system_that_cannot_sync_folders_is_no_hindrance(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    train(tiny(), tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


def test_a_folder_that_cannot_be_made_sure_of_is_said_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "sync_folder", fails)
    with pytest.raises(RunError) as error, files.replacing(tmp_path / "a") as file:
        file.write(b"new")
    assert (
        str(error.value)
        == f"{tmp_path}/a is written, but may be gone if the machine fails now: Input/output "
        f"error; see to the disk"
    )
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_pipe_or_device_is_written_into_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    (tmp_path / "none").symlink_to(os.devnull)
    for name in ("pipe", "none"):
        with files.replacing(tmp_path / name) as file:
            file.write(b"text")
    assert os.read(reader, 10) == b"text"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none", "pipe"]
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "none").is_char_device()
    os.close(reader)


def test_a_run_that_another_process_finishes_meanwhile_is_left_as_it_is(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    train(tiny(), folder, stop=stop_after(5))
    real = RunFolder._acquire

    def late(self: RunFolder) -> None:
        monkeypatch.setattr(RunFolder, "_acquire", real)
        train(tiny(), folder, resume=True)
        real(self)

    monkeypatch.setattr(RunFolder, "_acquire", late)
    summary = train(tiny(), folder, resume=True)
    assert summary == json.loads((folder / "summary.json").read_text())
    assert len(read_sessions(folder)) == 2
    assert_same_run(whole, folder)


def test_a_full_disk_is_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError) as error:
        train(tiny(), tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    assert str(error.value) == (
        f"cannot write {path}: No space left on device; nothing was left there; make room or "
        f"give another place, then do it again"
    )
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == [".lock"]


def test_what_load_refuses(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as error:
        load(tmp_path / "nope")
    assert str(error.value) == (
        f"there is no run {tmp_path}/nope: give the folder of a run that `metaplug train` has "
        f"validated at least once"
    )
    (tmp_path / "run").mkdir()
    with pytest.raises(
        RequestError, match=r"run has no best\.safetensors yet: give the folder of a run"
    ):
        load(tmp_path / "run")
    build(tiny()).learner.save(tmp_path / "learner.pt")
    with pytest.raises(RequestError) as error:
        load(tmp_path / "learner.pt")
    assert (
        str(error.value)
        == f"{tmp_path}/learner.pt holds a learner without its experiment: load it in Python "
        f"with MetaLearner.load"
    )


def test_the_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = build(tiny()).learner.model.state_dict()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert_same(dict(one), dict(build(tiny(plugins=[])).learner.model.state_dict()))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(
        one["head.weight"], build(tiny(seed=1)).learner.model.state_dict()["head.weight"]
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sinusoids", "unknown task source 'sinusoids': did you mean 'sinusoid'?"),
        (
            "sinusoid:x",
            "the task source 'sinusoid' takes no argument, but 'sinusoid:x' gives one: write "
            "sinusoid",
        ),
        ("folder", "the task source 'folder' needs a path after a colon: write folder:PATH"),
        ("folder:", "the task source 'folder' needs a path after a colon: write folder:PATH"),
    ],
)
def test_task_sources_that_are_refused(source: str, message: str) -> None:
    with pytest.raises(RequestError) as error:
        build(tiny(tasks__source=source))
    assert str(error.value) == message


def test_precision_and_capture_reach_the_learner() -> None:
    learner = build(tiny(runtime__precision="bfloat16", runtime__capture="auto")).learner
    assert environment(learner)["precision"] == "bfloat16"
    assert learner.engine.derivation is None
    with pytest.raises(
        RequestError, match=r"^capture is for steps on a CUDA device, but the model is on cpu: "
    ):
        build(tiny(runtime__capture=True))


def test_the_form_of_tasks() -> None:
    assert task_form(tiny()) == ["3-shot"]
    assert task_form(ExperimentConfig()) == ["5-way", "1-shot"]


def test_json_knows_no_nan() -> None:
    assert to_json({"a": [float("nan"), 1.5, (float("inf"),)]}) == '{"a": [null, 1.5, [null]]}'


def test_what_is_done_after_training_is_done_before_the_test_in_a_folder_that_is_held(
    tmp_path: Path,
) -> None:
    folder, seen = tmp_path / "run", []

    def look() -> None:
        with (
            pytest.raises(RequestError, match="is in the hands of another process"),
            RunFolder(folder) as other,
        ):
            other.check(tiny(), resume=True)
        seen.append((len(read_metrics(folder)), (folder / "summary.json").exists()))

    train(tiny(), folder, on_trained=look, stop=stop_after(5))
    train(tiny(), folder, on_trained=look, resume=True)
    train(tiny(), folder, on_trained=look, resume=True)
    assert seen == [(5, False), (12, False)]


def test_a_run_that_was_refused_in_its_first_iteration_leaves_its_name_free(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "named"
    with pytest.raises(RequestError, match="makes the inner update itself"):
        train(tiny(preset="alfa", learner__inner_optimizer="adam"), folder)
    assert (folder / "config.yaml").exists()
    train(tiny(preset="alfa"), folder)
    assert (folder / "summary.json").exists()
    with pytest.raises(RequestError, match="already exists"):
        train(tiny(preset="alfa"), folder)
