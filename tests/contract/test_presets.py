"""Presets: installed ones, and one's own in a file, in Python, on the command line."""

from pathlib import Path

import pytest

from metaplug import PluginUse, Preset, RequestError
from metaplug.contract import registry
from metaplug.contract.presets import find_preset
from metaplug.experiments.build import build
from metaplug.experiments.configuration import ExperimentConfig, to_yaml
from metaplug.experiments.resolving import resolve
from metaplug.experiments.runs import load, train
from metaplug.experiments.variant_texts import parse_plugin, parse_variant
from metaplug.settings import validated
from metaplug.testing import Stream, problem
from metaplug.yaml_text import read_yaml

MINE = (
    "plugins:\n  - meta-sgd\n  - {plugin: gradient-sharing, settings: {gate: 0.25}}\n"
    "defaults: {learner: {inner_lr: 0.2}}\n"
)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A preset in a file of the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(MINE)
    return "mine.yaml"


PUBLISHED = {
    "maml": [],
    "fomaml": ["derivative-order"],
    "anil": ["partial-adaptation"],
    "boil": ["partial-adaptation"],
    "reptile": ["derivative-order", "reptile"],
    "imaml": ["imaml"],
    "meta-sgd": ["meta-sgd"],
    "alfa": ["alfa"],
    "l2f": ["l2f"],
    "mr-maml": ["partial-adaptation", "mr-maml"],
    "taml": ["taml"],
    "warp-grad": ["warp-grad"],
    "maml++": [
        "per-step-batch-norm",
        "per-step-learning-rates",
        "multi-step-loss",
        "derivative-order",
        "cosine-meta-lr",
    ],
    "cavia": ["cavia"],
    "proto-maml": ["proto-maml"],
    "maml++-reference": [
        "per-step-batch-norm",
        "per-step-learning-rates",
        "multi-step-loss",
        "cosine-meta-lr",
    ],
}


