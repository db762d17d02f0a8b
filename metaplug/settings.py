"""Validated settings: the frozen pydantic base of every plugin's, task source's and model's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from metaplug.errors import RequestError, did_you_mean


class Settings(BaseModel):
    """A frozen pydantic model that refuses fields it does not know. Give every field a description, a unit and bounds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


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
