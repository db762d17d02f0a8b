"""The same seed gives the same run: it records itself, and can be trained again and compared."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_runs import assert_same_run, stop_after, tiny

from metaplug import MetaLearner, RequestError, RunError, commits, hookimpl
from metaplug.cli.main import main
from metaplug.execution.determinism import repeatable
from metaplug.experiments.runs import sessions, train
from metaplug.experiments.runs.repeating import (
    Repetition,
    check_same,
    compare_runs,
    configuration_of,
)
from metaplug.experiments.runs.sessions import read_sessions
from metaplug.testing import Problem, problem

OPTIONS = [
    "--tasks",
    "sinusoid",
    "--model",
    "mlp",
    "--inner-lr",
    "0.01",
    "--iterations",
    "12",
    "--with",
    "gradient-sharing",
]
OPTIONS += [
    "--set",
    "training.validate_every=4",
    "--set",
    "training.validation_tasks=4",
    "--set",
    "training.test_tasks=6",
]
OPTIONS += ["--set", "runtime.threads=1", "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(), folder)
    return folder


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit status of a command, and what it printed: standard output, then standard error."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return int(end.value.code or 0), "".join(capsys.readouterr())


# What a run records.


def test_a_session_holds_what_it_takes_to_repeat_a_run(whole: Path) -> None:
    [session] = read_sessions(whole)
    assert set(session) == {
        *(
            "command",
            "folder",
            "began",
            "iteration",
            "seed",
            "process",
            "platform",
            "commits",
            "versions",
            "device",
            "threads",
        ),
        *("precision", "deterministic", "ranks"),
    }
    assert {"metaplug", "torch", "higher", "numpy", "pillow", "python"} <= set(session["versions"])
    assert session["versions"]["torch"] == torch.__version__
    assert (session["device"], session["threads"], session["seed"], session["iteration"]) == (
        "cpu",
        1,
        0,
        0,
    )
    assert session["process"]["pid"] == os.getpid()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", session["began"])


def test_every_process_that_trains_a_run_adds_its_session(tmp_path: Path) -> None:
    train(tiny(), tmp_path / "run", stop=stop_after(5))
    train(tiny(), tmp_path / "run", resume=True)
    assert [session["iteration"] for session in read_sessions(tmp_path / "run")] == [0, 5]


def test_the_command_is_recorded_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["/somewhere/bin/metaplug", "train", "--set", "model.settings={hidden: [4]}"]
    )
    assert sessions._command() == "metaplug train --set 'model.settings={hidden: [4]}'"
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    assert sessions._command() == "mine.py"


def test_the_commit_is_that_of_a_checkout_that_tracks_the_folder(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(
            ["git", *who, "-C", str(tmp_path), *arguments],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    commits.commit_of.cache_clear()
    assert commits.commit_of(tmp_path) is None
    git("init")
    (tmp_path / "mine.py").write_text("1")
    (tmp_path / "ignored").mkdir()
    git("add", "mine.py")
    git("commit", "-m", "one")
    commits.commit_of.cache_clear()
    assert commits.commit_of(tmp_path) == git("rev-parse", "HEAD")
    assert commits.commit_of(tmp_path / "ignored") is None
    (tmp_path / "mine.py").write_text("2")
    (tmp_path / os.fsdecode(b"\xff.py")).write_text("1")
    git("config", "core.quotepath", "false")
    git("add", ".")
    commits.commit_of.cache_clear()
    assert commits.commit_of(tmp_path) == f"{git('rev-parse', 'HEAD')}-dirty"


@pytest.mark.parametrize(
    "content", ["", "[]", '{"sessions": 1}', '{"sessions": [1]}', "[" * 100_000, "\udcff"]
)
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(RunError) as error:
        read_sessions(tmp_path)
    assert (
        str(error.value)
        == f"{path} is not the record of a run that metaplug wrote: remove it, and the run "
        f"goes on with a new one"
    )


# Two processes.


def test_two_processes_write_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "other"):
        line = [
            sys.executable,
            "-m",
            "metaplug",
            "train",
            *OPTIONS,
            "--out",
            str(tmp_path),
            "--name",
            name,
        ]
        subprocess.run(line, check=True, capture_output=True, timeout=120)
    assert_same_run(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "config.yaml").read_bytes() == (
        tmp_path / "other" / "config.yaml"
    ).read_bytes()


# train --from.


def test_a_run_is_trained_again_and_matches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path)]
    assert command(capsys, "train", *OPTIONS, *out, "--name", "mine")[0] == 0
    status, words = command(capsys, "train", "--from", f"{tmp_path}/mine", *out)
    assert status == 0
    said = f"matches {tmp_path}/mine bit for bit: 12 iterations and the test"
    assert said in words.splitlines()
    assert_same_run(tmp_path / "mine", tmp_path / "mine-repeated")
    status, words = command(
        capsys,
        "train",
        "--from",
        f"{tmp_path}/mine",
        *out,
        "--name",
        "another",
        "--set",
        "runtime.checkpoint_steps=1",
    )
    assert (status, (tmp_path / "another" / "summary.json").exists()) == (0, True)


def test_a_run_is_not_held_against_itself(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(whole)
    for source, out, name in (
        (whole, whole.parent, whole.name),
        (whole, tmp_path, "link"),
        (tmp_path / "link", whole.parent, whole.name),
    ):
        for more in ([], ["--resume"]):
            status, words = command(
                capsys, "train", "--from", str(source), "--out", str(out), "--name", name, *more
            )
            assert status == 2
            assert words == (
                f"metaplug: --from {source}: {out / name} is that run itself, which matches "
                f"itself whatever it holds: "
                "give a --name that is not taken\n"
            )


def test_a_run_that_does_not_match_says_where_and_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path)]
    command(capsys, "train", *OPTIONS, *out, "--name", "mine")
    lines = (tmp_path / "mine" / "metrics.jsonl").read_text().splitlines(keepends=True)
    values = json.loads(lines[6])
    lines[6] = json.dumps({**values, "outer_loss": 2.5}) + "\n"
    (tmp_path / "mine" / "metrics.jsonl").write_text("".join(lines))
    record = json.loads((tmp_path / "mine" / "run.json").read_text())
    record["sessions"][0]["versions"]["torch"] = "2.0.0"
    (tmp_path / "mine" / "run.json").write_text(json.dumps(record))
    status, words = command(capsys, "train", "--from", f"{tmp_path}/mine", *out)
    assert status == 1
    size = abs(2.5 - values["outer_loss"]) / max(2.5, values["outer_loss"])
    assert words.splitlines()[-1] == (
        f"metaplug: {tmp_path}/mine-repeated does not match {tmp_path}/mine bit for bit over "
        f"12 iterations and the test: iteration 7 is "
        f"the first to differ (outer_loss 2.5 there, {values['outer_loss']} here; largest "
        f"relative difference {size:.1e}); "
        f"torch 2.0.0 there, {torch.__version__} here: repeat it with the same versions, "
        f"threads and kind of device, or judge by the size "
        "of the difference"
    )


def test_an_unfinished_run_is_compared_as_far_as_it_came(whole: Path, tmp_path: Path) -> None:
    train(tiny(), tmp_path / "begun", stop=stop_after(5))
    assert compare_runs(tmp_path / "begun", whole) == Repetition(
        5, tested=False, fault=None, changes=()
    )
    assert compare_runs(whole, whole) == Repetition(12, tested=True, fault=None, changes=())


def test_a_test_that_alone_differs_is_found(whole: Path, tmp_path: Path) -> None:
    train(tiny(), tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    mean = summary["test"]["mean"]
    summary["test"]["mean"] = mean * 2
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    fault = (
        f"the test alone differs (mean {mean} there, {mean * 2} here; largest relative "
        f"difference 5.0e-01)"
    )
    assert compare_runs(whole, tmp_path / "run").fault == fault


def test_a_run_without_its_record_is_compared_all_the_same(whole: Path, tmp_path: Path) -> None:
    train(tiny(), tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    assert compare_runs(tmp_path / "run", whole) == Repetition(
        12, tested=True, fault=None, changes=(f"{tmp_path}/run has no run.json",)
    )


@pytest.mark.parametrize("damaged", ["run.json", "summary.json"])
def test_a_damaged_run_is_refused_before_it_is_trained_again(
    whole: Path, tmp_path: Path, damaged: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "damaged", tmp_path / "out"
    shutil.copytree(whole, source)
    (source / damaged).write_text((source / damaged).read_text()[:40])
    status, words = command(capsys, "train", "--from", str(source), "--out", str(out))
    assert (status, words.count("\n")) == (1, 1)
    assert words.startswith(f"metaplug: {source / damaged} is not ")
    assert not out.exists()


def test_what_cannot_be_repeated_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RequestError) as error:
        configuration_of(tmp_path)
    assert str(error.value) == (
        f"--from {tmp_path}: no iteration of a run is there to repeat; give a folder that "
        f"metaplug train wrote"
    )
    with pytest.raises(RequestError) as error:
        check_same(whole, tiny(seed=1), None)
    assert str(error.value) == (
        f"--from {whole}: with another seed it would be another run; leave that option out, or "
        f"train a new run from {whole}/config.yaml"
    )
    check_same(whole, tiny(runtime__checkpoint_steps=1), None)
    with pytest.raises(RequestError) as error:
        check_same(whole, tiny(model={"name": "os:system"}), None)
    assert str(error.value) == (
        f"--from {whole}: {whole}/config.yaml names code for its model, 'os:system', which "
        f"nobody lets run because a file says so: "
        "if it is your own, give --model os:system"
    )
    (tmp_path / "mine.yaml").write_text("seed: 1")
    status, words = command(capsys, "train", f"{tmp_path}/mine.yaml", "--from", str(whole))
    assert status == 2
    assert (
        words == f"metaplug: --from {whole} and {tmp_path}/mine.yaml: both give a configuration; "
        f"leave one of them out\n"
    )


# runtime.deterministic.


def settings() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark


def test_deterministic_holds_inside_a_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = settings()
    with repeatable(False):
        assert settings() == before
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with repeatable(True):
        assert settings() == (True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert settings() == before
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # which cuBLAS has read by then
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def seen_in_training(learner: Callable[..., MetaLearner], problem: Problem) -> list[bool]:
    """Whether torch was deterministic in every inner step of a training step and an evaluation."""
    seen: list[bool] = []

    @hookimpl
    def transform_gradients(gradients: Any) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())

    made = learner(transform_gradients)
    made.engine.meta_step(problem.batch, 1)
    made.engine.evaluate(problem.batch, 1)
    return seen


def test_a_learner_is_deterministic_where_it_is_asked_to_be() -> None:
    case = problem()
    for wanted in (False, True):
        seen = seen_in_training(
            lambda hook, wanted=wanted: case.learner(plugins=[hook], deterministic=wanted), case
        )
        assert set(seen) == {wanted}


def test_an_operation_that_has_no_deterministic_algorithm_is_named() -> None:
    class Puts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output = self.layer(x)
            return output + torch.zeros_like(output).put_(torch.tensor([0]), torch.ones(1))

    batch = problem(dtype=torch.float32).batch
    assert MetaLearner(Puts(), task_batching="sequential").meta_gradients(batch)
    with pytest.raises(RunError) as error:
        MetaLearner(Puts(), task_batching="sequential", deterministic=True).meta_gradients(batch)
    assert str(error.value) == (
        "a deterministic run cannot be had of this model and these plugins (put_ does not have "
        "a deterministic implementation): "
        "replace that operation, or leave deterministic out"
    )


def test_the_configuration_reaches_the_learner_and_the_record(tmp_path: Path) -> None:
    train(tiny(runtime__deterministic=True), tmp_path / "run")
    assert read_sessions(tmp_path / "run")[0]["deterministic"] is True
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["deterministic"] is True
    assert not torch.are_deterministic_algorithms_enabled()
