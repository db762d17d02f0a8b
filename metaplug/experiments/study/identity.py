"""What makes two cells the same: everything that their figures depend on, and the code."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

import metaplug
from metaplug.contract import registry
from metaplug.contract.presets import PluginUse, find_preset
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.json_values import to_json
from metaplug.experiments.plugin_files import comparable

_SHOWS_ONLY = ("bench", "cli", "report", "templates", "testing")
"""Rooms of metaplug that no figure of a run depends on."""


def digest_of(config: ExperimentConfig) -> str:
    """Sixteen hexadecimal digits of a configuration and of the code that it runs.

    Settings of the runtime that change no result do not count. The code is the source of metaplug
    and of the plugins, as it is now, and the version of torch: a cell is computed anew after either
    has changed.
    """
    fields = {
        path: value
        for path, value in comparable(config).items()
        if not path.startswith("runtime.") or path == "runtime.precision"
    }
    text = to_json({"config": dict(sorted(fields.items())), "code": code_of(config)})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_of(config: ExperimentConfig) -> dict[str, str]:
    """By name, the versions and digests of the code that a run depends on."""
    uses: Iterable[PluginUse] = (*find_preset(config.preset).plugins, *config.plugins)
    installed = {use.plugin for use in uses if not use.is_file}
    return {
        "torch": torch.__version__,
        "metaplug": _metaplug(),
        **{name: _plugin(name) for name in sorted(installed)},
    }


@cache
def _metaplug() -> str:
    root = Path(metaplug.__file__).parent
    files = [
        file
        for file in sorted(root.rglob("*.py"))
        if file.relative_to(root).parts[0] not in _SHOWS_ONLY
    ]
    return _digest(files)


@cache
def _plugin(name: str) -> str:
    """The version and the digest of the code that offers an installed plugin."""
    found = importlib.util.find_spec(registry.module_of("plugin", name))
    file = Path(found.origin) if found is not None and found.origin else None
    # What lies in one package may import from one another.
    in_package = file is not None and (file.parent / "__init__.py").exists()
    files = sorted(file.parent.glob("*.py")) if file is not None and in_package else [file]
    versions = registry.versions_of("plugin", name).values()
    return "-".join([*versions, _digest(filter(None, files))])


def _digest(files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]
