"""Models by name: installed, of your own, of torchvision; refusals, and runs evaluated later."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from metaplug import MetaLearner, TaskBatch
from metaplug.cli.main import main
from metaplug.errors import RequestError, RunError
from metaplug.experiments.build import build
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.runs import load, train
from metaplug.models import Conv4
from metaplug.models.factories import make_model
from metaplug.testing import Problem, assert_close, reference

SOURCE = """
from torch import nn

width = 3


def make(input_shape, outputs, *, hidden=4):
    first, last = nn.Linear(input_shape[0], hidden), nn.Linear(hidden, outputs)
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), last)


def make_wide(input_shape, outputs):
    return make(input_shape, outputs + 1)


def make_narrow(input_shape, outputs):
    return nn.Sequential(make(input_shape, outputs), nn.Flatten(0))


def make_nothing(input_shape, outputs):
    return {"layers": 2}


class Deep(nn.Module):
    def __init__(self, input_shape, outputs):
        super().__init__()
        self.layer = make(input_shape, outputs)

    def forward(self, x):
        return self.layer(x)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module in the current folder, importable only as the command line makes it."""
    (tmp_path / "my_models.py").write_text(SOURCE)
    (tmp_path / "my_broken.py").write_text("import nothing_of_that_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*filter(None, sys.path), ""])
    for name in ("my_models", "my_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "my_models"


def refusal(make: Callable[[], object], kind: type[Exception] = RequestError) -> str:
    with pytest.raises(kind) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


# Installed models, and those of one's own.


def test_a_plain_name_is_an_installed_model() -> None:
    model = make_model("conv4", (1, 28, 28), 5, {"filters": 4})
    assert type(model) is Conv4
    assert model.config.filters == 4
    assert (
        refusal(lambda: make_model("conv5", (1, 28, 28), 5, {}))
        == "unknown model 'conv5': did you mean 'conv4'?"
    )
    assert (
        refusal(lambda: make_model("conv4", (1, 28, 28), 5, {"filter": 4}))
        == "conv4: unknown field 'filter': did you mean 'filters'?"
    )


def test_a_factory_is_called_with_shape_outputs_and_settings(mine: str) -> None:
    model: Any = make_model(f"{mine}:make", (3,), 2, {"hidden": 7})
    assert (model[1].in_features, model[1].out_features, model[3].out_features) == (3, 7, 2)
    assert type(make_model(f"{mine}:Deep", (3,), 2, {})).__name__ == "Deep"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "my_modles:make",
            {},
            "the model 'my_modles:make' asks for the module 'my_modles', which is not found: "
            "run in the folder that holds it, or install it",
        ),
        (
            "my_package.my_models:make",
            {},
            "the model 'my_package.my_models:make' asks for the module 'my_package', which is not "
            "found: "
            "run in the folder that holds it, or install it",
        ),
        (
            "my_models:maek",
            {},
            "the model 'my_models:maek' asks for 'maek', which the module does not have: did you "
            "mean 'make'?",
        ),
        (
            "my_models:zzz",
            {},
            "the model 'my_models:zzz' asks for 'zzz', which the module does not have: "
            "known: 'make', 'make_wide', 'make_narrow', 'make_nothing', 'Deep'",
        ),
        (
            "my_models:width",
            {},
            "the model 'my_models:width' is of type int, which cannot be called: "
            "name a function or class that takes (input_shape, outputs, **settings)",
        ),
        (
            "my_models:make_nothing",
            {},
            "the model 'my_models:make_nothing' gives a dict, not a torch.nn.Module: let its "
            "factory return one",
        ),
        (
            "my_models:make",
            {"hiden": 3},
            "the model 'my_models:make' cannot be made with the settings {'hiden': 3} "
            "(TypeError: make() got an unexpected keyword argument 'hiden'): correct "
            "model.settings, or what the factory takes",
        ),
        (
            "./my_models.py:make",
            {},
            "the model './my_models.py:make' is no MODULE:FACTORY: write both as Python does, such "
            "as my_package.my_module:make",
        ),
        (
            "my_models:",
            {},
            "the model 'my_models:' is no MODULE:FACTORY: write both as Python does, such as "
            "my_package.my_module:make",
        ),
    ],
)
def test_what_leads_to_no_model_is_refused(
    mine: str, name: str, settings: dict[str, Any], message: str
) -> None:
    assert refusal(lambda: make_model(name, (3,), 2, settings)) == message


def test_a_module_that_does_not_load_is_a_failed_run(mine: str) -> None:
    assert refusal(lambda: make_model("my_broken:make", (3,), 2, {}), RunError) == (
        "the module of the model 'my_broken:make' does not load "
        "(ModuleNotFoundError: No module named 'nothing_of_that_name'): correct it there"
    )


# The form of the output.


def sinusoid(name: str, **settings: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "model": {"name": name, "settings": settings},
            "tasks": {"source": "sinusoid", "shots": 1, "queries": 2},
            "learner": {"inner_lr": 0.01, "inner_steps": 1},
            "training": {
                "iterations": 2,
                "tasks_per_batch": 2,
                "validate_every": 1,
                "validation_tasks": 2,
                "test_tasks": 2,
            },
            "runtime": {"threads": 1, "device": "cpu"},
        }
    )


def images(folder: Path, name: str, **settings: Any) -> ExperimentConfig:
    """2-way tasks of colour images, 32 x 32, that are noise."""
    noise = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label in ("a", "b"):
            (folder / split / f"{split}-{label}").mkdir(parents=True, exist_ok=True)
            for index in range(3):
                pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"{split}-{label}" / f"{index}.png")
    tasks = {
        "source": f"folder:{folder}",
        "ways": 2,
        "queries": 1,
        "settings": {"mode": "colour", "size": 32},
    }
    values = sinusoid(name, **settings).model_dump()
    return ExperimentConfig.model_validate({**values, "tasks": tasks})


def test_an_output_that_is_too_wide_or_too_narrow_is_refused_when_the_experiment_is_built(
    mine: str,
) -> None:
    assert build(sinusoid("my_models:make")).learner.batching is None
    assert refusal(lambda: build(sinusoid("my_models:make_wide"))) == (
        "the model answers n examples with (n, 2), but the tasks need (n, 1): give its head that "
        "form"
    )
    assert refusal(lambda: build(sinusoid("my_models:make_narrow"))) == (
        "the model answers n examples with (n), but the tasks need (n, 1): give its head that form"
    )


@pytest.mark.parametrize("width", [1, 3])
def test_so_it_is_for_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    config = images(tmp_path, "conv4", filters=4)
    build(config)
    monkeypatch.setattr(
        "metaplug.experiments.build.make_model",
        lambda *_: Conv4((3, 32, 32), width, filters=4),
    )
    assert refusal(lambda: build(config)) == (
        f"the model answers n examples with (n, {width}), but the tasks need (n, 2): give its head "
        "that form"
    )


class Counting(nn.Module):
    """Everything that a forward pass can leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.layer = nn.BatchNorm1d(1), nn.Dropout(0.5), nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(self.drop(self.norm(x)))
        return result


