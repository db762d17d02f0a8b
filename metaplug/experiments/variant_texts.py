"""Parts as they stand on a command line: "maml+gradient-sharing:gate=0.3", "wandb:project=x"."""

from __future__ import annotations

import re
from typing import Any

import yaml

from metaplug.contract import registry
from metaplug.contract.logger import LoggerUse
from metaplug.contract.presets import PluginUse
from metaplug.errors import RequestError, did_you_mean, one_line
from metaplug.yaml_text import POWER, StrictLoader

_COMMA = r",(?![^\[]*\])"
"""A comma between settings, not one inside a [list]."""


def parse_variant(text: str) -> tuple[str, list[PluginUse]]:
    """Read a preset and plugins from "preset+plugin:field=value,field=value+plugin".

    The preset is the longest known name at the start, or the path of a YAML file there.

    Raises:
        RequestError: no preset of that name, or a plugin without a name.

    >>> parse_variant("maml+gradient-sharing:gate=0.3")[1][0].settings
    {'gate': 0.3}
    """
    compact, known = text.replace(" ", ""), registry.names("preset")
    if file := re.match(r"([^:=]+?\.ya?ml)(?=\+|$)", compact):
        preset = file[1]
    elif fitting := [name for name in known if f"{compact}+".startswith(f"{name}+")]:
        preset = max(fitting, key=len)  # a name may hold a +, as maml++ does
    else:
        hint = did_you_mean(compact.split("+")[0], known)
        raise RequestError(f"unknown preset at the start of '{text}': {hint}")
    return preset, [parse_plugin(part) for part in compact[len(preset) :].split("+")[1:]]


def parse_plugin(text: str) -> PluginUse:
    """Read a plugin from "plugin" or "plugin:field=value,field=value", values as YAML.

    Instead of an installed plugin's name may stand the path of a file, which ends in .py.

    >>> use = parse_plugin("./my_idea.py:strength=0.3")
    >>> use.plugin, use.label, use.settings
    ('./my_idea.py', 'my-idea', {'strength': 0.3})
    """
    file = re.match(r".+?\.py(?=:|$)", text.strip())  # a path may hold a colon
    name = file[0] if file else text.strip().partition(":")[0]
    return PluginUse(plugin=name, settings=_settings("plugin", name, text))


def parse_logger(text: str) -> LoggerUse:
    """Read a logger from "logger" or "logger:field=value,field=value", values as YAML.

    >>> parse_logger("wandb:project=letters").settings
    {'project': 'letters'}
    """
    name = text.strip().partition(":")[0]
    return LoggerUse(logger=name, settings=_settings("logger", name, text))


def _settings(kind: str, name: str, text: str) -> dict[str, Any]:
    """The settings behind the name of a plugin or logger."""
    if not name:
        raise RequestError(
            f"'{text}' names no {kind}: write {kind} or {kind}:field=value,field=value"
        )
    settings = text.strip()[len(name) + 1 :]
    pairs = re.split(_COMMA, settings) if settings else []
    found = [_setting(kind, name, pair) for pair in pairs]
    if len(given := dict(found)) < len(found):
        raise RequestError(f"'{text.strip()}' gives a field twice: leave one of them out")
    return given


def _setting(kind: str, name: str, pair: str) -> tuple[str, Any]:
    field, equals, value = pair.partition("=")
    if not equals or not field:
        raise RequestError(f"'{pair}' is no setting of {kind} '{name}': write field=value")
    return field, read_scalar(value)


class _Loader(StrictLoader):
    """YAML in which 1e-3 is a number, as people mean who write it on a command line."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", POWER, [*"-+.0123456789"])


def read_scalar(text: str) -> Any:
    """Read a value as YAML: a number, true or false, null, a [list], a {map}, else text.

    >>> read_scalar("1e-3"), read_scalar("[1, two]"), read_scalar("null")
    (0.001, [1, 'two'], None)
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        reason = one_line(error)
        if isinstance(error, yaml.MarkedYAMLError):
            what = one_line(error.problem or error.context)
            reason = what if "in quotes" in what else f"{what}; put it in quotes to have text"
        raise RequestError(f"'{text}' cannot be read as a value: {reason}") from None
