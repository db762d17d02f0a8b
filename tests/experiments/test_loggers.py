"""Loggers: what each library reads back, none that ends a run, none that changes a result."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from support.tiny_runs import assert_same, die, exit_status, in_child, stop_after, tiny

from metaplug import LoggedRun, LoggedStep, Logger, LoggerConfig, RequestError, RunError, checkpoint
from metaplug.contract import registry
from metaplug.errors import RankError
from metaplug.experiments.loggers import tables
from metaplug.experiments.loggers.jsonl import step_of
from metaplug.experiments.loggers.wandb_files import read_history, read_records
from metaplug.experiments.runs import load, read_metrics, train


def interrupted(
    folder: Path,
    logger: dict[str, Any] | str,
    library: str,
    ended: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train with a logger: killed after iteration 7, stopped after 9, and then to the end.

    `ended` is what the library does as a process ends.
    """
    import_module(library)  # once, before the process is forked
    config, picture = tiny(loggers=[logger]), folder / "curves.png"

    def killed() -> None:
        train(config, folder, on_record=lambda record: record.step.iteration == 7 and die())

    assert exit_status(in_child(killed)) == -signal.SIGKILL
    assert train(config, folder, resume=True, stop=stop_after(5)) is None
    ended()
    draw = Image.new("RGB", (4, 3), "teal").save
    summary = train(config, folder, resume=True, on_trained=lambda: draw(picture))
    ended()
    assert summary is not None
    return summary