def test_the_installed_presets_are_these():
    assert {
        name: [use.plugin for use in find_preset(name).plugins] for name in registry.names("preset")
    } == PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_preset_is_an_experiment_whose_values_say_where_they_come_from(name):
    preset = find_preset(name)
    resolved = resolve([("option", {"preset": name})])
    assert resolved.origins["preset"] == "option"
    for use in preset.plugins:
        for field in use.settings:
            assert resolved.origins[f"plugins.{use.plugin}.{field}"] == f"preset {name}"
    for section, values in preset.defaults.items():
        for field in values:
            origins = {
                origin
                for path, origin in resolved.origins.items()
                if path.startswith(f"{section}.{field}")
            }
            assert origins == {f"preset {name}"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_preset_composes_with_gradient_sharing(name):
    learner = problem("conv4").learner(preset=name, plugins=["gradient-sharing"])
    learner.fit(Stream("conv4"), iterations=2, tasks_per_batch=2)
    assert [plugin.name for plugin in learner.chain.plugins] == [
        *PUBLISHED[name],
        "gradient-sharing",
    ]


def test_the_reference_preset_builds_the_reference_model():
    experiment = build(
        resolve([("option", {"preset": "maml++-reference", "tasks": {"source": "glyphs"}})]).config
    )
    model = experiment.learner.model
    assert (model.config.filters, model.config.pooling, model.config.leaky_slope) == (
        64,
        "max",
        0.01,
    )
    assert not bool(model.head.bias.any()), "Xavier's biases are zero"
    assert experiment.config.training.iterations == 100 * 500


# One's own.


def test_a_preset_in_a_file_is_named_after_it_and_gives_way_to_options(mine):
    preset = find_preset(mine)
    assert (preset.name, preset.summary) == ("mine", "")
    assert [use.plugin for use in preset.plugins] == ["meta-sgd", "gradient-sharing"]
    resolved = resolve(
        [
            (
                "option",
                {"preset": mine, "learner": {"inner_steps": 2}, "plugins": ["label-smoothing"]},
            )
        ]
    )
    assert resolved.config.algorithm == "mine"
    assert (resolved.config.learner.inner_lr, resolved.config.learner.inner_steps) == (0.2, 2)
    assert resolved.origins["learner.inner_lr"] == "preset mine"
    assert resolved.origins["plugins.gradient-sharing.gate"] == "preset mine"
    over = resolve([("option", {"preset": mine, "learner": {"inner_lr": 0.7}})])
    assert (over.config.learner.inner_lr, over.origins["learner.inner_lr"]) == (0.7, "option")


def test_a_preset_in_a_file_makes_a_learner(mine):
    learner = problem().learner(preset=mine, inner_lr=None)
    assert [plugin.name for plugin in learner.chain.plugins] == ["meta-sgd", "gradient-sharing"]
    assert learner.settings.inner_lr == 0.2


def test_a_preset_written_out_in_an_experiment(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text("preset:\n  plugins: [meta-sgd]\n  summary: mine\ntraining: {iterations: 3}\n")
    resolved = resolve([(str(path), read_yaml(path))])
    assert resolved.config.preset == Preset(
        name="experiment", summary="mine", plugins=(PluginUse(plugin="meta-sgd"),)
    )
    again = validated(
        ExperimentConfig, dict(_read_text(to_yaml(resolved.config), tmp_path)), "again"
    )
    assert again == resolved.config


def _read_text(text, folder):
    (folder / "again.yaml").write_text(text)
    return read_yaml(folder / "again.yaml")


def test_a_run_keeps_the_whole_preset_and_needs_the_file_no_more(mine):
    small = {
        "preset": mine,
        "model": {"name": "mlp", "settings": {"hidden": [4]}},
        "tasks": {"source": "sinusoid", "shots": 3, "queries": 3},
        "learner": {"inner_lr": 0.01, "inner_steps": 1},
        "training": {
            "iterations": 2,
            "tasks_per_batch": 2,
            "validate_every": 1,
            "validation_tasks": 3,
            "test_tasks": 3,
        },
        "runtime": {"device": "cpu"},
    }
    config = resolve([("option", small)]).config
    train(config, Path("run"))
    Path(mine).unlink()
    loaded = load(Path("run"))
    assert [plugin.name for plugin in loaded.learner.chain.plugins] == [
        "meta-sgd",
        "gradient-sharing",
    ]
    assert train(config, Path("run"), resume=True) is not None


def test_a_file_stands_at_the_start_of_a_variant():
    assert parse_variant("some/mine.yaml + meta-sgd") == (
        "some/mine.yaml",
        [PluginUse(plugin="meta-sgd")],
    )
    assert parse_variant("maml++.yml") == ("maml++.yml", [])
    assert parse_variant("maml+++gradient-sharing") == (
        "maml++",
        [PluginUse(plugin="gradient-sharing")],
    )
    assert parse_variant("maml++-reference+meta-sgd")[0] == "maml++-reference"


def test_commas_inside_a_list_do_not_separate_settings():
    use = parse_plugin("partial-adaptation:head=[fc.*,head.*],adapts=body")
    assert use.settings == {"head": ["fc.*", "head.*"], "adapts": "body"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plugin: [meta-sgd]", "bad.yaml: unknown field 'plugin': did you mean 'plugins'?"),
        (
            "plugins: [{plugin: meta-sgd, setting: {}}]",
            "bad.yaml: unknown field 'plugins.0.setting'",
        ),
        (
            "plugins: [meta-sgd]\ndefaults: {learner: {inner_lr: -1}}",
            "learner.inner_lr = -1: input should be greater than or equal to 0",
        ),
        (
            "plugins: [meta-sgd]\ndefaults: {tasks: {ways: 2}}",
            "a preset sets no tasks by default: list plugins in its own field",
        ),
        (
            "preset: maml\nlearner: {inner_lr: 0.1}",
            "bad.yaml is a whole configuration, not a preset: train it by metaplug train bad.yaml",
        ),
        ("- meta-sgd", "bad.yaml holds a list, not a mapping of settings"),
        ("plugins: [meta-sgd\n", "bad.yaml, line 2 is not valid YAML"),
    ],
)
def test_a_wrong_file_is_named_with_the_mend(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(text)
    with pytest.raises(RequestError) as error:
        resolve([("option", {"preset": "bad.yaml"})])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(
        RequestError,
        match=r"^cannot read nowhere.yaml: No such file or directory; give a YAML file$",
    ):
        find_preset("nowhere.yaml")


# Where every setting of a plugin comes from.


def test_settings_of_plugins_keep_their_origin_through_later_layers():
    file = {
        "preset": "maml++",
        "plugins": [{"plugin": "gradient-sharing", "settings": {"gate": 0.3, "momentum": 0.9}}],
    }
    extended = [
        {"plugin": "gradient-sharing", "settings": {"gate": 0.4, "momentum": 0.9}},
        {"plugin": "meta-sgd"},
    ]
    origins = resolve([("mine.yaml", file), ("option", {"plugins": extended})]).origins
    assert origins["plugins.gradient-sharing.gate"] == "option"
    assert origins["plugins.gradient-sharing.momentum"] == "mine.yaml"
    assert origins["plugins.multi-step-loss.annealing_epochs"] == "preset maml++"
    assert "plugins.multi-step-loss.floor" not in origins
