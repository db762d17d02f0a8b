"""Presets: algorithms as data, a named list of plugins with settings and training defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from metaplug.contract import plugin_files, registry
from metaplug.contract.function_plugins import Shortest, is_shortest, plugin_of
from metaplug.contract.plugin import Plugin
from metaplug.errors import RequestError, one_line
from metaplug.settings import Settings, validated
from metaplug.yaml_text import read_yaml

YAML_ENDINGS = (".yaml", ".yml")
"""A preset of this ending is the path of a file."""


class PluginUse(Settings):
    """One entry of a list of plugins; a bare name stands for a plugin with its default settings.

    >>> PluginUse(plugin="gradient-clipping", settings={"max_norm": 1.0}).make().config.max_norm
    1.0
    """

    plugin: str = Field(
        description="The plugin's entry-point name, as in `metaplug plugins`; or the path of a "
        "Python file with one, from where the command runs."
    )
    # Only `default=` tells type checkers without pydantic's plugin that a field may be left out.
    name: str | None = Field(
        default=None, description="Of this instance; needed only where a plugin stands twice."
    )
    settings: dict[str, Any] = Field(default={}, description="Fields of the plugin's Config.")
    sha256: str | None = Field(
        default=None, description="Of a plugin's file, as a run records it: no other one is run."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"plugin": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _without_no_digest(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if values.get("sha256") is None:
            values.pop("sha256", None)
        return values

    @property
    def is_file(self) -> bool:
        """Whether the plugin is a file of the user's own, which making it runs."""
        return plugin_files.is_file(self.plugin)

    @property
    def label(self) -> str:
        """The name of the instance: its own, or that of the plugin."""
        return self.name or label_of(self.plugin)

    def make(self) -> Plugin:
        """Make a new instance of an installed plugin, or of the one in a file, which is run."""
        if self.is_file:
            part: Any = plugin_files.load(self.plugin, self.sha256)
        else:
            part = registry.load("plugin", self.plugin)
        made = part(name=self.label, **self.settings)
        assert isinstance(made, Plugin)
        return made


def label_of(plugin: str) -> str:
    """The name of a plugin that is asked for by name, or by the path of its file."""
    return plugin_files.name_in(plugin) if plugin_files.is_file(plugin) else plugin


class Preset(Settings):
    """A published algorithm as a list of plugins. It contains no code.

    `defaults` are fields of the experiment's configuration, nested as there; they give way to what
    the user sets. An installed preset is found by name, one in a YAML file by the file's path.

    >>> Preset(name="clipped", plugins=["gradient-noise"]).plugins[0].plugin
    'gradient-noise'
    """

    name: str = Field(
        description="The name on the command line, such as 'maml'; in a file by default its own."
    )
    summary: str = Field("", description="One line on what it does.")
    source: str = Field("", description="The paper, with its identifier.")
    plugins: tuple[PluginUse, ...] = Field((), description="The plugins, in order of application.")
    defaults: dict[str, Any] = Field({}, description="Training defaults of the paper.")
    changed: tuple[str, ...] = Field(
        (), description="As PLUGIN.FIELD, the settings that a run has otherwise than its preset."
    )

    @property
    def label(self) -> str:
        """The name, with what was changed: "maml++ with derivative-order.switch=0"."""
        texts = [f"{path}={_plain(value)}" for path, value in self.changes.items()]
        return f"{self.name} with {', '.join(texts)}" if texts else self.name

    @property
    def changes(self) -> dict[str, Any]:
        """What was changed, with the values that it has now."""
        settings = {
            f"{use.label}.{field}": value
            for use in self.plugins
            for field, value in use.settings.items()
        }
        return {path: value for path, value in settings.items() if path in self.changed}

    @model_validator(mode="after")
    def _has_what_was_changed(self) -> Preset:
        if unknown := {*self.changed} - self.changes.keys():
            raise ValueError(
                f"changed names '{one_line(min(unknown))}', which is no setting of its plugins: "
                "leave it out"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_no_changes(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if not values.get("changed"):
            values.pop("changed", None)
        return values

    @field_validator("defaults")
    @classmethod
    def _only_settings(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "loggers" in value:
            raise ValueError("a preset sets no loggers by default: give them by --log")
        if wrong := {"preset", "plugins", "tasks"} & value.keys():
            raise ValueError(
                f"a preset sets no {sorted(wrong)[0]} by default: list plugins in its own field"
            )
        model = value.get("model")
        name = model.get("name") if isinstance(model, Mapping) else None
        zoo, colon, _ = name.partition(":") if isinstance(name, str) else ("", "", "")
        if colon and zoo not in registry.ZOOS:
            raise ValueError(
                f"a preset contains no code, as its model '{one_line(name)}' is: "
                "give that by --model, or in a configuration"
            )
        return value


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def find_preset(preset: str | Preset) -> Preset:
    """Find the preset of that name, or in that YAML file; a Preset is returned as it is."""
    if isinstance(preset, Preset):
        return preset
    if preset.endswith(YAML_ENDINGS):
        values = read_yaml(Path(preset))
        if "preset" in values:
            raise RequestError(
                f"{preset} is a whole configuration, not a preset: train it by metaplug train "
                f"{preset}, or write its preset, plugins and fields into a variant of a study"
            )
        return validated(Preset, {"name": Path(preset).stem, **values}, preset)
    _refuse_plugins(preset)
    found: Preset = registry.load("preset", preset)
    if own := [use.plugin for use in found.plugins if use.is_file]:
        raise RequestError(
            f"the preset '{preset}' of {registry.origin_of('preset', preset)} names the plugin "
            f"file {own[0]}, which nobody lets run because a package says so: install that plugin, "
            "or write the preset into a file of your own"
        )
    return found


def _refuse_plugins(text: str) -> None:
    """Refuse a variant, PRESET+PLUGIN, where a preset is asked for: it would only be unknown."""
    names = registry.names("preset")
    for name in () if text in names else names:
        plugins = text.removeprefix(f"{name}+")
        if plugins.partition("+")[0].partition(":")[0] in registry.names("plugin"):
            raise RequestError(
                f"'{text}' is a preset with plugins: give the preset '{name}' alone, and what "
                "follows it as plugins (--with)"
            )


PluginLike: TypeAlias = Plugin | PluginUse | str | Shortest
"""An entry of a list of plugins: an instance, a use with settings, a name, or a shortest form."""


def make_plugins(preset: str | Preset | None, plugins: Sequence[PluginLike]) -> list[Plugin]:
    """Make the preset's plugins, then those of the list.

    >>> [plugin.name for plugin in make_plugins("fomaml", ["gradient-noise"])]
    ['derivative-order', 'gradient-noise']
    """
    if isinstance(plugins, str):
        fault = f"plugins = '{plugins}' is one name, not a list of plugins"
        raise RequestError(f"{fault}: write plugins=['{plugins}']")
    uses = [*(find_preset(preset).plugins if preset is not None else ()), *plugins]
    return [_instance(use) for use in uses]


def _instance(use: Any) -> Plugin:
    use = PluginUse(plugin=use) if isinstance(use, str) else use
    if isinstance(use, Plugin):
        return use
    if isinstance(use, PluginUse):
        return use.make()
    if is_shortest(use):
        return plugin_of(use)()
    if isinstance(use, type) and issubclass(use, Plugin):
        raise RequestError(
            f"{use.__name__} is the class of a plugin, not one of its instances: "
            f"write {use.__name__}(...), with its settings"
        )
    raise RequestError(
        f"{use!r} is not a plugin: give its name, an instance of a subclass of metaplug.Plugin, "
        "or a function named as a hook"
    )
