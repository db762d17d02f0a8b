"""What is installed, as plain values: every part's summary, documentation, settings and hooks, read off its class."""

from __future__ import annotations

import inspect
import json
import re
import types
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from metaplug.contract import registry
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
class Entry:
    """One installed part.

    Attributes:
        distribution, version: of the package that it comes from; of one without metadata the module, and None.
        hooks: of a plugin, those that it implements, in the order of a meta-step.
        facts: what its kind has beside settings, in words.
        fields: its settings.
        error: why it cannot be used, and the mend.
    """

    kind: str
    name: str
    distribution: str
    version: str | None = None
    summary: str = ""
    documentation: str = ""
    hooks: tuple[str, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)
    fields: tuple[SettingRow, ...] = ()
    error: str | None = None

    def values(self, *, whole: bool) -> dict[str, Any]:
        """As JSON values: a row of the list, or the whole page."""
        values = asdict(self)
        values["settings"] = values.pop("fields")
        return (
            values
            if whole
            else {
                key: value for key, value in values.items() if key not in ("documentation", "facts")
            }
        )

    @property
    def origin(self) -> str:
        """Distribution and version in one."""
        return self.distribution if self.version is None else f"{self.distribution} {self.version}"


def entries(*kinds: str) -> list[Entry]:
    """Every installed part of these kinds; one that does not load has its error."""
    return [_entry(part) for kind in kinds for part in registry.parts(kind)]


def _entry(part: Part) -> Entry:
    if part.error is not None:
        return _broken(part, part.error)
    try:
        return _described(part)
    except (
        Exception
    ) as error:  # whatever a class of others answers to being read, the other rows are shown
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return _broken(
            part,
            f"the {part.kind} '{part.name}' of {part.origin} cannot be described: {reason}; correct it, or uninstall it",
        )


def _broken(part: Part, error: str) -> Entry:
    return Entry(part.kind, part.name, part.distribution, part.version, error=error)


def _described(part: Part) -> Entry:
    if isinstance(part.value, Preset):
        return _preset_entry(part, part.value)
    documentation = re.split(
        r"\n\n(?:Args|Attributes|Raises):\n", inspect.getdoc(part.value) or ""
    )[0]
    facts: dict[str, str] = {}
    hooks: tuple[str, ...] = ()
    if part.kind == "plugin":
        hooks = tuple(implementations(part.value))
        facts["hooks"] = ", ".join(f"{hook} ({KINDS[hook]})" for hook in hooks) or "none"
        facts |= {
            name.replace("_", " "): ", ".join(names)
            for name in ("runs_after", "conflicts_with")
            if (names := getattr(part.value, name))
        }
        facts["couples tasks"] = "yes" if part.value.couples_tasks else "no"
    config = getattr(part.value, "Config", None)
    return Entry(
        part.kind,
        part.name,
        part.distribution,
        part.version,
        summary=documentation.split("\n\n")[0].replace("\n", " "),
        documentation=documentation,
        hooks=hooks,
        facts=facts,
        fields=rows(config) if config is not None else (),
    )


def _preset_entry(part: Part, preset: Preset) -> Entry:
    facts = {
        "plugins": ", ".join(_use_text(use.plugin, use.settings) for use in preset.plugins)
        or "none",
        "source": preset.source,
    }
    if preset.defaults:
        facts["training defaults"] = ", ".join(
            f"{path}={plain(value)}" for path, value in flatten(preset.defaults).items()
        )
    return Entry(
        "preset",
        part.name,
        part.distribution,
        part.version,
        preset.summary,
        preset.summary,
        facts=facts,
    )


def _use_text(plugin: str, settings: dict[str, Any]) -> str:
    return plugin + (
        ":" + ",".join(f"{name}={plain(value)}" for name, value in settings.items())
        if settings
        else ""
    )


def rows(config: type[BaseModel]) -> tuple[SettingRow, ...]:
    """The fields of a pydantic model in words."""
    return tuple(
        SettingRow(
            name, type_text(info.annotation), _bounds(info), _default(info), info.description or ""
        )
        for name, info in ((name, config.model_fields[name]) for name in own_first(config))
    )


def type_text(annotation: Any) -> str:
    """A type as a user writes its values: "float", "int or null", "sgd | adam", "list of float"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(argument) for argument in arguments)
    if origin in (tuple, list):
        inner = dict.fromkeys(
            type_text(argument) for argument in arguments if argument is not Ellipsis
        )
        if origin is tuple and Ellipsis not in arguments:
            return f"[{', '.join(type_text(argument) for argument in arguments)}]"
        return f"list of {', '.join(inner)}"
    if hasattr(annotation, "__metadata__"):
        return type_text(arguments[0])
    return (
        "null"
        if annotation is type(None)
        else getattr(annotation, "__name__", str(annotation)).lower()
    )


def _bounds(info: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [
        f"{sign} {getattr(bound, name)}"
        for name, sign in signs.items()
        for bound in info.metadata
        if hasattr(bound, name)
    ]
    return ", ".join(found)


def _default(info: FieldInfo) -> str:
    default = info.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return "required"
    return plain(default)


def plain(value: Any) -> str:
    """A value as a user would write it behind `--set`: text as it is, everything else as JSON, which YAML reads."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
