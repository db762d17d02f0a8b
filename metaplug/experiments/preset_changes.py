"""Settings of a preset's plugins that a run has otherwise: preset.PLUGIN.FIELD=value.

In a layer of a configuration they stand as `preset: {base: PRESET, PLUGIN: {FIELD: value}}`, where
the base is that of the layers below if it is left out. A resolved configuration, and so a run, has
the whole preset that comes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metaplug.contract.presets import PluginUse, Preset, find_preset
from metaplug.errors import RequestError, did_you_mean, one_line
from metaplug.settings import validated

BASE = "base"
"""The key of the preset that is changed; no plugin of this name can be."""


def is_change(preset: Any) -> bool:
    """Whether the preset of a layer changes another one, and is not a whole one of its own."""
    if not isinstance(preset, Mapping) or not preset:
        return False
    settings = all(isinstance(value, Mapping) for value in preset.values())
    return BASE in preset or (settings and preset.keys().isdisjoint(Preset.model_fields))


def assign_change(preset: Any, path: str, value: Any) -> dict[str, Any]:
    """Change the setting at PLUGIN.FIELD of a layer's preset, None where it has none.

    >>> assign_change("maml++", "derivative-order.switch", 10)
    {'base': 'maml++', 'derivative-order': {'switch': 10}}
    """
    change = {**preset} if is_change(preset) else {BASE: preset}
    name, _, field = path.partition(".")
    change[name] = {**change.get(name, {}), field: value} if field else value
    return change


def over(below: Any, above: Any) -> Any:
    """The preset of a layer over that of the layers below it."""
    if not is_change(above) or above.get(BASE) is not None:
        return above
    if not is_change(below):
        return {**above, BASE: below}
    return {
        name: {**below.get(name, {}), **above.get(name, {})} if name != BASE else below[BASE]
        for name in {**below, **above}
    }


def preset_of(preset: str | Preset | Mapping[str, Any], origin: str) -> str | Preset:
    """The preset itself, or the whole one that a change makes of its base.

    Args:
        origin: the file or option that changes it, for errors.

    Raises:
        RequestError: it has no such plugin, or no settings are given for it. Wrong settings are
            refused when the plugin is made.
    """
    if isinstance(preset, str | Preset):
        return preset
    if not isinstance(preset[BASE], str | Preset):
        raise RequestError(
            f"{origin}: preset.{BASE} = {one_line(preset[BASE])}: it is no preset: give the name "
            "of one, or a whole one as a mapping"
        )
    named: str | Preset = preset[BASE]
    base = find_preset(named)
    uses = {use.label: use for use in base.plugins}
    changed = {*base.changed}
    for name, settings in preset.items():
        if name == BASE:
            continue
        if name not in uses:
            hint = did_you_mean(name, uses)
            raise RequestError(
                f"{origin}: preset.{one_line(name)}: the preset {base.name} has no plugin "
                f"'{one_line(name)}' ({hint}): name one that it has, or add another by --with"
            )
        if not isinstance(settings, Mapping):
            raise RequestError(
                f"{origin}: preset.{name} = {one_line(settings)}: '{name}' is a plugin, whose "
                f"settings can be changed: write preset.{name}.FIELD=VALUE"
            )
        uses[name], own = _with(uses[name], settings)
        changed |= {f"{name}.{field}" for field in own}
    if not changed:
        return named
    values = {**base.model_dump(), "plugins": [*uses.values()], "changed": sorted(changed)}
    return validated(Preset, values, f"{origin}, preset")


def changes_of(preset: Any) -> set[str]:
    """The settings that the preset of a layer has otherwise than its base, as PLUGIN.FIELD."""
    if not is_change(preset):
        return {*preset.changed} if isinstance(preset, Preset) else set()
    plugins = ((name, settings) for name, settings in preset.items() if name != BASE)
    return {f"{name}.{field}" for name, settings in plugins for field in settings}


def _with(use: PluginUse, settings: Mapping[str, Any]) -> tuple[PluginUse, list[str]]:
    """A use of a plugin with other settings, and those of them that it had not already."""
    own = [
        field
        for field, value in settings.items()
        if field not in use.settings or use.settings[field] != value
    ]
    return use.model_copy(update={"settings": {**use.settings, **settings}}), own