def measured(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Iterations and figures by name, as metrics.jsonl has them."""
    found = dict[str, list[tuple[int, float]]]()
    for line in read_metrics(folder):
        for name, value in step_of(line).values.items():
            found.setdefault(name, []).append((line["iteration"], value))
    return found


def test_tensorboard_reads_every_point_once(tmp_path: Path) -> None:
    summary = interrupted(tmp_path / "mine", "tensorboard", "torch.utils.tensorboard")
    reader = import_module("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(tmp_path / "mine/tensorboard")).Reload()
    tags, wanted = events.Tags(), measured(tmp_path / "mine")
    assert {*tags["scalars"]} - wanted.keys() == {
        "test/mean squared error",
        "test/interval",
        "test/num_tasks",
    }
    for name, points in wanted.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], name
    (test,) = events.Scalars("test/mean squared error")
    assert (test.step, test.value) == (12, pytest.approx(summary["test"]["mean"], rel=1e-6))
    texts = {
        tag: [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
        for tag in tags["tensors"]
    }
    assert {tag: len(each) for tag, each in texts.items()} == {
        "configuration/text_summary": 1,
        "final/text_summary": 1,
    }
    assert "| training.iterations | 12 |\n" in texts["configuration/text_summary"][0]
    assert "| test/num_tasks | 6 |\n" in texts["final/text_summary"][0]
    (picture,) = events.Images("curves")
    assert (picture.width, picture.height) == (4, 3)


def test_wandb_writes_every_point_once_offline(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    use = {"logger": "wandb", "settings": {"project": "p"}}
    written = import_module("wandb").teardown  # waits until its service has written the files
    summary = interrupted(mine, use, "wandb", written)
    files = sorted(mine.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 3 and len({file.name for file in files}) == 1  # all of one id
    found = dict[str, list[tuple[int, float]]]()
    for step, values in (pair for file in files for pair in read_history(file)):
        for name, value in values.items():
            found.setdefault(name, []).append((step, value))
    for name, points in measured(mine).items():
        assert found[name] == points, name
    assert found["curves.width"] == [(13, 4)]
    records = [*read_records(files[-1])]
    (run,) = (record.run for record in records if record.HasField("run"))
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.project, run.display_name, settings["training.iterations"]) == ("p", "mine", 12)
    final = {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for record in records
        for item in record.summary.update
    }
    assert final["test/mean squared error"] == summary["test"]["mean"]
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]


def test_mlflow_reads_every_point_once_from_the_runs_folder(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    summary = interrupted(mine, "mlflow", "mlflow")
    client = import_module("mlflow").MlflowClient(tracking_uri=(mine / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("metaplug").experiment_id])
    for name, points in measured(mine).items():
        history = client.get_metric_history(run.info.run_id, name)
        assert [(point.step, point.value) for point in history] == points, name
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params["training.iterations"] == "12"
    assert run.data.metrics["test/mean squared error"] == summary["test"]["mean"]
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"curves.png", "summary.json"}


def test_an_experiment_of_mlflow_that_another_run_has_just_made_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = import_module("mlflow")
    real, asked = mlflow.MlflowClient.get_experiment_by_name, list[str]()

    def late(client: Any, name: str) -> Any:
        asked.append(name)
        if len(asked) > 1:
            return real(client, name)
        client.create_experiment(name)  # as the other run does, right after this look
        return None

    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", late)
    train(tiny(loggers=["mlflow"], training__iterations=1), tmp_path / "mine")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mine/mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("metaplug").experiment_id])
    assert run.info.status == "FINISHED"


class Kept(Logger):
    """Keeps what it is asked, and does something of its own where it is told."""

    class Config(LoggerConfig):
        has: int | None = None

    config: Config

    def __init__(self, *, acts: Mapping[str, Any] = {}, **settings: Any) -> None:
        super().__init__(**settings)
        self.asked, self.acts = list[str](), acts

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        act = self.acts.get(what.split(maxsplit=1)[0])
        if isinstance(act, BaseException):
            raise act
        if act is not None:
            act()

    def start(self, run: LoggedRun) -> int | None:
        self.run = run
        self._ask(f"start {run.iteration}")
        return self.config.has

    def log(self, step: LoggedStep, *, durable: bool) -> None:
        self._ask(f"log {step.iteration}{'!' * durable}")

    def finish(self, summary: Mapping[str, Any], curves: Path | None) -> None:
        self._ask(f"finish {summary['iterations']} {curves}")

    def close(self, ending: str) -> None:
        self._ask(f"close {ending}")


LOGS = [f"log {step}{'!' * (step % 4 == 0)}" for step in range(1, 13)]


def test_the_order_of_what_a_logger_is_asked(tmp_path: Path) -> None:
    first, config = Kept(), tiny()
    assert train(config, tmp_path / "mine", loggers=[first], stop=stop_after(6)) is None
    assert first.asked == ["start 0", *LOGS[:5], "log 6!", "close stopped"]
    assert (first.run.name, first.run.folder) == ("mine", tmp_path / "mine")
    assert first.run.settings["training.iterations"] == 12
    plain, late, ahead = Kept(), Kept(has=3), Kept(has=9)
    train(config, tmp_path / "mine", resume=True, loggers=[plain, late, ahead])
    end = ["finish 12 None", "close finished"]
    assert plain.asked == ["start 6", *LOGS[6:], *end]
    assert late.asked == ["start 6", "log 4", "log 5", "log 6", *LOGS[6:], *end]
    assert ahead.asked == ["start 6", *LOGS[9:], *end]
    assert first.run.id == plain.run.id and len(plain.run.id) == 16


def test_a_run_that_never_trains_leaves_nothing_of_its_loggers(tmp_path: Path) -> None:
    kept = Kept()
    with pytest.raises(ZeroDivisionError):
        train(tiny(), tmp_path / "mine", loggers=[kept], on_start=lambda _: 1 / 0)
    assert kept.asked == []


@pytest.mark.parametrize(
    ("method", "what", "asked"),
    [
        ("start", "could not start", ["start 0"]),
        ("log", "could not log iteration 1", ["start 0", "log 1"]),
        ("finish", "could not log the end", ["start 0", *LOGS, "finish 12 None"]),
        (
            "close",
            "could not be closed",
            ["start 0", *LOGS, "finish 12 None", "close finished"],
        ),
    ],
)
def test_a_logger_that_fails_warns_once_and_is_asked_no_more(
    tmp_path: Path, method: str, what: str, asked: list[str]
) -> None:
    bad, good = Kept(acts={method: OSError("no\nroute")}, name="bad"), Kept()
    with pytest.warns(UserWarning) as warned:
        train(tiny(), tmp_path / "mine", loggers=[bad, good])
    assert [str(each.message) for each in warned] == [
        f"the logger 'bad' {what} (OSError: no route): training goes on without it"
    ]
    assert bad.asked == asked
    assert good.asked == ["start 0", *LOGS, "finish 12 None", "close finished"]
    train(tiny(), tmp_path / "alone")
    for name in ("metrics.jsonl", "config.yaml"):
        assert (tmp_path / "mine" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    for name in ("last.safetensors", "best.safetensors"):
        assert_same(*(checkpoint.read(tmp_path / each / name) for each in ("mine", "alone")))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), RankError("rank 1 left")])
def test_what_ends_a_process_is_not_swallowed(tmp_path: Path, error: BaseException) -> None:
    kept = Kept(acts={"log": error})
    with pytest.raises(type(error)):
        train(tiny(), tmp_path / "mine", loggers=[kept])
    closed = ["close failed"] if isinstance(error, Exception) else []
    assert kept.asked == ["start 0", "log 1", *closed]


def test_a_library_changes_nothing_of_how_the_process_ends(tmp_path: Path) -> None:
    def seize() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit = sys.excepthook = print  # type: ignore[assignment]

    before = signal.getsignal(signal.SIGTERM), sys.exit, sys.excepthook
    train(tiny(), tmp_path / "mine", loggers=[Kept(acts={"start": seize})])
    assert (signal.getsignal(signal.SIGTERM), sys.exit, sys.excepthook) == before


class Installed(Logger):
    """A logger of somebody else's package, which writes a line for each iteration."""

    class Config(LoggerConfig):
        file: str

    config: Config

    def log(self, step: LoggedStep, *, durable: bool) -> None:
        with Path(self.config.file).open("a") as file:
            file.write(f"{self.name} {step.iteration}\n")


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Offers a logger as an installed package does, by the source of its module."""
    real = registry.entry_points

    def offer(name: str, source: str) -> None:
        (tmp_path / "offered_loggers.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        entry = EntryPoint(name, "offered_loggers:Part", "metaplug.loggers")
        found = [entry]
        monkeypatch.setattr(
            registry, "entry_points", lambda group: real(group) + found * (group == entry.group)
        )

    yield offer
    sys.modules.pop("offered_loggers", None)


def test_an_installed_logger_is_found_by_name(tmp_path: Path, offered: Any) -> None:
    offered("lines", f"from {__name__} import Installed as Part")
    file = tmp_path / "lines.txt"
    train(tiny(loggers=[{"logger": "lines", "settings": {"file": str(file)}}]), tmp_path / "mine")
    assert file.read_text().splitlines() == [f"lines {step}" for step in range(1, 13)]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "raise RuntimeError('of another version')",
            "the logger 'bad' of offered_loggers does not load: RuntimeError: of another version; "
            "correct it there, or uninstall it; training goes on without it",
        ),
        (
            "from metaplug import Logger\nclass Part(Logger):\n    def __init__(self, **_): 1 / 0",
            "the logger 'bad' could not be made (ZeroDivisionError: division by zero): training "
            "goes on without it",
        ),
    ],
)
def test_one_that_breaks_before_the_run_is_left_out(
    tmp_path: Path, offered: Any, source: str, said: str
) -> None:
    offered("bad", source)
    with pytest.warns(UserWarning) as warned:
        assert train(tiny(loggers=["bad"]), tmp_path / "mine") is not None
    assert [str(each.message) for each in warned] == [said]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "import no_such_library",
            "the logger 'bad' of offered_loggers does not load: ModuleNotFoundError: No module "
            "named 'no_such_library'; correct it there, or uninstall it",
        ),
        (
            "class Part: pass",
            "the logger 'bad' of offered_loggers is the class Part, not a subclass of "
            "metaplug.Logger: correct its entry point, or uninstall it",
        ),
    ],
)
def test_one_that_is_none_is_refused(tmp_path: Path, offered: Any, source: str, said: str) -> None:
    offered("bad", source)
    with pytest.raises(RunError) as refused:
        train(tiny(loggers=["bad"]), tmp_path / "mine")
    assert (str(refused.value), (tmp_path / "mine").exists()) == (said, False)


REFUSED = [
    (["tensorbord"], "unknown logger 'tensorbord': did you mean 'tensorboard'?"),
    (
        [{"logger": "wandb", "settings": {"mode": "live"}}],
        "logger 'wandb': mode = 'live': input should be 'offline' or 'online'",
    ),
    (
        [{"logger": "mlflow", "settings": {"uri": "x"}}],
        "logger 'mlflow': unknown field 'uri': known: 'tracking_uri', 'experiment'",
    ),
]


@pytest.mark.parametrize(("loggers", "said"), REFUSED)
def test_a_wrong_request_is_refused_before_anything(
    tmp_path: Path, loggers: Sequence[Any], said: str
) -> None:
    with pytest.raises(RequestError) as refused:
        train(tiny(loggers=loggers), tmp_path / "mine")
    assert (str(refused.value), (tmp_path / "mine").exists()) == (said, False)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_library_is_refused_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tables, "find_spec", lambda package: None)
    with pytest.raises(RequestError) as refused:
        train(tiny(loggers=[name]), tmp_path / "mine")
    assert str(refused.value) == (
        f"the logger '{name}' needs {name}, which is not installed: pip install 'metaplug[{name}]'"
    )


def test_no_result_and_no_comparison_depends_on_loggers(tmp_path: Path, offered: Any) -> None:
    offered("lines", f"from {__name__} import Installed as Part")
    use = {"logger": "lines", "settings": {"file": str(tmp_path / "lines.txt")}}
    mine, config = tmp_path / "mine", tmp_path / "mine/config.yaml"
    assert train(tiny(), mine, stop=stop_after(5)) is None
    old = yaml.safe_load(config.read_text())
    assert old.pop("loggers") == []
    config.write_text(yaml.safe_dump(old))  # as before there were any
    assert train(tiny(loggers=["jsonl", use]), mine, resume=True, stop=stop_after(1)) is None
    assert yaml.safe_load(config.read_text())["loggers"][1] == use
    assert train(tiny(), mine, resume=True) is not None
    assert (tmp_path / "lines.txt").read_text() == "lines 6\n"
    assert [line["iteration"] for line in read_metrics(mine)] == [*range(1, 13)]
    assert load(mine).config.loggers == ()


def test_mlflow_gets_no_name_that_it_refuses() -> None:
    mlflow = import_module("metaplug.experiments.loggers.mlflow")
    assert mlflow._allowed("my-idea/rate of layer.0[a,b]") == "my-idea/rate of layer.0_a_b_"
