"""Validated settings: the frozen pydantic base of every part's configuration, and the YAML that it comes in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from metaplug.errors import RequestError, did_you_mean


class Settings(BaseModel):
    """A frozen pydantic model that refuses fields it does not know. Give every field a description, a unit and bounds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def own_first(model: type[BaseModel]) -> list[str]:
    """The names of a model's fields as people read them: what the class adds itself, then what it shares with others."""
    shared = {name for base in model.__mro__[1:] if issubclass(base, BaseModel) for name in base.model_fields}
    return sorted(model.model_fields, key=lambda name: name in shared)


S = TypeVar("S", bound=BaseModel)


def validated(model: type[S], values: Mapping[str, Any], owner: str) -> S:
    """Check `values` against `model`.

    Raises:
        RequestError: names the owner, every wrong field with what it must be, and the nearest field for an unknown one.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise RequestError(f"{owner}: {'; '.join(_fault(model, fault) for fault in error.errors())}") from None


def _fault(model: type[BaseModel], fault: Any) -> str:
    path = [str(part) for part in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        return f"unknown field '{'.'.join(path)}': {did_you_mean(path[-1], _fields_at(model, path[:-1]))}"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message[:1].lower() + message[1:]
    return f"{'.'.join(path)} = {fault['input']!r}: {message}" if path else message


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """The field names of the model that stands at `path`, for the nearest-name hint."""
    for part in path:
        field = model.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file.

    Raises:
        RequestError: it cannot be read, is no YAML, names a key twice, or is no mapping; the file and line are named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RequestError(f"cannot read {path}: {reason}; give a YAML file") from None
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RequestError(f"{path}{where} is not valid YAML: {error.problem or error.context}; correct it there") from None
    except yaml.YAMLError as error:
        raise RequestError(f"{path} is not valid YAML: {' '.join(str(error).split())}; correct it there") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RequestError(f"{path} holds a {type(values).__name__}, not a mapping of settings: begin with a line such as 'preset: maml'")
    return values


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key that stands twice, of which PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", node.value[index][0].start_mark)
        return super().construct_mapping(node, deep=deep)
