"""Settings of a preset's plugins that a run has otherwise."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from metaplug.cli.main import main
from metaplug.contract.presets import Preset
from metaplug.errors import RequestError
from metaplug.experiments.configuration import from_yaml, to_yaml
from metaplug.experiments.resolving import Resolved, assign, resolve

EPOCHS = "multi-step-loss.annealing_epochs"
TINY = (
    "--preset fomaml --tasks sinusoid --model mlp --shots 3 --queries 3 --inner-steps 1 "
    "--inner-lr 0.01 --tasks-per-batch 2 --iterations 2 --device cpu "
    "--set training.validation_tasks=2 --set training.test_tasks=2 --set runtime.threads=1"
)


def changed(*paths: str, preset: Any = "maml++") -> Resolved:
    """Resolve a preset with settings that are given as "PLUGIN.FIELD=NUMBER"."""
    values: dict[str, Any] = {"preset": preset}
    for path, _, value in (path.partition("=") for path in paths):
        values = assign(values, f"preset.{path}", int(value))
    return resolve([("option", values)])


def settings(resolved: Resolved, name: str) -> dict[str, Any]:
    preset = resolved.config.preset
    assert isinstance(preset, Preset)
    (found,) = [use.settings for use in preset.plugins if use.label == name]
    return found


def test_a_changed_preset_says_so_and_has_all_else_of_its_own() -> None:
    found = changed(f"{EPOCHS}=30", "derivative-order.switch=7", "derivative-order.switch=9")
    assert settings(found, "multi-step-loss") == {
        "annealing_epochs": 30,
        "iterations_per_epoch": None,
    }
    assert settings(found, "derivative-order") == {"switch": 9, "iterations_per_epoch": None}
    assert found.config.algorithm == (
        "maml++ with multi-step-loss.annealing_epochs=30, derivative-order.switch=9"
    )
    origins = {path.removeprefix("plugins."): origin for path, origin in found.origins.items()}
    assert origins[EPOCHS] == origins["derivative-order.switch"] == origins["preset"] == "option"
    assert origins["multi-step-loss.iterations_per_epoch"] == "preset maml++"
    assert found.config.training == changed().config.training  # the preset's defaults


def test_what_the_preset_has_already_is_no_change() -> None:
    assert changed(f"{EPOCHS}=10").config == changed().config
    assert changed(f"{EPOCHS}=10").config.preset == "maml++"


def test_a_record_of_it_needs_no_preset_of_the_name_and_can_be_changed_again() -> None:
    config = changed(f"{EPOCHS}=30").config
    assert from_yaml(to_yaml(config), "config.yaml") == config
    values = yaml.safe_load(to_yaml(config))
    assert resolve([("config.yaml", values)]).config == config
    more = resolve([("config.yaml", values), ("option", assign({}, f"preset.{EPOCHS}", 4))])
    assert more.config.algorithm == "maml++ with multi-step-loss.annealing_epochs=4"
    more = resolve(
        [("config.yaml", values), ("option", assign({}, "preset.derivative-order.switch", 4))]
    )
    assert more.config.algorithm == (
        "maml++ with multi-step-loss.annealing_epochs=30, derivative-order.switch=4"
    )
    assert more.origins[f"plugins.{EPOCHS}"] == "config.yaml"
    assert more.origins["plugins.derivative-order.switch"] == "option"


def test_a_file_changes_a_preset_and_options_change_it_further(tmp_path: Path) -> None:
    change = {"derivative-order": {"switch": 4}}
    layers: list[tuple[str, Any]] = [
        ("a.yaml", {"preset": {"base": "maml++", **change}}),
        ("option", assign({}, f"preset.{EPOCHS}", 30)),
    ]
    assert resolve(layers).config == changed("derivative-order.switch=4", f"{EPOCHS}=30").config
    layers[0] = ("a.yaml", {"preset": "maml++"})
    layers[1] = ("option", {"preset": change})
    assert resolve(layers).config == changed("derivative-order.switch=4").config
    # Another preset takes none of the changes over.
    assert resolve([*layers, ("option", {"preset": "fomaml"})]).config.preset == "fomaml"
    (tmp_path / "own.yaml").write_text("plugins: [gradient-noise]")
    own = changed("gradient-noise.eta=2", preset=str(tmp_path / "own.yaml"))
    assert own.config.algorithm == "own with gradient-noise.eta=2"


@pytest.mark.parametrize(
    ("preset", "text"),
    [
        (
            {"base": "maml++", "multistep-loss": {"annealing_epochs": 3}},
            "e.yaml: preset.multistep-loss: the preset maml++ has no plugin 'multistep-loss' (did "
            "you mean 'multi-step-loss'?): name one that it has, or add another by --with",
        ),
        (
            {"gradient-sharing": {"gate": 0.5}},
            "e.yaml: preset.gradient-sharing: the preset maml has no plugin 'gradient-sharing' "
            "(known: none): name one that it has, or add another by --with",
        ),
        (
            {"base": "maml++", "derivative-order": 3},
            "e.yaml: preset.derivative-order = 3: 'derivative-order' is a plugin, whose settings "
            "can be changed: write preset.derivative-order.FIELD=VALUE",
        ),
        (
            {"base": 3},
            "e.yaml: preset.base = 3: it is no preset: give the name of one, or a whole one as a "
            "mapping",
        ),
        (
            {"name": "mine", "changed": ["gradient-noise.eta"]},
            "e.yaml, preset: changed names 'gradient-noise.eta', which is no setting of its "
            "plugins: leave it out",
        ),
    ],
)
def test_a_wrong_change_is_one_line(preset: Any, text: str) -> None:
    with pytest.raises(RequestError) as error:
        resolve([("e.yaml", {"preset": preset})])
    assert str(error.value) == text


def test_a_run_records_it_resumes_with_it_and_is_repeated_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def train(options: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["train", *shlex.split(options)])
        return (int(stopped.value.code or 0), *capsys.readouterr())

    change = f"{TINY} --set preset.derivative-order.switch=100"
    status, results, err = train(f"{change} --name mine")
    assert (status, err.splitlines()[0]) == (
        0,
        "fomaml with derivative-order.switch=100 (derivative-order) on sinusoid, 3-shot, mlp, "
        "seed 0, cpu",
    )
    assert yaml.safe_load(Path("runs/mine/config.yaml").read_text())["preset"]["changed"] == [
        "derivative-order.switch"
    ]
    assert train(f"{change} --name mine --resume") == (
        0,
        results,
        "runs/mine is finished already\n",
    )
    assert train("--from runs/mine")[:2] == (
        0,
        results.replace("mine", "mine-repeated")
        + "matches runs/mine bit for bit: 2 iterations and the test\n",
    )
    status, _, err = train(f"{TINY} --name mine --resume")
    assert (status, err) == (
        2,
        "metaplug: runs/mine was begun with preset = 'fomaml with derivative-order.switch=100', "
        "which cannot become 'fomaml': resume it as it was begun (runs/mine/config.yaml), or give "
        "another --name\n",
    )
    status, _, err = train(f"{change} --set preset.derivative-order.swich=3 --name other")
    assert (status, err) == (
        2,
        "metaplug: plugin 'derivative-order': unknown field 'swich': did you mean 'switch'?\n",
    )
    assert not Path("runs/other").exists()
