"""The contract only grows: nothing of `contract.json` is removed, renamed or moved."""

import dataclasses
import importlib
import inspect
import json
from pathlib import Path

import pytest

import metaplug
from metaplug.contract import hookspecs, registry
from metaplug.contract.hookspecs import KINDS

FILE = Path(__file__).parents[1] / "contract.json"
VALUES = ("Context", "InnerStep", "LoggedRun", "LoggedStep", "Outcome", "TaskBatch")
MODULES = {
    "metaplug": metaplug.__all__,
    "metaplug.settings": ("Settings", "validated"),
    "metaplug.tasks": (
        "ArrayTasks",
        "ImageSource",
        "LabelledTasks",
        "Promises",
        "TaskBatch",
        "TaskSource",
        "TaskStream",
    ),
    "metaplug.tasks.draws": ("draw", "normal", "uniform"),
    "metaplug.testing": (
        "CLAUSES",
        "MODELS",
        "PluginConformance",
        "Problem",
        "check",
        "reference",
        "strategies",
    ),
    "metaplug.models": ("Conv4", "Mlp", "ResNet12", "WideResNet"),
}
"""Public names, and those beside them that the templates of `metaplug new-plugin` use."""


ORDERED = ("arguments", "fields")
"""Parts of the contract in which a place means something."""


def as_it_is():
    """The contract in the form of the file."""
    return {
        "hooks": dict(sorted(KINDS.items())),
        "arguments": {
            name: list(inspect.signature(getattr(hookspecs, name)).parameters)
            for name in sorted(KINDS)
        },
        "fields": {name: fields(getattr(metaplug, name)) for name in VALUES},
        "members": {
            name: members(getattr(metaplug, name)) for name in (*VALUES, "Logger", "Plugin")
        },
        "names": {module: sorted(names) for module, names in MODULES.items()},
        "entry points": dict(registry.GROUPS),
    }


def fields(cls):
    return (
        [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    )


def members(cls):
    """Public methods, properties and declarations of a class itself, beside its fields."""
    return sorted(
        name
        for name in {**vars(cls), **inspect.get_annotations(cls)}
        if not name.startswith("_") and name not in fields(cls)
    )


def faults(frozen, found, path=()):
    """What is not in `found` as it is `frozen`, in words."""
    where = " ".join(path)
    if isinstance(frozen, str):
        return (
            []
            if frozen == found
            else [
                f"{where}: '{frozen}' has become '{found}', and plugins that rely on it break: "
                "bring it back"
            ]
        )
    gone = [
        f"{where}: '{name}' is gone, and plugins that use it break: bring it back, and "
        "deprecate it first"
        for name in frozen
        if name not in found
    ]
    new = [
        f"{where}: '{name}' is new: when it is to stay for good, add it to tests/contract.json"
        for name in found
        if name not in frozen
    ]
    if isinstance(frozen, dict):
        return (
            gone
            + new
            + [
                fault
                for name in frozen
                if name in found
                for fault in faults(frozen[name], found[name], (*path, name))
            ]
        )
    if not gone and path[0] in ORDERED and found[: len(frozen)] != frozen:
        return [
            f"{where}: {found} is not {frozen} with new ones behind: put them behind, in the "
            "old order"
        ]
    return gone + new


def test_nothing_is_gone_and_what_is_new_is_written_down():
    found = faults(json.loads(FILE.read_text()), as_it_is())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda it: it["hooks"].pop("commit"),
            "hooks: 'commit' is gone, and plugins that use it break: bring it back, and "
            "deprecate it first",
        ),
        (
            lambda it: it["hooks"].update(commit="fold"),
            "hooks commit: 'notify' has become 'fold', and plugins that rely on it break: bring "
            "it back",
        ),
        (
            lambda it: it["hooks"].update(transform_everything="fold"),
            "hooks: 'transform_everything' is new: when it is to stay for good, add it to "
            "tests/contract.json",
        ),
        (
            lambda it: it["arguments"]["transform_gradients"].remove("step"),
            "arguments transform_gradients: 'step' is gone, and plugins that use it break: "
            "bring it back, and deprecate it first",
        ),
        (
            lambda it: it["arguments"]["transform_gradients"].reverse(),
            "arguments transform_gradients: ['step', 'gradients'] is not ['gradients', 'step'] "
            "with new ones behind: "
            "put them behind, in the old order",
        ),
        (
            lambda it: it["arguments"]["transform_gradients"].insert(0, "iteration"),
            "arguments transform_gradients: ['iteration', 'gradients', 'step'] is not "
            "['gradients', 'step'] with new ones behind: "
            "put them behind, in the old order",
        ),
        (
            lambda it: it["arguments"]["transform_gradients"].append("iteration"),
            "arguments transform_gradients: 'iteration' is new: when it is to stay for good, "
            "add it to tests/contract.json",
        ),
        (
            lambda it: it["fields"]["TaskBatch"].remove("query_x"),
            "fields TaskBatch: 'query_x' is gone, and plugins that use it break: bring it back, "
            "and deprecate it first",
        ),
        (
            lambda it: it["names"]["metaplug"].remove("hookimpl"),
            "names metaplug: 'hookimpl' is gone, and plugins that use it break: bring it back, "
            "and deprecate it first",
        ),
        (
            lambda it: it["entry points"].update(plugin="metaplug.contract.parts"),
            "entry points plugin: 'metaplug.plugins' has become 'metaplug.contract.parts', and "
            "plugins that rely on it break: bring it back",
        ),
    ],
)
def test_every_change_is_told_apart(change, text):
    frozen, found = as_it_is(), as_it_is()
    change(found)
    assert faults(frozen, found) == [text]


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_there(module):
    assert [
        name for name in MODULES[module] if not hasattr(importlib.import_module(module), name)
    ] == []
