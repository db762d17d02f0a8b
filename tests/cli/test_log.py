"""`metaplug train --log`: its syntax, what it takes the place of, and what it refuses."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml
from support.tiny_runs import TINY

from metaplug.cli.main import main
from metaplug.cli.resolving import resolve_options
from metaplug.contract import registry

Command = Callable[..., tuple[int, list[str]]]

LINES = """
from pathlib import Path
from metaplug import Logger, LoggerConfig


class Part(Logger):
    class Config(LoggerConfig):
        file: str = "lines.txt"
        fails: bool = False

    def log(self, step, *, durable):
        if self.config.fails:
            raise ConnectionError("the server is gone")
        with Path(self.config.file).open("a") as file:
            file.write(f"{step.iteration} ")
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A logger `lines` of an installed package, in a folder with a configuration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("logging_of_mine.py").write_text(LINES)
    training = {**TINY["training"], "iterations": 4}
    Path("tiny.yaml").write_text(
        yaml.safe_dump({**TINY, "training": training, "loggers": ["lines"]})
    )
    real, mine = (
        registry.entry_points,
        EntryPoint("lines", "logging_of_mine:Part", "metaplug.loggers"),
    )
    monkeypatch.setattr(
        registry, "entry_points", lambda group: real(group) + [mine] * (group == mine.group)
    )
    yield
    sys.modules.pop("logging_of_mine", None)


@pytest.fixture
def metaplug(capfd: pytest.CaptureFixture[str]) -> Command:
    def run(*words: str) -> tuple[int, list[str]]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(list(words))
        lines = capfd.readouterr().err.splitlines()
        return int(stopped.value.code or 0), [line for line in lines if "metaplug:" in line]

    return run


ALL = "1 2 3 4 "


def test_a_run_is_logged_and_repeated_without_the_loggers_of_its_record(metaplug: Command) -> None:
    assert metaplug("train", "tiny.yaml", "--name", "mine") == (0, [])
    assert Path("lines.txt").read_text() == ALL
    assert metaplug("train", "--from", "runs/mine", "--log", "lines:file=again.txt") == (0, [])
    assert (Path("lines.txt").read_text(), Path("again.txt").read_text()) == (ALL, ALL)


def test_a_finished_run_is_not_logged_and_that_is_said(metaplug: Command) -> None:
    assert metaplug("train", "tiny.yaml") == (0, [])
    Path("lines.txt").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        again = metaplug("train", "tiny.yaml", "--resume", "--log", "lines")
    said = "metaplug: warning: --log has nothing to show: it shows a run while it trains"
    assert again == (0, [said])
    assert not Path("lines.txt").exists()


def test_a_logger_that_fails_is_one_line_and_the_run_succeeds(metaplug: Command) -> None:
    said = (
        "metaplug: warning: the logger 'lines' could not log iteration 1 (ConnectionError: the "
        "server is gone): training goes on without it"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert metaplug("train", "tiny.yaml", "--log", "lines:fails=true") == (0, [said])
    assert Path("runs/tiny/summary.json").exists()


def test_an_option_takes_the_place_of_the_same_logger_in_a_file() -> None:
    logs = ["wandb:project=letters,mode=offline", "lines:file=b.txt"]
    found = resolve_options({}, None, config=Path("tiny.yaml"), logs=logs).config.loggers
    assert [(use.logger, use.settings) for use in found] == [
        ("wandb", {"project": "letters", "mode": "offline"}),
        ("lines", {"file": "b.txt"}),
    ]
    found = resolve_options({}, None, config=Path("tiny.yaml"), logs=["jsonl"]).config.loggers
    assert [use.logger for use in found] == ["lines", "jsonl"]


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("tensorbord", "unknown logger 'tensorbord': did you mean 'tensorboard'?"),
        (":a=b", "':a=b' names no logger: write logger or logger:field=value,field=value"),
        ("wandb:letters", "'letters' is no setting of logger 'wandb': write field=value"),
        ("wandb:projekt=x", "logger 'wandb': unknown field 'projekt': did you mean 'project'?"),
        ("mlflow:experiment=1", "logger 'mlflow': experiment = 1: input should be a valid string"),
    ],
)
def test_a_wrong_logger_is_refused_before_training(metaplug: Command, log: str, said: str) -> None:
    assert metaplug("train", "tiny.yaml", "--log", log) == (2, [f"metaplug: {said}"])
    assert not Path("runs").exists()


def test_one_logger_twice_is_refused(metaplug: Command) -> None:
    status, (said,) = metaplug("train", "tiny.yaml", "--log", "wandb", "--log", "wandb")
    assert status == 2
    assert said.endswith(
        "the logger 'wandb' stands twice, and would log every figure twice: leave one of them out"
    )
    Path("own.yaml").write_text("defaults: {loggers: [lines]}")
    assert metaplug("train", "--preset", "own.yaml") == (
        2,
        [
            "metaplug: own.yaml: defaults = {'loggers': ['lines']}: a preset sets no loggers by "
            "default: give them by --log"
        ],
    )
