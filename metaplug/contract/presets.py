"""Algorithms as data: a preset is a named list of plugins with settings, and the training defaults that its paper gives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from pydantic import Field, field_validator, model_validator

from metaplug.contract import registry
from metaplug.contract.function_plugins import Shortest, is_shortest, plugin_of
from metaplug.contract.plugin import Plugin
from metaplug.errors import RequestError, did_you_mean, one_line
from metaplug.settings import Settings, validated
from metaplug.yaml_text import StrictLoader, read_yaml

YAML_ENDINGS = (".yaml", ".yml")
"""A preset of this ending is the path of a file."""
_COMMA = r",(?![^\[]*\])"
"""A comma between settings, not one inside a [list]."""


class PluginUse(Settings):
    """One entry of a list of plugins; a bare name stands for a plugin with its default settings."""

    plugin: str = Field(
        description="The plugin's entry-point name, as `metaplug plugins` lists it."
    )
    # `default` by name is what lets type checkers without pydantic's plugin see that a field may be left out.
    name: str | None = Field(
        default=None,
        description="What this instance is called; needed only where a plugin stands twice.",
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="Fields of the plugin's Config."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"plugin": value} if isinstance(value, str) else value

    def make(self) -> Plugin:
        """A new instance.

        Raises:
            RequestError: no plugin of that name is installed, or a setting is wrong.
        """
        made = registry.load("plugin", self.plugin)(name=self.name or self.plugin, **self.settings)
        assert isinstance(made, Plugin)
        return made


class Preset(Settings):
    """A published algorithm as a list of plugins. It contains no code.

    `defaults` are fields of the experiment's configuration, nested as there; they give way to what the user sets. An installed preset is
    found by its name; one's own stands in a YAML file, and is found by the path of that file.
    """

    name: str = Field(
        description="The name on the command line, such as 'maml'; in a file by default the file's own."
    )
    summary: str = Field("", description="One line on what it does.")
    source: str = Field("", description="The paper, with its identifier.")
    plugins: tuple[PluginUse, ...] = Field(
        (), description="The plugins, in the order of application."
    )
    defaults: dict[str, Any] = Field(
        default_factory=dict, description="Training defaults of the paper."
    )

    @field_validator("defaults")
    @classmethod
    def _only_settings(cls, value: dict[str, Any]) -> dict[str, Any]:
        if wrong := {"preset", "plugins", "tasks"} & value.keys():
            raise ValueError(
                f"a preset sets no {sorted(wrong)[0]} by default: list plugins in its own field"
            )
        model = value.get("model")
        name = model.get("name") if isinstance(model, Mapping) else None
        if isinstance(name, str) and ":" in name and not name.startswith("torchvision:"):
            raise ValueError(
                f"a preset contains no code, as its model '{one_line(name)}' is: give that by --model, or in a configuration"
            )
        return value


def find_preset(preset: str | Preset) -> Preset:
    """The preset of that name, or in that YAML file; a Preset is returned as it is.

    Raises:
        RequestError: no preset of that name is installed; the file cannot be read, or says something that a preset does not.
    """
    if isinstance(preset, Preset):
        return preset
    if preset.endswith(YAML_ENDINGS):
        return validated(Preset, {"name": Path(preset).stem, **read_yaml(Path(preset))}, preset)
    found: Preset = registry.load("preset", preset)
    return found


PluginLike: TypeAlias = Plugin | PluginUse | str | Shortest
"""What a list of plugins may hold: an instance, a use with settings, a name, or a module or function in the shortest form."""


def make_plugins(preset: str | Preset | None, plugins: Sequence[PluginLike]) -> list[Plugin]:
    """The preset's plugins, then those of the list, as instances.

    Raises:
        RequestError: an unknown name, a wrong setting, or something that is no plugin.
    """
    if isinstance(plugins, str):
        raise RequestError(
            f"plugins = '{plugins}' is one name, not a list of plugins: write plugins=['{plugins}']"
        )
    uses = [*(find_preset(preset).plugins if preset is not None else ()), *plugins]
    return [_instance(use) for use in uses]


def _instance(use: Any) -> Plugin:
    if isinstance(use, Plugin):
        return use
    if isinstance(use, PluginUse):
        return use.make()
    if isinstance(use, str):
        return PluginUse(plugin=use).make()
    if is_shortest(use):
        return plugin_of(use)()
    if isinstance(use, type) and issubclass(use, Plugin):
        raise RequestError(
            f"{use.__name__} is the class of a plugin, not one of its instances: write {use.__name__}(...), with its settings"
        )
    raise RequestError(
        f"{use!r} is not a plugin: give its name, an instance of a subclass of metaplug.Plugin, or a function named as a hook"
    )


def parse_variant(text: str) -> tuple[str, list[PluginUse]]:
    """A preset and plugins from "preset+plugin:field=value,field=value+plugin".

    The preset is the longest known name at the start, or the path of a YAML file there.

    Raises:
        RequestError: no preset of that name, or a plugin without a name.
    """
    compact = text.replace(" ", "")
    if file := re.match(r"([^:=]+?\.ya?ml)(?=\+|$)", compact):
        return file[1], [parse_plugin(part) for part in compact[file.end() :].split("+")[1:]]
    known = [
        name
        for name in registry.names("preset")
        if compact == name or compact.startswith(name + "+")
    ]
    if not known:
        first = compact.split("+")[0]
        raise RequestError(
            f"unknown preset at the start of '{text}': {did_you_mean(first, registry.names('preset'))}"
        )
    preset = max(known, key=len)
    return preset, [parse_plugin(part) for part in compact[len(preset) :].split("+")[1:]]


def parse_plugin(text: str) -> PluginUse:
    """A plugin from "plugin" or "plugin:field=value,field=value"; values are read as YAML."""
    name, _, settings = text.strip().partition(":")
    if not name:
        raise RequestError(
            f"'{text}' names no plugin: write plugin or plugin:field=value,field=value"
        )
    return PluginUse(
        plugin=name,
        settings=dict(_setting(name, pair) for pair in re.split(_COMMA, settings))
        if settings
        else {},
    )


def _setting(plugin: str, pair: str) -> tuple[str, Any]:
    field, equals, value = pair.partition("=")
    if not equals or not field:
        raise RequestError(f"'{pair}' is no setting of plugin '{plugin}': write field=value")
    return field, read_scalar(value)


def read_scalar(text: str) -> Any:
    """A value as YAML reads it on one line: numbers, true and false, null, [lists], {maps}, else text."""
    try:
        return yaml.load(text, Loader=StrictLoader)
    except yaml.MarkedYAMLError as error:
        reason = one_line(error.problem or error.context)
        raise RequestError(
            f"'{text}' cannot be read as a value: {reason}; put it in quotes to have text"
        ) from None
    except yaml.YAMLError as error:
        raise RequestError(f"'{text}' cannot be read as a value: {one_line(error)}") from None
