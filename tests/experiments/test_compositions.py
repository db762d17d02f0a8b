"""Which plugins go together: all that are installed, and made ones whose answer is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import nn

from metaplug import Plugin, PluginConfig, RequestError, hookimpl
from metaplug.cli.main import main
from metaplug.contract import registry
from metaplug.contract.registry import Part
from metaplug.experiments.compositions import compositions, small_cases


class Plus(Plugin):
    @hookimpl
    def transform_gradients(self, gradients):
        return {name: each + 1 for name, each in gradients.items()}


class Times(Plugin):
    class Config(PluginConfig):
        factor: float = Field(examples=[3.0], description="What gradients are multiplied with.")

    config: Config

    @hookimpl
    def transform_gradients(self, gradients):
        return {name: each * self.config.factor for name, each in gradients.items()}


class Half(Plugin):
    @hookimpl
    def transform_gradients(self, gradients):
        return {name: each / 2 for name, each in gradients.items()}


class Later(Plugin):
    runs_after = ("plus",)

    @hookimpl
    def scale_meta_learning_rate(self, factor):
        return factor / 2


class Alone(Plugin):
    conflicts_with = ("half",)

    @hookimpl
    def scale_meta_learning_rate(self, factor):
        return factor + 1


class Regression(Plugin):
    """Fits one of the models alone."""

    @hookimpl
    def setup(self, context):
        if context.kind != "regression":
            raise RequestError("plugin 'regression' is for regression: leave it out")


class Images(Plugin):
    @hookimpl
    def select_adapted(self, names, layers):
        if nn.Conv2d not in layers.values():
            raise RequestError("plugin 'images' needs a convolution: leave it out")


class Unmade(Plugin):
    class Config(PluginConfig):
        strength: float = Field(description="Without a default and without an example.")

    @hookimpl
    def transform_inner_losses(self, losses):
        return losses


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world of these plugins, one of them broken."""
    kinds = (Plus, Times, Half, Later, Alone, Regression, Images, Unmade)
    parts = [Part("plugin", kind.kind(), "mine", value=kind) for kind in kinds]
    parts.append(Part("plugin", "broken", "theirs", error="the plugin 'broken' does not load"))
    monkeypatch.setattr(registry, "parts", lambda kind: parts)


def footprint(model: nn.Module) -> list[Any]:
    """What somebody could leave in a model, but for its values."""
    modules = [
        (name, type(module), module.training, sorted(vars(module)), _hooks(module))
        for name, module in model.named_modules()
    ]
    return [modules, [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]]


def _hooks(module: nn.Module) -> dict[str, int]:
    return {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}


def test_every_pair_of_installed_plugins_composes_or_says_why_and_leaves_no_trace() -> None:
    cases, untouched = small_cases(), small_cases()
    found = compositions(cases=cases)
    assert [*found.plugins] == registry.names("plugin") and not found.left_out
    assert len(found.pairs) == len(found.plugins) * (len(found.plugins) - 1) // 2
    for pair in found.pairs:
        assert bool(pair.reasons) == (pair.verdict != "composes"), pair
        for reason in pair.reasons:  # what a plugin does wrong is no refusal
            assert "not finite" not in reason and "(link " not in reason, pair
    for case, fresh in zip(cases, untouched, strict=True):
        assert footprint(case.model) == footprint(fresh.model)
        values = zip(
            case.model.state_dict().values(), fresh.model.state_dict().values(), strict=True
        )
        assert all(torch.equal(one, other) for one, other in values)
        tensors = zip(case.batch.tensors(), fresh.batch.tensors(), strict=True)
        assert all(torch.equal(one, other) for one, other in tensors)


@pytest.mark.usefixtures("made")
def test_verdicts_and_reasons_are_exact() -> None:
    found = compositions()
    assert found.plugins == ("plus", "times", "half", "later", "alone", "regression", "images")
    verdicts = {astuple(pair)[:2]: astuple(pair)[2:] for pair in found.pairs}
    both = ("both are in transform_gradients",)
    assert verdicts["plus", "times"] == ("order matters", both)
    assert verdicts["times", "half"] == ("composes", ())
    assert verdicts["plus", "later"] == (
        "order matters",
        (
            "later before plus is refused: plugin 'later' must run after 'plus': move it after "
            "that in the list of plugins",
        ),
    )
    assert verdicts["later", "alone"] == (
        "order matters",
        ("both are in scale_meta_learning_rate",),
    )
    assert verdicts["half", "alone"] == (
        "refused",
        ("plugin 'alone' conflicts with 'half': leave one of them out",),
    )
    assert verdicts["plus", "images"] == ("composes", ())
    assert verdicts["regression", "images"] == (
        "refused",
        ("none of the models that are tried fits both",),
    )
    assert found.left_out == {
        "unmade": "plugin 'unmade': 'strength' is required: give it a value",
        "broken": "the plugin 'broken' does not load",
    }


@pytest.mark.usefixtures("made")
def test_the_command_prints_the_matrix_or_the_pairs_of_one(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def metaplug(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["plugins", "--compose", *arguments])
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, *capfd.readouterr()

    status, out, err = metaplug()
    assert (status, err) == (0, "trying every pair in both orders, on small models\n")
    words = " ".join(out.split())
    assert "2 times ⇄ · · · · ·" in words and "5 alone · · ✗ ⇄ · ·" in words
    assert "half alone refused plugin 'alone' conflicts with 'half'" in words
    status, out, _ = metaplug("half", "--json")
    pairs: list[Mapping[str, Any]] = json.loads(out)["pairs"]
    assert status == 0 and len(pairs) == 6
    assert pairs[0] == {"first": "plus", "second": "half", "verdict": "order matters"} | {
        "reasons": ["both are in transform_gradients"]
    }
    assert metaplug("halves")[2].endswith(
        "metaplug: unknown plugin 'halves': did you mean 'half'?\n"
    )
    file = tmp_path / "add_two.py"
    file.write_text(
        "from metaplug import hookimpl\n\n\n@hookimpl\ndef transform_gradients(gradients):\n"
        "    return {name: each + 2 for name, each in gradients.items()}\n"
    )
    status, out, err = metaplug(str(file), "--json")
    pairs = json.loads(out)["pairs"]
    assert status == 0 and {pair["second"] for pair in pairs} == {"add-two"}
    verdicts = {pair["first"]: pair["verdict"] for pair in pairs}
    assert (verdicts["plus"], verdicts["times"]) == ("composes", "order matters")
    assert "Beside add-two" in metaplug(str(file))[1]
