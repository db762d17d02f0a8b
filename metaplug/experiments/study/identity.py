"""What makes two cells the same: everything that their figures depend on, and the code."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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

    Settings of the runtime that change no result do not count. The code is the source of metaplug,
    of the plugins, and of the model's and the tasks' module, as it is now, and the version of torch
    and of the model's library: a cell is computed anew after one has changed. Files of data do not
    count: runs of different data are told apart by what they keep of them (see `same_data`).
    """
    text = to_json({"config": asked_by(config), "code": code_of(config)})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def asked_by(config: ExperimentConfig) -> dict[str, Any]:
    """The fields of a configuration that its figures depend on, flat and in order."""
    return {
        path: value
        for path, value in sorted(comparable(config).items())
        if not path.startswith("runtime.") or path == "runtime.precision"
    }


def code_of(config: ExperimentConfig) -> dict[str, str]:
    """By name, the versions and digests of the code that a run depends on; imports none of it."""
    uses: Iterable[PluginUse] = (*find_preset(config.preset).plugins, *config.plugins)
    installed = {use.plugin for use in uses if not use.is_file}
    return {
        "torch": torch.__version__,
        "metaplug": _metaplug(),
        **_model(config.model.name),
        **_part("task source", config.tasks.source.partition(":")[0]),
        **{name: _installed("plugin", name) for name in sorted(installed)},
    }


def _model(name: str) -> dict[str, str]:
    """Of a library's model the library's version; of others the code."""
    module, colon, _ = name.partition(":")
    if not colon:
        return _part("model", name)
    if module in registry.ZOOS:
        with suppress(PackageNotFoundError):  # building the model says what to install
            return {f"model {module}": version(module)}
        return {}
    return {f"model {module}": _source(module)}


def _part(kind: str, name: str) -> dict[str, str]:
    """The code of an installed part; none for one of metaplug, which counts as a whole."""
    module = registry.module_of(kind, name)
    if module.partition(".")[0] == metaplug.__name__:
        return {}
    return {f"{kind} {name}": _installed(kind, name)}


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
def _installed(kind: str, name: str) -> str:
    """The version and the digest of the code that offers an installed part."""
    versions = registry.versions_of(kind, name).values()
    return "-".join([*versions, _source(registry.module_of(kind, name))])


@cache
def _source(module: str) -> str:
    """The digest of a module's file, and of the others in its package, which it may import."""
    file = _file_of(module)
    in_package = file is not None and (file.parent / "__init__.py").exists()
    files = sorted(file.parent.glob("*.py")) if file is not None and in_package else [file]
    return _digest(filter(None, files))


def _file_of(module: str) -> Path | None:
    """Where a module lies, without importing the packages around it; None where that is unknown."""
    first, *inner = module.split(".")
    try:
        found = importlib.util.find_spec(first)
        for part in inner:
            places = found.submodule_search_locations if found is not None else None
            found = PathFinder.find_spec(f"{first}.{part}", places) if places else None
            first = f"{first}.{part}"
    except (ImportError, ValueError):  # of a module that is loaded without being a file
        return None
    origin = found.origin if found is not None and found.has_location else None
    return Path(origin) if origin else None


def _digest(files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]