def test_the_trial_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Counting()
    model.eval().drop.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.random.get_rng_state()
    monkeypatch.setattr("metaplug.experiments.build.make_model", lambda *_: model)
    build(sinusoid("any:thing"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == [False, False, True, False]


# Runs.


def test_a_run_of_a_factory_is_trained_and_evaluated_from_the_command_line(
    mine: str, capfd: pytest.CaptureFixture[str]
) -> None:
    sys.path.remove("")
    options = [
        "--tasks",
        "sinusoid",
        "--iterations",
        "2",
        "--tasks-per-batch",
        "2",
        "--inner-lr",
        "0.01",
        "--device",
        "cpu",
    ]
    options += [
        "--set",
        "training.test_tasks=4",
        "--set",
        "training.validation_tasks=2",
        "--set",
        "model.settings.hidden=3",
    ]
    named = ["--model", "my_models:make"]
    for command in (
        ["train", *named, *options, "--name", "own"],
        ["evaluate", "runs/own", *named, "--json"],
    ):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["mean"] == json.loads(Path("runs/own/summary.json").read_text())["test"]["mean"]
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--model", "my_models:maek", *options])
    assert (stopped.value.code, capfd.readouterr().err) == (
        2,
        "metaplug: the model 'my_models:maek' asks for 'maek', which the module does not have: did "
        "you mean 'make'?\n",
    )


def test_a_learner_of_a_factory_asks_for_its_model(mine: str, tmp_path: Path) -> None:
    experiment = build(sinusoid("my_models:make"))
    path = tmp_path / "learner.pt"
    experiment.learner.save(path)
    assert refusal(lambda: MetaLearner.load(path)) == (
        f"{path} holds the weights of a model of your own, which a file cannot build: give it as "
        "MetaLearner.load(..., model=...)"
    )
    loaded = MetaLearner.load(path, model=make_model("my_models:make", (1,), 1, {}))
    assert all(map(torch.equal, loaded.model.parameters(), experiment.learner.model.parameters()))


# torchvision.


@pytest.mark.parametrize(
    ("name", "stem", "head"),
    [
        ("resnet18", "conv1", "fc"),
        ("squeezenet1_1", "features.0", "classifier.1"),
        ("mobilenet_v3_small", "features.0.0", "classifier.3"),
    ],
)
def test_a_classifier_gets_the_head_and_the_channels_of_the_tasks(
    name: str, stem: str, head: str
) -> None:
    pytest.importorskip("torchvision")
    colour, grey = (
        make_model(f"torchvision:{name}", (channels, 32, 32), 7, {}) for channels in (3, 1)
    )
    for model, channels in ((colour, 3), (grey, 1)):
        assert model(torch.rand(2, channels, 32, 32)).shape == (2, 7)
        last: Any = model.get_submodule(head)
        assert isinstance(last, nn.Linear | nn.Conv2d)
        assert last.weight.shape[0] == 7
    kept, changed = (str(model.get_submodule(stem)) for model in (colour, grey))
    assert changed == kept.replace("(3,", "(1,", 1)
    differ = {
        key
        for key, value in colour.state_dict().items()
        if value.shape != grey.state_dict()[key].shape
    }
    assert differ == {f"{stem}.weight"}


def test_settings_reach_the_classifier() -> None:
    pytest.importorskip("torchvision")
    model: Any = make_model("torchvision:mobilenet_v3_small", (3, 32, 32), 2, {"dropout": 0.75})
    assert model.classifier[2].p == 0.75


@pytest.mark.parametrize(
    ("name", "shape", "settings", "message"),
    [
        (
            "resnet81",
            (3, 32, 32),
            {},
            "unknown torchvision model 'resnet81': did you mean 'resnet18'?",
        ),
        (
            "resnet18",
            (1,),
            {},
            "torchvision:resnet18 takes images (channels, height, width) to at least one output, "
            "but the tasks have inputs (1,) and "
            "2 outputs: choose other tasks, or the model mlp",
        ),
        (
            "resnet18",
            (3, 32, 32),
            {"widht": 3},
            "the model 'torchvision:resnet18' cannot be made with the settings {'widht': 3} "
            "(TypeError: ResNet.__init__() got an unexpected keyword argument 'widht'): correct "
            "model.settings, or what the factory takes",
        ),
    ],
)
def test_what_torchvision_cannot_make_is_refused(
    name: str, shape: tuple[int, ...], settings: dict[str, Any], message: str
) -> None:
    pytest.importorskip("torchvision")
    assert refusal(lambda: make_model(f"torchvision:{name}", shape, 2, settings)) == message


def test_without_torchvision_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    assert refusal(lambda: make_model("torchvision:resnet18", (3, 32, 32), 2, {})) == (
        "the model 'torchvision:resnet18' needs torchvision, which does not load "
        "(ModuleNotFoundError: import of torchvision.models halted; None in sys.modules): "
        f"pip install torchvision, in the version that belongs to torch {torch.__version__}"
    )


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
def test_meta_gradients_through_torchvision_equal_a_plain_loop(batching: str) -> None:
    """Batch norm by the batch, max-pooling, groups, shuffled channels and a mean over places."""
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = make_model("torchvision:shufflenet_v2_x0_5", (1, 32, 32), 3, {}).double()
    x, y = torch.randn(2, 2, 5, 1, 32, 32, dtype=torch.float64), torch.randint(3, (2, 2, 5))
    case = Problem(model, TaskBatch(x[0], y[0], x[1], y[1]), lr=0.1, steps=1)
    expected = reference.maml(case.model, case.batch, steps=1, lr=0.1).gradients
    # The gradients are as large as the scale, and some are zero up to rounding at that scale.
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert_close(
        case.learner(task_batching=batching).meta_gradients(case.batch),
        expected,
        rtol=1e-8,
        atol=1e-10 * scale,
    )


def test_resnet18_is_trained_with_all_tasks_stacked(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    experiment = build(images(tmp_path, "torchvision:resnet18"))
    learner, tasks = experiment.learner, experiment.tasks
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    history = learner.fit(tasks.train, iterations=2, tasks_per_batch=2)
    assert learner.batching is not None
    assert learner.batching.batching == "vectorized"
    assert [record.step.iteration for record in history.records] == [1, 2]
    for (
        name,
        value,
    ) in learner.model.state_dict().items():  # stored statistics are not touched, weights are
        assert torch.equal(value, before[name]) == name.endswith(
            ("running_mean", "running_var", "num_batches_tracked")
        ), name
    assert learner.evaluate(tasks.test, num_tasks=2).transductive == (
        "batch norm uses the statistics of each task's own batch",
    )


# Batch norm over two images is all but a sign: on some CPUs rounding alone makes the step too long.
@pytest.mark.filterwarnings("ignore:adaptation raises the support loss")
def test_a_run_of_torchvision_is_evaluated_later(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    summary = train(images(tmp_path / "images", "torchvision:shufflenet_v2_x0_5"), tmp_path / "run")
    loaded = load(tmp_path / "run")
    assert summary is not None
    assert loaded.learner.evaluate(loaded.tasks.test, num_tasks=2).mean == summary["test"]["mean"]
    with pytest.raises(
        RequestError,
        match=r"^.*best\.safetensors holds the weights of a model of your own, which a file cannot "
        r"build",
    ):
        MetaLearner.load(tmp_path / "run" / "best.safetensors")
    model = make_model("torchvision:shufflenet_v2_x0_5", (3, 32, 32), 2, {})
    again = MetaLearner.load(tmp_path / "run" / "best.safetensors", model=model)
    assert all(map(torch.equal, again.model.parameters(), loaded.learner.model.parameters()))


def test_auto_falls_back_where_vmap_refuses_a_classifier_and_names_the_operation() -> None:
    """Stochastic depth draws noise in place, into a tensor that all tasks share."""
    pytest.importorskip("torchvision")
    learner = MetaLearner(
        make_model("torchvision:efficientnet_b0", (3, 32, 32), 2, {}), inner_steps=0
    )
    x, y = torch.rand(1, 2, 3, 32, 32), torch.arange(2).expand(1, 2)
    learner.meta_gradients(TaskBatch(x, y, x, y))
    assert learner.batching is not None
    assert learner.batching.batching == "sequential"
    assert learner.batching.reason.startswith(
        "torch.vmap refuses the model: vmap: Cannot ask for different inplace randomness"
    )
    assert learner.batching.reason.endswith(" (in bernoulli_)")
