"""Layers of values, as files and options give them, become one configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaplug.contract.presets import YAML_ENDINGS, PluginUse, Preset, find_preset, label_of
from metaplug.errors import RequestError, did_you_mean
from metaplug.experiments.configuration import ExperimentConfig, flatten, merge
from metaplug.experiments.preset_changes import (
    BASE,
    assign_change,
    changes_of,
    is_change,
    over,
    preset_of,
)
from metaplug.settings import validated


@dataclass(frozen=True)
class Resolved:
    """A configuration, and by dotted path where each value came from.

    An origin is "default", "preset …", "FILE" or "option". Settings of plugins, the preset's too,
    stand as plugins.NAME.FIELD, without those that are at their default.
    """

    config: ExperimentConfig
    origins: Mapping[str, str]


def resolve(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Resolved:
    """One configuration from (origin, nested values) pairs, each over those before it.

    The preset's defaults lie under all of them.

    Raises:
        RequestError: an unknown field or preset, or a value out of bounds; names each origin.
    """
    values: dict[str, Any] = {}
    layers = [(origin, _with_whole_preset(layer, origin)) for origin, layer in layers]
    chosen: Any = ExperimentConfig.model_fields["preset"].default
    for origin, layer in layers:
        without = {key: layer[key] for key in layer.keys() - {"preset"}}
        validated(ExperimentConfig, without if is_change(layer.get("preset")) else layer, origin)
        values = merge(values, layer)
        if "preset" in layer:
            chosen = over(chosen, layer["preset"])
            values["preset"] = preset_of(chosen, origin)
    preset = find_preset(values.get("preset", chosen))
    validated(ExperimentConfig, preset.defaults, f"the defaults of preset {preset.name}")
    config = validated(ExperimentConfig, merge(preset.defaults, values), "configuration")
    origins = dict.fromkeys(flatten(config.model_dump(mode="json")), "default")
    listed: list[tuple[str, Sequence[PluginUse]]] = [(f"preset {preset.name}", preset.plugins)]
    for origin, layer in [(f"preset {preset.name}", preset.defaults), *layers]:
        for given in flatten(layer):
            for path in origins:
                if is_inside(path, given):
                    origins[path] = origin
    changes: dict[str, str] = {}
    for origin, layer in layers:
        if "preset" in layer:
            origins["preset"] = origin
            changed = changes_of(layer["preset"]) & {*preset.changed}
            changes |= {f"plugins.{path}": origin for path in changed}
        if "plugins" in layer:
            own = ExperimentConfig.model_validate({"plugins": layer["plugins"]})
            listed.append((origin, own.plugins))
    return Resolved(config, {**origins, **_plugin_origins(listed), **changes})


def _with_whole_preset(layer: Mapping[str, Any], origin: str) -> Mapping[str, Any]:
    """The layer with a preset of one's own as a Preset, so the configuration is whole in itself."""
    preset = layer.get("preset")
    if is_change(preset):
        assert isinstance(preset, Mapping)
        based = _with_whole_preset({"preset": preset.get(BASE)}, origin)["preset"]
        return {**layer, "preset": {**preset, BASE: based}}
    if isinstance(preset, Mapping):
        named = {"name": Path(origin).stem, **preset}
        return {**layer, "preset": validated(Preset, named, f"{origin}, preset")}
    if isinstance(preset, str) and preset.endswith(YAML_ENDINGS):
        return {**layer, "preset": find_preset(preset)}
    return layer


def _plugin_origins(listed: Sequence[tuple[str, Sequence[PluginUse]]]) -> dict[str, str]:
    """Where every setting of a plugin came from; a later list repeats what it extends."""
    origins: dict[str, str] = {}
    seen: dict[str, Any] = {}
    for origin, uses in listed:
        for use in uses:
            for field, value in use.settings.items():
                path = f"plugins.{use.label}.{field}"
                if path not in seen or seen[path] != value:
                    seen[path], origins[path] = value, origin
    return origins


def is_inside(one: str, other: str) -> bool:
    """Whether a path of a field is another one, or of a field inside it.

    >>> is_inside("learner.inner_lr", "learner"), is_inside("learner.inner", "learner.inner_lr")
    (True, False)
    """
    return f"{one}.".startswith(f"{other}.")


def assign(values: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`values` with `value` at a dotted path; an entry of plugins is found by its name.

    At preset.PLUGIN.FIELD it becomes a change of the preset.
    """
    head, _, rest = path.partition(".")
    if head == "preset" and rest:
        value = assign_change(values.get(head), rest, value)
    elif head == "plugins" and rest:
        value = _assign_plugin(list(values.get("plugins", ())), rest, value, path)
    elif rest:
        inside = values.get(head, {})
        value = assign(inside if isinstance(inside, Mapping) else {}, rest, value)
    return {**values, head: value}


def _assign_plugin(uses: list[Any], path: str, value: Any, whole: str) -> list[Any]:
    name, _, field = path.partition(".")
    entries: list[dict[str, Any]] = [
        use.model_dump()
        if isinstance(use, PluginUse)
        else ({"plugin": use} if isinstance(use, str) else dict(use))
        for use in uses
    ]
    known = [entry.get("name") or label_of(entry["plugin"]) for entry in entries]
    if name not in known or not field:
        fault = f"'{whole}' is no setting of a listed plugin ({did_you_mean(name, known)})"
        raise RequestError(f"{fault}: write plugins.NAME.field, or add it by --with")
    entry = entries[known.index(name)]
    entry["settings"] = {**(entry.get("settings") or {}), field: value}
    return entries
