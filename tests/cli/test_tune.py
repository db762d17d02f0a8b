"""metaplug tune: what it prints where, what it refuses before the first trial, and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from support.tiny_runs import tiny

from metaplug import EvaluationResult, MetaLearner, Record
from metaplug.cli.main import main
from metaplug.execution.engine import MetaStep
from metaplug.experiments.runs import training
from metaplug.experiments.tuning import Outcome, Trial
from metaplug.report.tuning import TuningProgress

TINY = shlex.split(
    "tune --tasks sinusoid --model mlp --shots 3 --queries 3 --inner-steps 1 --tasks-per-batch 2 "
    "--iterations 4 --device cpu --set training.validate_every=2 --set training.validation_tasks=4 "
    "--set model.settings.hidden=[4] --set runtime.threads=1 --name mine"
)
LR = ["--search", "learner.inner_lr=log:0.001..0.1"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def metaplug(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, *capfd.readouterr()

    return run


def test_results_are_on_standard_output_and_progress_is_not(metaplug: Any) -> None:
    status, out, err = metaplug(*TINY, *LR, "--trials", "2")
    assert status == 0
    lines = [line.split() for line in out.splitlines() if line.strip()]
    assert lines[0] == ["Best", "trials,", "by", "validation"]
    assert " ".join(lines[1]) == "trial mean squared error after iteration learner.inner_lr"
    assert {line[0] for line in lines[3:5]} == {"0", "1"}
    said = " ".join(out.split())
    assert "2 trials: 2 complete, 0 pruned, 0 failed." in said
    assert re.search(
        r"The value of trial \d is the best of 2 trials on the same 4 validation tasks, so it is "
        r"optimistic: report the test of metaplug train best.yaml instead.$",
        said,
    )
    value = r"mean squared error \S+ ± \S+  best \S+"
    assert re.fullmatch(
        r"maml \(no plugins\) on sinusoid, 3-shot, mlp, seed 0, cpu\n"
        rf"trial 0: {value} \(trial 0\)\ntrial 1: {value} \(trial [01]\)\n"
        r"the best configuration is runs/mine/best.yaml; all of it is in runs/mine\n",
        err,
    )
    status, out, err = metaplug(*TINY, *LR, "--trials", "2", "--json")
    values = json.loads(out)
    assert values == json.loads(Path("runs/mine/tuning.json").read_text())
    assert values["search"] == {"learner.inner_lr": "log:0.001..0.1"}
    assert err.startswith("going on after 2 trials\nthe best configuration is ")
    less = ["--set", "training.test_tasks=2", "--name", "best"]
    assert metaplug("train", "runs/mine/best.yaml", *less)[0] == 0
    assert Path("runs/best/summary.json").exists()


def test_a_terminal_shows_one_bar_with_the_best_so_far() -> None:
    text = StringIO()
    console = Console(file=text, force_terminal=True, width=120, color_system=None)
    config = tiny()
    done = Trial(0, "complete", {}, 0.5, 0.25, 8, 12)
    outcome = Outcome("accuracy", {}, config, (done,), 4, {})
    result = EvaluationResult("accuracy", torch.tensor([0.5, 0.75]), 1)
    step = MetaStep(8, 0.1, 1.0, 0.001, {})
    with TuningProgress(console, config) as progress:
        progress.begin(outcome)
        progress.record(4, Record(step, result))
    shown = text.getvalue()
    assert "going on after 1 trial\n" in shown
    assert re.search(r"trial 4 .*1/4 .*iteration 8/12  validation 62\.50 %  best 50\.00 % ", shown)


def test_ranges_stand_in_a_file_too_and_options_override_it(metaplug: Any) -> None:
    search = {"learner": {"inner_lr": "0..1"}, "learner.inner_optimizer": ["sgd", "adam"]}
    Path("base.yaml").write_text(yaml.safe_dump({"seed": 3, "search": search}))
    status, out, _ = metaplug("tune", "base.yaml", *LR, "--trials", "1", "--json", *TINY[1:-2])
    assert status == 0
    assert json.loads(out)["search"] == {
        "learner.inner_optimizer": "[sgd, adam]",
        "learner.inner_lr": "log:0.001..0.1",
    }
    assert json.loads(out)["seed"] == 3
    assert [*Path("runs").glob("tuned-base-*/best.yaml")]


ERRORS: list[tuple[str, str]] = [
    (
        "",
        "there is no field to search: give one, as --search learner.inner_lr=log:0.01..1",
    ),
    (
        "--search learner.inner_lr",
        "--search learner.inner_lr: no value is given; write --search FIELD=VALUE",
    ),
    (
        "--search inner_lr=0.1..1",
        "--search inner_lr=0.1..1: a field is given by its whole path in the configuration; write "
        "--search learner.inner_lr=0.1..1",
    ),
    (
        "--search learner.inner_lr=0.1",
        "--search learner.inner_lr=0.1: it is no range of values: write LOW..HIGH, log:LOW..HIGH, "
        "or a list as [sgd, adam]",
    ),
    (
        "--search learner.inner_steps=1..5",
        "--search learner.inner_steps=1..5: --inner-steps sets this field, too: leave one of them "
        "out",
    ),
    (
        "--search learner.meta_lr=0.1..1 --set learner.meta_lr=1",
        "--search learner.meta_lr=0.1..1: --set sets this field, too: leave one of them out",
    ),
    (
        "--with gradient-sharing:gate=1 --search plugins.gradient-sharing.gate=0..1",
        "--search plugins.gradient-sharing.gate=0..1: --with sets this field, too: leave one of "
        "them out",
    ),
    (
        "--search learner.inner_lr=0..2000",
        "--search learner.inner_lr=0..2000: learner.inner_lr = 2000.0: input should be less than "
        "or equal to 1000",
    ),
    (
        "--search learner.inner_lr=log:0..1",
        "--search learner.inner_lr=log:0..1: 0.0 has no logarithm: begin above 0, or leave out "
        "log:",
    ),
    (
        "--search preset=[maml,anil]",
        '--search preset=["maml", "anil"]: two algorithms are two searches: tune each under '
        "its own --preset, or search a field of its plugins as preset.NAME.FIELD",
    ),
    (
        "--trials 0 --search learner.inner_lr=0..1",
        "Invalid value for '--trials': Input should be greater than or equal to 1",
    ),
    (
        "--name a/b",
        "--name a/b: a name is no path; give the folder that holds runs by --out, and a plain name",
    ),
    (
        f"--name {'ü' * 101}",
        f"--name {'ü' * 40}...: a name has at most 200 bytes, all of letters that can be shown: "
        "give another",
    ),
    (
        "--name a\u202eb",
        "--name a?b: a name has at most 200 bytes, all of letters that can be shown: give another",
    ),
]


@pytest.mark.parametrize(("words", "message"), ERRORS, ids=[words for words, _ in ERRORS])
def test_a_wrong_request_is_one_line_before_the_first_trial(
    metaplug: Any, words: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(MetaLearner, "iterate")
    assert metaplug(*TINY, *shlex.split(words)) == (2, "", f"metaplug: {message}\n")
    assert list(Path().iterdir()) == []


def test_a_wrong_search_in_a_file_names_the_file(metaplug: Any) -> None:
    Path("e.yaml").write_text("search: learner.inner_lr\n")
    assert metaplug("tune", "e.yaml")[2] == (
        "metaplug: e.yaml: search is no mapping: write a line as learner.inner_lr: log:0.01..1\n"
    )
    Path("e.yaml").write_text("search:\n  learner.inner_steps: 1..2.5\n")
    assert metaplug("tune", "e.yaml")[2] == (
        "metaplug: e.yaml, search: learner.inner_steps=1..2.5: the field takes whole numbers, and "
        "2.5 is none: write 1..5\n"
    )


def test_ranks_are_refused(metaplug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert metaplug(*TINY, *LR)[2] == (
        "metaplug: metaplug tune on 2 ranks: it runs in one process; start it without torchrun, as "
        "a search trains one trial at a time\n"
    )


def test_ctrl_c_stops_after_the_step_and_the_same_command_goes_on(
    metaplug: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = training._Run._log

    def interrupt(self: Any, record: Any, **options: Any) -> None:
        log(self, record, **options)
        if record.step.iteration == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_log", interrupt)
        status, out, err = metaplug(*TINY, *LR, "--trials", "1")
    assert (status, out) == (130, "")
    assert err.partition("\n")[2] == (
        "stopping after this step; Ctrl-C again stops at once\n"
        "metaplug: stopped, with all of it in runs/mine: the same command goes on\n"
    )
    status, _, err = metaplug(*TINY, *LR, "--trials", "1")
    assert (status, err.count("\n")) == (0, 3)
