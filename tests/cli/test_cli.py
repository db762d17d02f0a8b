"""The command line: what each command prints where, every failure's line and status, and Ctrl-C."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from support.tiny_runs import exit_status, in_child

from metaplug import MetaLearner, checkpoint
from metaplug.cli.main import main
from metaplug.cli.options import SHARED
from metaplug.contract import hookspecs, registry
from metaplug.experiments.configuration import ExperimentConfig, flatten

TINY = shlex.split(
    "--tasks sinusoid --model mlp --shots 3 --queries 3 --inner-steps 1 --inner-lr 0.01 "
    "--tasks-per-batch 2 --iterations 4 --device cpu --set training.validate_every=2 "
    "--set training.test_tasks=5 --set model.settings.hidden=[4] --set runtime.threads=1"
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Answer:
    """The exit status of a command and what it printed."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def metaplug(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> Answer:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        assert isinstance(stopped.value.code, int)
        return Answer(stopped.value.code, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a plugin."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.raises(SystemExit) as stopped:
        main(["train", *TINY, "--with", "gradient-sharing", "--out", str(folder), "--name", "mine"])
    assert stopped.value.code == 0
    return folder / "mine"


def test_help_is_quick_as_it_imports_no_torch() -> None:
    code = (
        "import sys\nfrom metaplug.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stopped:\n    assert stopped.code == 0\n"
        "assert not {'torch', 'numpy', 'matplotlib', 'pydantic'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("command", "purpose", "options"),
    [
        (
            "train",
            "Meta-train a model, and test it on tasks that it has not seen.",
            "--preset --with --set --name --out --resume",
        ),
        (
            "evaluate",
            "Measure a trained run on tasks that it has not seen",
            "--num-tasks --inner-steps --split --device --json",
        ),
        (
            "compare",
            "Meta-train several algorithms at an equal budget",
            "--variant --seeds --json --out --set",
        ),
        (
            "tune",
            "Search for the values of some fields that validate best",
            "--search --trials --name --out --json --preset --with --set",
        ),
        ("report", "Write one self-contained HTML page", "--out"),
        ("explain", "Show what a configuration resolves to", "--preset --with --set"),
        ("plugins", "List what is installed", "--json"),
        ("tasks", "List the task sources", "--json"),
        ("new-plugin", "Write a package with a plugin of your own", "--kind --out"),
        ("test-plugin", "Hold a plugin to the contract", "--settings --off --models --json"),
        ("hooks", "List the hooks that a plugin may implement", "--json"),
    ],
)
def test_help_teaches_a_command(metaplug: Any, command: str, purpose: str, options: str) -> None:
    shared = (
        "--tasks --ways --shots --queries --model --inner-steps --inner-lr --tasks-per-batch"
        " --iterations --meta-lr --seed --device"
    )
    answer = metaplug(command, "--help")
    assert answer.status == 0
    assert purpose in answer.out
    for option in [
        *options.split(),
        *(shared.split() if command in ("train", "compare", "tune", "explain") else []),
    ]:
        assert re.search(rf"│ {option}\s", answer.out), option
    assert len(re.findall(rf"• metaplug {command}", answer.out)) in (2, 3)


def test_defaults_that_help_shows_are_those_of_the_configuration() -> None:
    defaults = flatten(ExperimentConfig().model_dump())
    for path, annotation in SHARED.items():
        assert annotation.__metadata__[0].show_default == str(defaults[path]), path


def test_no_command_shows_the_help(metaplug: Any) -> None:
    answer = metaplug()
    assert (answer.status, answer.err) == (2, "")
    assert "Usage: metaplug [OPTIONS] COMMAND" in answer.out


def test_version(metaplug: Any) -> None:
    answer = metaplug("--version")
    assert (answer.status, answer.out, answer.err) == (0, "metaplug 0.1.0\n", "")


NOT_WHOLE = (
    "metaplug: standard output cannot be written (No space left on device), and is not whole: send "
    "it where there is room; a run that was trained is whole in its folder\n"
)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_full_output_loses_no_run() -> None:
    def train() -> None:
        sys.stdout = Path("/dev/full").open("w")  # noqa: SIM115
        main(["train", *TINY, "--name", "mine"])

    assert exit_status(in_child(train, Path("words"))) == 1
    assert Path("words").read_text().endswith(NOT_WHOLE)
    assert {"summary.json", "curves.png"} <= {path.name for path in Path("runs/mine").iterdir()}


def test_a_reader_that_leaves_is_worth_no_word() -> None:
    code = (
        "import metaplug.cli.main as cli\nfrom metaplug.report.console import result\n"
        "cli.app = lambda **_: [result('one line') for _ in range(20_000)]\ncli.main([])"
    )
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


ERRORS: list[tuple[str, str]] = [
    ("trian", "No such command 'trian'. Did you mean 'train'?"),
    ("train --iteration 4", "No such option: --iteration (Possible options: --iterations)"),
    (
        "train --ways five",
        (
            "Invalid value for '--ways': Input should be a valid integer, unable to parse string as"
            " an integer"
        ),
    ),
    ("train --preset mamll", "unknown preset 'mamll': did you mean 'maml'?"),
    (
        "train --preset maml+++gradient-sharing",
        "'maml+++gradient-sharing' is a preset with plugins: give the preset 'maml++' alone, and "
        "what follows it as plugins (--with)",
    ),
    ("train --set model.nme=mlp", "option: unknown field 'model.nme': did you mean 'name'?"),
    (
        "train --with gradient-shering",
        "unknown plugin 'gradient-shering': did you mean 'gradient-sharing'?",
    ),
    (
        "train --with gradient-sharing:gat=1",
        "plugin 'gradient-sharing': unknown field 'gat': did you mean 'gate'?",
    ),
    (
        "train --with gradient-sharing:gate=2",
        "plugin 'gradient-sharing': gate = 2: input should be less than or equal to 1",
    ),
    (
        "train --with gradient-sharing:gate",
        "'gate' is no setting of plugin 'gradient-sharing': write field=value",
    ),
    (
        "train --with gradient-sharing --with gradient-sharing",
        (
            "plugin 'gradient-sharing' stands twice in the list: give one of them a name of its"
            " own, or leave it out"
        ),
    ),
    ("train --tasks glyph", "unknown task source 'glyph': did you mean 'glyphs'?"),
    (
        "train --tasks folder",
        "the task source 'folder' needs a path after a colon: write folder:PATH",
    ),
    ("train --tasks sinusoid --model conv5", "unknown model 'conv5': did you mean 'conv4'?"),
    ("train --ways 1", "option: tasks.ways = 1: input should be greater than or equal to 2"),
    ("train --seed=-1", "option: seed = -1: input should be greater than or equal to 0"),
    (
        "train --set trainin.iterations=5",
        "option: unknown field 'trainin': did you mean 'training'?",
    ),
    (
        "train --set training.iteration=5",
        "option: unknown field 'training.iteration': did you mean 'iterations'?",
    ),
    ("train --set seed", "--set seed: no value is given; write --set path.to.field=value"),
    (
        "train --set plugins.gradient-sharing.gate=0.5",
        (
            "'plugins.gradient-sharing.gate' is no setting of a listed plugin (known: none): write"
            " plugins.NAME.field, or add it by --with"
        ),
    ),
    ("train --device tpu", "unknown device 'tpu': give auto, cpu, cuda or cuda:N"),
    ("train --device meta", "device 'meta' is not supported: metaplug runs on cpu and cuda"),
    ("train nope.yaml", "cannot read nope.yaml: No such file or directory; give a YAML file"),
    ("explain --preset mamll", "unknown preset 'mamll': did you mean 'maml'?"),
    (
        "evaluate nope",
        (
            "there is no run nope: give the folder of a run that `metaplug train` has validated at"
            " least once"
        ),
    ),
    ("evaluate", "Missing argument 'RUN'."),
    (
        "evaluate nope --num-tasks 1",
        "Invalid value for '--num-tasks': Input should be greater than or equal to 2",
    ),
    (
        "compare",
        "a comparison needs at least two variants, not 0: give the baseline first, then another, "
        "by --variant",
    ),
    (
        "compare --variant maml",
        "a comparison needs at least two variants, not 1: give the baseline first, then another, "
        "by --variant",
    ),
    (
        "compare --variant maml --variant maml",
        "compare: the variant 'maml' stands twice, and would be compared with itself: "
        "leave one out",
    ),
    (
        "compare --variant maml --variant mamll",
        "compare: variants.1 = 'mamll': unknown preset at the start of 'mamll': did you "
        "mean 'maml'?",
    ),
    (
        "compare --variant maml --variant maml+",
        "compare: variants.1 = 'maml+': '' names no plugin: write plugin or "
        "plugin:field=value,field=value",
    ),
    (
        "compare --variant maml --variant fomaml --set preset=maml",
        (
            "--set preset=maml: in a comparison every variant has its own; write it into --variant,"
            " as PRESET+PLUGIN:FIELD=VALUE"
        ),
    ),
    (
        "compare --variant maml --variant fomaml --json nope/out.json",
        (
            "--json nope/out.json: it lies in a folder nope that does not exist; give a file in a"
            " folder that exists, or - for standard output"
        ),
    ),
    (
        "compare --variant maml --variant fomaml --set training.validation_tasks=100",
        (
            "training.validation_tasks = 100: too few to compare by, as the target would be mostly"
            " noise; use at least 200"
        ),
    ),
    (
        "tasks glyphs --set within=true",
        "--set within=true: a field is given by its whole path in the configuration; write --set "
        "tasks.settings.within=true",
    ),
    (
        "tasks glyphs --set training.iterations=3",
        "--set training.iterations: what is shown are tasks alone: give tasks.FIELD=VALUE",
    ),
    (
        "tasks glyphs --set tasks.source=sinusoid",
        "--set tasks.source: the source is named already, glyphs: leave it out",
    ),
    ("tasks glyphs --ways 1", "option: tasks.ways = 1: input should be greater than or equal to 2"),
    (
        "train --set shots=3",
        "--set shots=3: a field is given by its whole path in the configuration; write --set "
        "tasks.shots=3",
    ),
    (
        "evaluate nope --set training.test_tasks=3",
        "--set training.test_tasks: an evaluation changes the tasks alone, as the rest is what was "
        "trained: give --num-tasks",
    ),
    ("tasks glyph", "unknown task source 'glyph': did you mean 'glyphs'?"),
    (
        "plugins gradient-shering",
        "unknown plugin, preset, model or logger 'gradient-shering': did you mean "
        "'gradient-sharing'?",
    ),
]


@pytest.mark.parametrize(("command", "message"), ERRORS, ids=[command for command, _ in ERRORS])
def test_a_wrong_request_is_one_line_and_exit_status_2(
    metaplug: Any, command: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(MetaLearner, "iterate")  # nothing is trained before it is refused
    answer = metaplug(*command.split())
    assert (answer.err, answer.out, answer.status) == (f"metaplug: {message}\n", "", 2)
    assert list(Path().iterdir()) == []


def test_a_mistake_in_a_file_is_named_with_the_file(metaplug: Any) -> None:
    Path("e.yaml").write_text("training:\n  iterations: 0\n")
    assert (
        metaplug("train", "e.yaml").err
        == "metaplug: e.yaml: training.iterations = 0: input should be greater than or equal to 1\n"
    )
    Path("e.yaml").write_text("seed: 1\nseed: 2\n")
    assert (
        metaplug("train", "e.yaml").err
        == "metaplug: e.yaml, line 2 is not valid YAML: the key 'seed' stands twice; correct it"
        " there\n"
    )
    Path("e.yaml").write_text("plugins: gradient-sharing\n")
    answer = metaplug("train", "e.yaml", "--with", "gradient-clipping:max_norm=1")
    assert (answer.err, answer.status) == (
        "metaplug: e.yaml: plugins = 'gradient-sharing': input should be a list, such as [value,"
        " value]\n",
        2,
    )
    Path("e.yaml").write_text("tasks: sinusoid\n")
    assert (
        metaplug("explain", "e.yaml").err
        == "metaplug: e.yaml: tasks = 'sinusoid': input should be a mapping, such as {field:"
        " value}\n"
    )
    Path("e.yaml").write_text("plugins: [{gradient-sharing: {gate: 0.3}}]\n")
    assert metaplug("explain", "e.yaml").err.endswith(
        "unknown field 'plugins.0.gradient-sharing': known: 'plugin', 'name', 'settings', "
        "'sha256'\n"
    )


def test_a_failed_run_is_one_line_and_exit_status_1(metaplug: Any) -> None:
    answer = metaplug("train", *TINY, "--inner-lr", "1000", "--inner-steps", "8", "--name", "wild")
    assert answer.status == 1
    assert re.fullmatch(
        r"metaplug: iteration 1 stopped, nothing was updated: the support loss holds NaN or Inf in"
        r" 'loss' of .* in iteration 1, inner step "
        r"\d; the inner loop diverges: the support loss of task \d grew from \S+ to \S+ in \d inner"
        r" steps? at inner_lr = 1000; "
        "lower inner_lr",
        answer.err.splitlines()[-1],
    )
    assert answer.out == ""


def test_a_damaged_checkpoint_is_one_line_and_exit_status_1(metaplug: Any) -> None:
    Path("broken.pt").write_bytes(b"not a checkpoint")
    answer = metaplug("evaluate", "broken.pt")
    assert answer.status == 1
    assert re.fullmatch(
        r"metaplug: broken\.pt is not a whole metaplug checkpoint \(.*\): use another one of the"
        r" run\n",
        answer.err,
    )


def test_debug_shows_the_traceback(metaplug: Any) -> None:
    answer = metaplug("--debug", "train", "--ways", "1")
    assert answer.status == 2
    assert "Traceback (most recent call last)" in answer.err
    assert answer.err.endswith(
        "metaplug: option: tasks.ways = 1: input should be greater than or equal to 2\n"
    )


def test_what_nobody_foresaw_is_one_line_too(
    metaplug: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst(*_: object) -> None:
        raise KeyError("lost\nand gone")

    monkeypatch.setattr(registry, "parts", burst)
    answer = metaplug("plugins")
    assert answer.status == 1
    assert (
        answer.err
        == "metaplug: unexpected KeyError: 'lost\\nand gone'; `metaplug --debug ...` shows the"
        " traceback\n"
    )


def test_a_name_that_no_file_system_takes_is_one_line_too(metaplug: Any) -> None:
    answer = metaplug("report", "n" * 300)
    assert (answer.status, answer.err) == (
        2,
        f"metaplug: the name {'n' * 40}... is too long for the file system: shorten it\n",
    )


def test_train_writes_a_run(metaplug: Any) -> None:
    answer = metaplug("train", *TINY, "--with", "gradient-sharing")
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(
        r"maml\+gradient-sharing-sinusoid-3shot-queries3-lr0\.01-steps1-iterations4-batch2-"
        "validate_every2-seed0-[0-9a-f]{8}",
        folder.name,
    )
    lines, results = answer.err.splitlines(), answer.out.splitlines()
    assert answer.status == 0
    assert lines[0] == "maml (gradient-sharing) on sinusoid, 3-shot, mlp, seed 0, cpu"
    assert lines.pop(2).startswith("memory: ")
    assert lines[1] == f"a new run in {folder}"
    for iteration, line in zip((2, 4), lines[2:], strict=True):
        assert re.fullmatch(
            rf"training: iteration {iteration}  loss \d+\.\d{{4}}  validation \d+\.\d{{4}} ±"
            r" \d+\.\d{4}",
            line,
        )
    assert re.fullmatch(
        r"test mean squared error \d+\.\d{4} ± \d+\.\d{4} \(95 % interval over 5 tasks, 1 inner"
        r" step\)",
        results[0],
    )
    assert results[1].endswith(f"which validated best; all of it is in {folder}")
    assert results[2:] == ["transductive: no"]
    assert sorted(path.name for path in folder.iterdir()) == [
        *(
            ".lock",
            "best.safetensors",
            "config.yaml",
            "curves.png",
            "last.safetensors",
            "metrics.jsonl",
            "run.json",
            "summary.json",
        )
    ]
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"

    again = metaplug("train", *TINY, "--with", "gradient-sharing")
    refusal = (
        f"metaplug: the run folder {folder} already exists: give another --name or --out, or"
        " --resume to go on with it\n"
    )
    assert (again.status, again.err) == (2, refusal)
    (folder / "curves.png").write_bytes(b"mine")
    finished = metaplug("train", *TINY, "--with", "gradient-sharing", "--resume")
    assert (finished.status, finished.err) == (0, f"{folder} is finished already\n")
    assert finished.out.splitlines() == results
    assert (folder / "curves.png").read_bytes() == b"mine"
    (folder / "curves.png").unlink()
    assert metaplug("train", *TINY, "--with", "gradient-sharing", "--resume").status == 0
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    more = ("--iterations", "5", "--name", folder.name)
    other = metaplug("train", *TINY, "--with", "gradient-sharing", "--resume", *more)
    assert other.status == 2
    assert other.err.startswith(
        f"metaplug: {folder} was begun with training.iterations = 4, which cannot become 5: "
    )


def test_train_takes_a_file_and_options_over_it(metaplug: Any) -> None:
    Path("mine.yaml").write_text(
        yaml.safe_dump(
            {
                "plugins": ["gradient-sharing"],
                "model": {"name": "mlp", "settings": {"hidden": [4]}},
                "tasks": {"source": "sinusoid", "shots": 3},
                "training": {
                    "iterations": 2,
                    "tasks_per_batch": 2,
                    "validation_tasks": 4,
                    "test_tasks": 4,
                },
                "learner": {"inner_lr": 0.01, "inner_steps": 1},
            }
        )
    )
    answer = metaplug(
        *(
            "train",
            "mine.yaml",
            "--with",
            "gradient-clipping:max_norm=1",
            "--set",
            "plugins.gradient-sharing.gate=0.25",
        ),
        *("--seed", "3", "--out", "out"),
    )
    assert answer.status == 0, answer.err
    folder = Path(
        "out/mine-maml+gradient-sharing-gate0.25+gradient-clipping-max_norm1-seed3",
    )
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert [(use["plugin"], use["settings"]) for use in config["plugins"]] == [
        ("gradient-sharing", {"gate": 0.25}),
        ("gradient-clipping", {"max_norm": 1}),
    ]
    assert (config["seed"], config["tasks"]["shots"], config["training"]["iterations"]) == (3, 3, 2)
    # the resolved configuration is a configuration
    assert metaplug("explain", str(folder / "config.yaml")).status == 0
    assert metaplug("train", "mine.yaml", "--out", "out").status == 0
    assert Path("out/mine/summary.json").exists()


def test_explain_shows_the_order_the_settings_and_every_origin(metaplug: Any) -> None:
    Path("mine.yaml").write_text("preset: fomaml\ntraining: {iterations: 7}\n")
    answer = metaplug(
        "explain", "mine.yaml", "--with", "gradient-sharing:gate=0.25", "--inner-lr", "1"
    )
    assert (answer.status, answer.err) == (0, "")
    squeezed = [" ".join(line.split()) for line in answer.out.splitlines()]
    assert "derivative_order choose derivative-order" in squeezed
    assert "transform_gradients fold gradient-sharing" in squeezed
    assert "gradient-sharing gate 0.25 option" in squeezed
    assert "preset fomaml mine.yaml" in squeezed
    assert "training.iterations 7 mine.yaml" in squeezed
    assert "learner.inner_lr 1.0 option" in squeezed
    assert "learner.inner_steps 3 default" in squeezed
    order = metaplug(
        "explain", "--with", "gradient-clipping:max_norm=1", "--with", "gradient-sharing"
    )
    assert "transform_gradients fold gradient-clipping → gradient-sharing" in " ".join(
        order.out.split()
    )


def test_evaluate(metaplug: Any, trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    answer = metaplug("evaluate", str(trained), "--json")
    assert (answer.status, answer.err) == (0, "")
    assert answer.json["interval_method"] == "t"
    assert (answer.json["mean"], answer.json["interval"]) == (
        summary["test"]["mean"],
        summary["test"]["interval"],
    )
    assert (answer.json["split"], answer.json["num_tasks"], answer.json["iteration"]) == (
        "test",
        5,
        summary["best_validation"]["iteration"],
    )
    # Other fields leave the run's own settings of the source as they are.
    tasks = answer.json["tasks"]
    more = metaplug("evaluate", str(trained), "--json", "--set", "tasks.shots=7")
    assert more.json["tasks"] == tasks | {"shots": 7}
    assert metaplug("evaluate", str(trained), "--json", "--shots", "7").json == more.json
    same = metaplug("evaluate", str(trained), "--json", "--set", f"tasks.shots={tasks['shots']}")
    assert same.json["mean"] == answer.json["mean"]
    other = metaplug("evaluate", str(trained), "--set", "training.iterations=3")
    assert (other.status, other.err) == (
        2,
        "metaplug: --set training.iterations: an evaluation changes the tasks alone, as the rest "
        "is what was trained: give tasks.FIELD=VALUE\n",
    )
    other = metaplug("evaluate", str(trained), "--tasks", "glyphs")
    assert other.status == 2
    assert other.err.startswith(
        "metaplug: the tasks glyphs ask for a model with 5 outputs and inputs (1, 28, 28), which "
        "the trained one is not ("
    )
    other = metaplug(
        "evaluate",
        str(trained / "last.safetensors"),
        "--split",
        "val",
        "--num-tasks",
        "7",
        "--inner-steps",
        "0",
    )
    assert (other.status, other.err) == (0, "")
    value = (
        r"val mean squared error \d+\.\d{4} ± \d+\.\d{4} \(95 % interval over 7 tasks, 0 inner"
        r" steps\)\n"
    )
    assert re.fullmatch(value + r"transductive: no\n", other.out)


def test_evaluate_by_a_bootstrap(metaplug: Any, trained: Path) -> None:
    given = ("evaluate", str(trained), "--interval", "bootstrap", "--num-tasks", "20")
    made = metaplug(*given, "--json").json
    assert made == metaplug(*given, "--json").json
    assert made["interval_method"] == "bootstrap"
    assert made["low"] < made["mean"] < made["high"]
    assert made["interval"] == pytest.approx((made["high"] - made["low"]) / 2)
    assert re.match(
        r"test mean squared error \d+\.\d{4} \(95 % bootstrap interval \d+\.\d{4} to \d+\.\d{4}"
        r" over 20 tasks, 1 inner step\)\n",
        metaplug(*given).out,
    )


def test_evaluate_by_another_score(metaplug: Any, trained: Path) -> None:
    refused = metaplug("evaluate", str(trained), "--score", "accuracy")
    assert (refused.status, refused.out) == (2, "")
    assert refused.err == (
        "metaplug: score 'accuracy' is for class indices or labels of 0 and 1, but the targets are "
        "real numbers, float32 of shape (1,) an example: give mean-squared-error, or a function of "
        "your own\n"
    )
    unknown = metaplug("evaluate", str(trained), "--score", "f1")
    assert (unknown.status, unknown.out) == (2, "")


def test_a_run_has_the_score_that_was_chosen(metaplug: Any) -> None:
    given = "--set training.validation_tasks=4 --set training.score=balanced-accuracy --name run"
    tiny = [*TINY[4:], *shlex.split(f"--tasks glyphs --model mlp --ways 3 --iterations 2 {given}")]
    assert re.search(r"test balanced accuracy \d+\.\d\d ± ", metaplug("train", *tiny).out)
    for name in ("summary.json", "metrics.jsonl"):
        assert '"metric": "balanced accuracy"' in Path("runs/run", name).read_text()
    answer = metaplug("evaluate", "runs/run", "--score", "per-class-accuracy")
    first, *lines = answer.out.splitlines()
    assert first.startswith("test per-class accuracy ")
    for place, line in enumerate(lines[:3]):
        assert re.fullmatch(rf"class {place}: \d+\.\d\d ± \d+\.\d\d % \(5 tasks\)", line)
    assert lines[3].startswith("transductive: ")


def test_evaluate_on_training_tasks_is_on_purpose(metaplug: Any, trained: Path) -> None:
    refused = metaplug("evaluate", str(trained), "--split", "train")
    assert (refused.status, refused.out) == (2, "")
    assert refused.err.startswith(
        "metaplug: the train tasks draw on 1 of 1 groups of tasks that this learner is trained on,"
        " the first being "
    )
    allowed = metaplug(
        "evaluate", str(trained), "--split", "train", "--allow-training-classes", "--json"
    )
    assert (allowed.status, allowed.json["training_classes"]) == (0, 1)
    said = metaplug(
        "evaluate", str(trained), "--split", "train", "--allow-training-classes"
    ).out.splitlines()
    assert said[1:] == ["transductive: no", "not of unseen classes: 1 of them was trained on"]


def test_a_warning_is_one_line(metaplug: Any, trained: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        answer = metaplug("evaluate", str(trained), "--inner-steps", "2", "--json")
    assert answer.status == 0
    assert answer.json["inner_steps"] == 2
    assert (
        answer.err
        == "metaplug: warning: adapting for 2 inner steps, trained with 1: later steps use the last"
        " step's values\n"
    )


def test_compare(metaplug: Any) -> None:
    variants = ("--variant", "maml", "--variant", "maml + gradient-sharing:gate=0.25")
    seeds = ("--seeds", "2", "--seed", "5")
    written = ("--json", "out.json", "--out", "compared")
    answer = metaplug("compare", *TINY, *variants, *seeds, *written)
    assert answer.status == 0
    assert answer.out.split()[:2] == ["variant", "acceleration"]
    found = json.loads(Path("out.json").read_text())
    assert (found["baseline"], found["seeds"]) == ("maml", [5, 6])
    assert found["metric"] == "mean squared error"
    labels = [row["label"] for row in found["rows"]]
    assert labels == ["maml", "maml+gradient-sharing:gate=0.25"]
    assert found["rows"][1]["config"]["plugins"][0]["settings"] == {"gate": 0.25}
    assert [point[0] for point in found["rows"][1]["runs"][1]["curve"]] == [2, 4]
    names = sorted(path.name for path in Path("compared").iterdir())
    assert names == ["cells", "cells.json", "curves.png", "results.json", "study.yaml", "table.txt"]
    assert json.loads(Path("compared/results.json").read_text()) == found
    assert Path("compared/table.txt").read_text().split()[:2] == ["variant", "acceleration"]
    assert "maml, seed 6: iteration 4  loss " in answer.err
    again = metaplug("compare", *TINY, *variants, *seeds, *written)
    assert again.out == answer.out
    assert again.err.startswith("4 runs in compared, 4 of them finished already\n")


def test_plugins_lists_parts(metaplug: Any) -> None:
    answer = metaplug("plugins", "--json")
    assert (answer.status, answer.err) == (0, "")
    rows = {(row["kind"], row["name"]): row for row in answer.json}
    assert {("plugin", "gradient-sharing"), ("preset", "maml"), ("model", "conv4")} <= rows.keys()
    assert rows["plugin", "gradient-sharing"] == {
        "kind": "plugin",
        "name": "gradient-sharing",
        "distribution": "metaplug",
        "version": "0.1.0",
        "summary": (
            "Blend every task's gradient with a running mean of the tasks' normalised gradients."
        ),
        "hooks": ["setup", "transform_gradients", "commit", "end_meta_step"],
        "settings": rows["plugin", "gradient-sharing"]["settings"],
        "error": None,
    }
    assert rows["plugin", "gradient-clipping"]["settings"][0] == {
        "name": "max_norm",
        "type": "float or null",
        "bounds": "> 0",
        "default": "null",
        "description": (
            "c, the longest inner gradient of a task; null leaves inner gradients alone."
        ),
    }
    people = metaplug("plugins")
    assert people.status == 0
    assert people.out.startswith("Installed")
    assert people.err == (
        "metaplug plugins NAME shows one with its settings; metaplug tasks lists task sources\n"
    )


def test_plugins_shows_one_part(metaplug: Any) -> None:
    (page,) = metaplug("plugins", "gradient-sharing", "--json").json
    assert (
        page["facts"]["hooks"]
        == "setup (notify), transform_gradients (fold), commit (notify), end_meta_step (collect)"
    )
    assert page["settings"][0] == {
        "name": "gate",
        "type": "float",
        "bounds": "≥ 0, ≤ 1",
        "default": "0.5",
        "description": (
            "Initial weight σ(λ) of the shared direction. Exactly 0 or 1 stays so for good."
        ),
    }
    people = metaplug("plugins", "gradient-sharing")
    assert people.err == ""
    assert people.out.startswith(
        "gradient-sharing: a plugin of metaplug 0.1.0\n\nBlend every task's gradient"
    )
    assert "gate_function  sigmoid | hard-sigmoid | clamp, default sigmoid\n" in people.out


BROKEN: list[tuple[str, str, str, str]] = [
    (
        "plugin",
        "does-not-import",
        "import no_such_module",
        (
            "the plugin 'does-not-import' of broken_part does not load: ModuleNotFoundError: No"
            " module named 'no_such_module'; correct it there, or uninstall it"
        ),
    ),
    (
        "plugin",
        "exits",
        "raise SystemExit('goodbye')",
        (
            "the plugin 'exits' of broken_part does not load: SystemExit: goodbye; correct it"
            " there, or uninstall it"
        ),
    ),
    (
        "plugin",
        "no-plugin",
        "class Part: pass",
        (
            "the plugin 'no-plugin' of broken_part is the class Part, not a subclass of"
            " metaplug.Plugin or a module with hooks: correct its entry point, or uninstall it"
        ),
    ),
    (
        "plugin",
        "no-such-name",
        "",
        (
            "the plugin 'no-such-name' of broken_part does not load: AttributeError: module"
            " 'broken_part' has no attribute 'Part'; correct it there, or uninstall it"
        ),
    ),
    (
        "plugin",
        "no-config",
        (
            "from metaplug import Plugin\nfrom pydantic import BaseModel\nclass Part(Plugin):\n   "
            " class Config(BaseModel): pass"
        ),
        (
            "the plugin 'no-config' of broken_part does not load: TypeError: Part.Config is no"
            " subclass of metaplug.PluginConfig, so that settings would go unchecked: write class"
            " Config(PluginConfig); correct it there, or uninstall it"
        ),
    ),
    (
        "plugin",
        "late-config",
        (
            "from __future__ import annotations\nfrom metaplug import Plugin, PluginConfig\n"
            "class Part(Plugin):\n    class Config(PluginConfig):\n        how: Unheard = None"
        ),
        (
            "plugin 'late-config': its Config cannot be made (name 'Unheard' is not defined): "
            "import there, when the module runs, what its fields are annotated with"
        ),
    ),
    (
        "plugin",
        "misspelt",
        (
            "from metaplug import Plugin, hookimpl\nclass Part(Plugin):\n    @hookimpl\n    def"
            " transform_gradient(self): pass"
        ),
        (
            "plugin 'misspelt': method transform_gradient is marked @hookimpl, but metaplug 0.1.0"
            " has no hook 'transform_gradient' (did you mean 'transform_gradients'?): rename it, or"
            " install a newer metaplug, which may have it"
        ),
    ),
    (
        "preset",
        "no-preset",
        "Part = {}",
        (
            "the preset 'no-preset' of broken_part is of type dict, not a metaplug.Preset: correct"
            " its entry point, or uninstall it"
        ),
    ),
    (
        "model",
        "no-model",
        "Part = 3",
        (
            "the model 'no-model' of broken_part is of type int, not a class or function that makes"
            " a model: correct its entry point, or uninstall it"
        ),
    ),
    (
        "model",
        "unreadable",
        "class Part:\n    Config = 3",
        (
            "the model 'unreadable' of broken_part cannot be described: AttributeError: 'int'"
            " object has no attribute '__mro__'; correct it, or uninstall it"
        ),
    ),
    (
        "task source",
        "no-source",
        "class Part: pass",
        (
            "the task source 'no-source' of broken_part is the class Part, not a subclass of"
            " metaplug.tasks.TaskSource: correct its entry point, or uninstall it"
        ),
    ),
]


INSTALLED = functools.cache(registry.entry_points)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs `broken_part:Part`, whose source is given, as a part."""

    def install(kind: str, name: str, source: str) -> None:
        Path("broken_part.py").write_text(source)
        monkeypatch.syspath_prepend(str(Path.cwd()))
        monkeypatch.delitem(sys.modules, "broken_part", raising=False)
        entry = EntryPoint(name, "broken_part:Part", registry.GROUPS[kind])
        monkeypatch.setattr(
            registry,
            "entry_points",
            lambda group: [*INSTALLED(group), *([entry] if group == entry.group else [])],
        )

    yield install
    sys.modules.pop("broken_part", None)


@pytest.mark.parametrize("part", BROKEN, ids=[name for _, name, _, _ in BROKEN])
def test_a_broken_part_is_a_row_with_the_reason_and_no_crash(
    metaplug: Any, broken: Any, part: tuple[str, str, str, str]
) -> None:
    kind, name, source, error = part
    command = "tasks" if kind == "task source" else "plugins"
    kinds = ("task source",) if kind == "task source" else ("plugin", "preset", "model", "logger")
    whole = dict.fromkeys(other for each in kinds for other in registry.names(each))
    broken(kind, name, source)
    answer = metaplug(command, "--json")
    assert (answer.status, answer.err) == (0, "")
    assert {row["name"]: row["error"] for row in answer.json} == {**whole, name: error}
    people = metaplug(command, name)
    assert (people.status, people.err) == (0, "")
    assert " ".join(people.out.split()) == f"{name}: a {kind} of broken_part {error}"


def test_only_a_run_that_names_a_broken_plugin_fails(metaplug: Any, broken: Any) -> None:
    broken("plugin", "broken", "import no_such_module")
    assert metaplug("explain", "--with", "gradient-sharing").status == 0
    answer = metaplug("explain", "--with", "broken")
    assert (answer.status, answer.err) == (
        1,
        (
            "metaplug: the plugin 'broken' of broken_part does not load: ModuleNotFoundError: No"
            " module named 'no_such_module'; correct it there, or uninstall it\n"
        ),
    )
    broken("plugin", "broken", BROKEN[6][2])
    answer = metaplug("explain", "--with", "broken")
    assert (answer.status, answer.err) == (
        2,
        f"metaplug: {BROKEN[6][3].replace('misspelt', 'broken')}\n",
    )


def test_a_deprecation_names_the_plugins_line(
    metaplug: Any, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        hookspecs.transform_gradients.metaplug_spec, "warn_on_impl", FutureWarning("gone soon")
    )  # type: ignore[attr-defined]
    broken(
        "plugin",
        "old",
        "from metaplug import Plugin, hookimpl\nclass Part(Plugin):\n    @hookimpl\n    def"
        " transform_gradients(self, gradients): pass",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        answer = metaplug("explain", "--with", "old")
    assert answer.status == 0
    assert (
        answer.err.splitlines()[0]
        == f"metaplug: warning: gone soon ({Path.cwd() / 'broken_part.py'}, line 3)"
    )


def test_tasks(metaplug: Any) -> None:
    rows = metaplug("tasks", "--json").json
    assert {"folder", "glyphs", "sinusoid"} <= {row["name"] for row in rows}
    page = metaplug("tasks", "sinusoid", "--json").json
    assert page["data"]["input_shape"] == [1]
    assert [field["name"] for field in page["settings"]] == ["amplitude", "phase", "inputs"]
    assert metaplug("tasks", "folder", "--json").json["data"] is None
    people = metaplug("tasks", "sinusoid")
    assert (people.status, people.err) == (0, "")
    assert "y = A sin(x + φ)" in people.out
    assert metaplug("tasks").status == 0


def test_tasks_keeps_decoded_images_in_the_chosen_cache(
    metaplug: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaplug.tasks.images.decoded._FEWEST", 1)
    for number in range(60):  # of which ten classes are made
        path = Path(f"data/{number // 6}/{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (6, 6), number).save(path)
    page = []
    for place in ("one", "one", "two"):
        monkeypatch.setenv("METAPLUG_CACHE", place)
        arguments = ("--set", "tasks.settings={fractions: [0.4,0.3,0.3], cache_mib: 1}")
        page.append(metaplug("tasks", "folder", "data", *arguments, "--json").json)
    assert page[0] == page[1] == page[2]
    kept = [sorted(Path(place).rglob("*.bin")) for place in ("one", "two")]
    assert [path.parent for paths in kept for path in paths] == [
        Path("one/images"),
        Path("two/images"),
    ]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(metaplug: Any) -> None:
    options = ["train", *TINY, "--iterations", "60", "--set", "training.validation_tasks=4"]
    command = [*options, "--name", "stopped"]
    folder = Path("runs/stopped")
    pid = os.fork()
    if not pid:
        sys.stderr = Path("stderr.txt").open("w", buffering=1)  # noqa: SIM115
        try:
            main(command)
        except SystemExit as stopped:
            os._exit(int(stopped.code or 0))
        finally:
            os._exit(99)
    while not (
        (folder / "metrics.jsonl").exists()
        and (folder / "metrics.jsonl").read_text().count("\n") >= 3
    ):
        time.sleep(0.01)
    os.kill(pid, signal.SIGINT)
    _, status = os.waitpid(pid, 0)
    assert os.WEXITSTATUS(status) == 130
    lines = Path("stderr.txt").read_text().splitlines()
    assert "stopping after this step; Ctrl-C again stops at once" in lines
    assert (
        lines[-1]
        == f"metaplug: stopped, with a checkpoint in {folder}: the same command with --resume"
        " goes on"
    )
    done = MetaLearner.load(folder / "last.safetensors").iteration
    assert done == (folder / "metrics.jsonl").read_text().count("\n")

    again = metaplug(*command, "--resume")
    assert again.status == 0
    assert f"going on in {folder} after iteration {done}" in again.err
    assert metaplug(*options, "--name", "whole").status == 0
    assert (folder / "metrics.jsonl").read_bytes() == Path("runs/whole/metrics.jsonl").read_bytes()
    one, other = (
        checkpoint.read(Path("runs") / name / "last.safetensors")["model"]
        for name in ("stopped", "whole")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_ctrl_c_twice_stops_at_once(metaplug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("metaplug.experiments.runs.training.build", twice)
    answer = metaplug("train", *TINY)
    assert answer.status == 130
    assert answer.err.splitlines()[-1] == "metaplug: stopped"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_preset_of_ones_own_on_the_command_line(metaplug: Any) -> None:
    Path("own.yaml").write_text(
        "plugins: [{plugin: gradient-sharing, settings: {gate: 0.25}}]\nsummary: sharing, and"
        " nothing else\n"
    )
    answer = metaplug("explain", "--preset", "own.yaml", "--with", "meta-sgd:meta_lr=0.01")
    squeezed = [" ".join(line.split()) for line in answer.out.splitlines()]
    assert squeezed[0] == "own: sharing, and nothing else"
    assert "gradient-sharing gate 0.25 preset own" in squeezed
    assert "meta-sgd meta_lr 0.01 option" in squeezed
    assert "preset own option" in squeezed
    compared = metaplug(
        "compare", *TINY, "--variant", "maml", "--variant", "own.yaml + meta-sgd", "--json", "-"
    )
    assert compared.status == 0, compared.err
    assert [row["label"] for row in compared.json["rows"]] == [
        "maml",
        "own.yaml+meta-sgd",
    ]
    assert compared.json["rows"][1]["config"]["preset"]["name"] == "own"
    missing = metaplug("train", "--preset", "none.yaml")
    assert (missing.status, missing.err) == (
        2,
        "metaplug: cannot read none.yaml: No such file or directory; give a YAML file\n",
    )


@pytest.mark.parametrize(
    "preset",
    [
        "maml",
        "fomaml",
        "anil",
        "boil",
        "reptile",
        "imaml",
        "meta-sgd",
        "warp-grad",
        "maml++",
        "maml++-reference",
    ],
)
def test_explain_shows_every_preset(metaplug: Any, preset: str) -> None:
    answer = metaplug("explain", "--preset", preset)
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.startswith(f"{preset}: ")
    assert f"preset {preset} option" in [" ".join(line.split()) for line in answer.out.splitlines()]


def test_plugins_that_conflict_are_refused_before_training(metaplug: Any) -> None:
    answer = metaplug("train", *TINY, "--preset", "reptile", "--with", "multi-step-loss")
    assert (answer.status, answer.err) == (
        2,
        "metaplug: plugin 'reptile' conflicts with 'multi-step-loss': leave one of them out\n",
    )
    answer = metaplug("train", *TINY, "--preset", "maml++")
    assert answer.status == 2
    assert "plugin 'per-step-batch-norm' needs batch norm layers" in answer.err
    answer = metaplug("explain", "--preset", "maml++", "--with", "multi-step-loss")
    assert (answer.status, answer.err) == (
        2,
        (
            "metaplug: plugin 'multi-step-loss' stands twice in the list: give one of them a name"
            " of its own, or leave it out\n"
        ),
    )


def test_a_task_is_drawn(metaplug: Any) -> None:
    answer = metaplug(
        "tasks",
        "glyphs",
        "--draw",
        "task.png",
        "--ways",
        "3",
        "--set",
        "tasks.settings.within=true",
        "--set",
        "tasks.settings.rotate=true",
        "--seed",
        "4",
    )
    assert answer.status == 0
    assert answer.out.endswith("one train task is drawn in task.png\n")
    assert Path("task.png").read_bytes().startswith(b"\x89PNG")
    assert (
        metaplug("tasks", "--draw", "task.png").err
        == "metaplug: --draw draws a task of one source: name the source, as in metaplug tasks"
        " glyphs --draw task.png\n"
    )
    assert (
        metaplug("tasks", "glyphs", "--set", "tasks.settings.turn=true").err
        == "metaplug: glyphs: unknown field 'turn': known: 'within', 'train_ways',"
        " 'train_shots', 'vary', 'varied_evaluation', 'rotate', 'flip', 'shift', 'memory_mib',"
        " 'accents'\n"
    )
    wrong = metaplug("tasks", "glyphs", "--draw", "nowhere/task.png")
    assert (wrong.status, wrong.err.count("\n")) == (1, 1)


def test_a_plugin_of_the_preset_is_not_changed_in_passing(metaplug: Any) -> None:
    answer = metaplug("explain", "--preset", "maml++", "--set", "plugins.derivative-order.switch=0")
    assert (answer.status, answer.err) == (
        2,
        (
            "metaplug: --set plugins.derivative-order.switch: 'derivative-order' is a plugin of "
            "the preset maml++, and none after it: write --set "
            "preset.derivative-order.switch=VALUE\n"
        ),
    )


@pytest.mark.parametrize(
    ("words", "lost", "by"),
    [
        ("--inner-lr 0.1 --set learner={inner_steps:5}", "learner.inner_lr", "learner"),
        ("--set learner.inner_lr=0.1 --set learner={}", "learner.inner_lr", "learner"),
        ("--with gradient-noise --set plugins=[]", "plugins", "plugins"),
        ("--preset anil --set preset=fomaml", "preset", "preset"),
    ],
)
def test_nothing_that_is_given_is_lost(words: str, lost: str, by: str, metaplug: Any) -> None:
    answer = metaplug("explain", *words.split())
    said = f"metaplug: --set {by} would replace {lost}, which is given, too: leave one of them out"
    assert (answer.status, answer.err) == (2, f"{said}\n")


def test_a_set_may_say_more_of_what_is_given(metaplug: Any) -> None:
    words = "--preset maml++ --set preset.derivative-order.switch=7 --inner-lr 0.1"
    more = "--with gradient-sharing:gate=0.3 --set plugins.gradient-sharing.gate=0.9"
    last = "--set learner.inner_lr=0.2 --set learner.inner_lr=0.3"
    words = f"{words} {more} {last}"
    shown = " ".join(metaplug("explain", *words.split()).out.split())
    assert "learner.inner_lr 0.3 option" in shown
    assert "gradient-sharing gate 0.9 option" in shown
    twice = metaplug("explain", "--with", "gradient-sharing:gate=0.3,gate=0.9")
    said = "'gradient-sharing:gate=0.3,gate=0.9' gives a field twice: leave one of them out"
    assert (twice.status, twice.err) == (2, f"metaplug: {said}\n")


def test_sizes_of_tasks_are_no_settings_of_a_source(metaplug: Any) -> None:
    answer = metaplug("train", "--model", "mlp", "--set", "tasks.settings.ways=3")
    said = "tasks.settings.ways: no source has it as a setting; give tasks.ways"
    assert (answer.status, answer.err) == (2, f"metaplug: {said}\n")


def test_a_study_s_set_does_not_stop_at_a_variant(metaplug: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("variants: [{label: mine, preset: maml, set: {learner.inner_lr: 0.1}}]\n")
    answer = metaplug("study", str(file), "--dry-run", "--set", "learner.inner_lr=0.9")
    said = "--set learner.inner_lr: the variant 'mine' has a value of its own; change it there"
    assert (answer.status, answer.err) == (2, f"metaplug: {said}\n")


def test_what_a_preset_prints_can_be_typed_again(metaplug: Any) -> None:
    answer = metaplug("plugins", "maml++", "--json")
    plugins = answer.json[0]["facts"]["plugins"]
    assert "derivative-order:switch=50,iterations_per_epoch=null" in plugins
    variant = "maml+" + plugins.replace(", ", "+")
    assert (
        metaplug(
            "explain", *(word for part in variant.split("+")[1:] for word in ("--with", part))
        ).status
        == 0
    )


def test_every_variant_is_tried_before_the_first_is_trained(metaplug: Any) -> None:
    for variant, text in (
        ("maml++", "variant 'maml++': plugin 'per-step-batch-norm' needs batch norm layers"),
        (
            "maml+meta-sdg",
            "variant 'maml+meta-sdg': unknown plugin 'meta-sdg': did you mean 'meta-sgd'?",
        ),
    ):
        answer = metaplug("compare", *TINY, "--variant", "maml", "--variant", variant)
        assert answer.status == 2
        assert answer.err.startswith(f"metaplug: {text}")
