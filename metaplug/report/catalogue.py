"""Installed parts as plain values: each one's summary, documentation, settings and hooks."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from metaplug.contract import plugin_files, registry
from metaplug.contract.hookspecs import KINDS
from metaplug.contract.plugin_checks import implementations
from metaplug.contract.presets import Preset
from metaplug.contract.registry import Part
from metaplug.experiments.configuration import flatten
from metaplug.settings import own_first


@dataclass(frozen=True)
class SettingRow:
    """One field of a Config, in words."""

    name: str
    type: str
    bounds: str
    default: str
    description: str


@dataclass(frozen=True)
class Entry(Part):
    """One installed part, described.

    Attributes:
        hooks: those that a plugin implements, in the order of a meta-step.
        facts: in words, what its kind has besides settings.
        fields: its settings.
    """

    summary: str = ""
    documentation: str = ""
    hooks: tuple[str, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)
    fields: tuple[SettingRow, ...] = ()

    def values(self, *, whole: bool) -> dict[str, Any]:
        """Give the JSON values of a row of the list, or of the whole page."""
        values = asdict(self)
        values["error"], values["settings"] = values.pop("error"), values.pop("fields")
        left_out = ("value",) if whole else ("value", "documentation", "facts")
        return {key: value for key, value in values.items() if key not in left_out}


def entries(*kinds: str) -> list[Entry]:
    """Describe every installed part of these kinds; one that does not load has its error."""
    return [_entry(part) for kind in kinds for part in registry.parts(kind)]


def file_entry(path: str) -> Entry:
    """Describe the plugin in a file, which is run.

    Raises:
        RequestError, RunError: it does not load, as for `plugin_files.load`.
    """
    return _entry(plugin_files.part_of(path))


def _entry(part: Part) -> Entry:
    entry = partial(Entry, part.kind, part.name, part.distribution, part.version)
    if part.error is not None:
        return entry(error=part.error)
    try:
        return entry(**_description(part))
    except Exception as error:  # one faulty class must not hide the other rows
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        text = f"the {part.kind} '{part.name}' of {part.origin} cannot be described: {reason}"
        return entry(error=f"{text}; correct it, or uninstall it")


def _description(part: Part) -> dict[str, Any]:
    """Read the fields of an Entry off a part's class, or off a preset."""
    facts: dict[str, str] = {}
    if isinstance(part.value, Preset):
        preset = part.value
        uses = [(use.plugin, _pairs(use.settings, ",")) for use in preset.plugins]
        plugins = ", ".join(":".join(filter(None, use)) for use in uses) or "none"
        facts = {"plugins": plugins, "source": preset.source}
        if preset.defaults:
            facts["training defaults"] = _pairs(flatten(preset.defaults), ", ")
        return {"summary": preset.summary, "documentation": preset.summary, "facts": facts}
    hooks: tuple[str, ...] = ()
    if part.kind == "plugin":
        hooks = tuple(implementations(part.value))
        facts["hooks"] = ", ".join(f"{hook} ({KINDS[hook]})" for hook in hooks) or "none"
        for name in ("runs_after", "conflicts_with"):
            if names := getattr(part.value, name):
                told = "as configured" if isinstance(names, property) else ", ".join(names)
                facts[name.replace("_", " ")] = told
        couples = {True: "yes", False: "no"}
        facts["couples tasks"] = couples.get(part.value.couples_tasks, "as configured")
    documentation = inspect.getdoc(part.value) or ""
    documentation = re.split(r"\n\n(?:Args|Attributes|Raises):\n", documentation)[0]
    config = getattr(part.value, "Config", None)
    return {
        "summary": documentation.split("\n\n")[0].replace("\n", " "),
        "documentation": documentation,
        "hooks": hooks,
        "facts": facts,
        "fields": rows(config) if config is not None else (),
    }


def _pairs(values: Mapping[str, Any], comma: str) -> str:
    return comma.join(f"{name}={plain(value)}" for name, value in values.items())


def rows(config: type[BaseModel]) -> tuple[SettingRow, ...]:
    """Describe the fields of a pydantic model in words."""
    found = []
    for name in own_first(config):
        info = config.model_fields[name]
        words = type_text(info.annotation), _bounds(info), _default(info), info.description or ""
        found.append(SettingRow(name, *words))
    return tuple(found)


def type_text(annotation: Any) -> str:
    """Name a type as a user writes its values: "float", "int or null", "sgd | adam"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(type_text, arguments))
    if origin is tuple and Ellipsis not in arguments:
        return f"[{', '.join(map(type_text, arguments))}]"
    if origin in (tuple, list):
        return f"list of {type_text(arguments[0])}"
    if annotation is type(None):
        return "null"
    return str(getattr(annotation, "__name__", annotation)).lower()


def _bounds(info: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return ", ".join(
        f"{sign} {getattr(bound, name)}"
        for name, sign in signs.items()
        for bound in info.metadata
        if hasattr(bound, name)
    )


def _default(info: FieldInfo) -> str:
    default = info.get_default(call_default_factory=True, validated_data={})
    return "required" if default is PydanticUndefined else plain(default)


def plain(value: Any) -> str:
    """Write a value as `--set` takes it: text as it is, the rest as JSON, which YAML reads."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
