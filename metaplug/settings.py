"""Settings: the frozen pydantic base of every part's configuration, and its errors in a line."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from metaplug.errors import RequestError, did_you_mean, one_line


class Settings(BaseModel):
    """A frozen pydantic model without unknown fields. Describe fields, with unit and bounds."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true for 1, as YAML reads `seed: yes`; pydantic takes it without a word."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = {annotation, *get_args(annotation)}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("true and false are no numbers")
        return value


def own_first(model: type[BaseModel]) -> list[str]:
    """Order a model's fields for people: what the class adds itself, then what it inherits."""
    bases = [base for base in model.__mro__[1:] if issubclass(base, BaseModel)]
    shared = {name for base in bases for name in base.model_fields}
    return sorted(model.model_fields, key=lambda name: name in shared)


S = TypeVar("S", bound=BaseModel)


def validated(model: type[S], values: Mapping[str, Any], owner: str) -> S:
    """Check `values` against `model`.

    Raises:
        RequestError: names the owner, every wrong field with what it must be, and the nearest
            field for an unknown one.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        faults = [_fault(model, fault) for fault in error.errors()]
        more = [f"and {len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else []
        raise RequestError(f"{owner}: {'; '.join(faults[:_MOST_FAULTS] + more)}") from None


_MOST_FAULTS = 10  # that one error names

# What pydantic says in terms of Python's classes.
_PLAIN = {
    "model_type": "input should be a mapping, such as {field: value}",
    "dict_type": "input should be a mapping, such as {field: value}",
    "list_type": "input should be a list, such as [value, value]",
    "tuple_type": "input should be a list, such as [value, value]",
}


def _fault(model: type[BaseModel], fault: Any) -> str:
    path = [one_line(part, 60) for part in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        whole = _below(model, path[0]) if len(path) == 1 else None
        known = _fields_at(model, path[:-1])
        hint = f"did you mean '{whole}'?" if whole else did_you_mean(path[-1], known)
        return f"unknown field '{'.'.join(path)}': {hint}"
    if fault["type"] == "missing":
        return f"'{'.'.join(path)}' is required: give it a value"
    message = _PLAIN.get(fault["type"], fault["msg"])
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = one_line(message[:1].lower() + message[1:], 1000)
    return f"{'.'.join(path)} = {_shown(fault['input'])}: {message}" if path else message


def _shown(given: Any) -> str:
    """Shorten a value for errors: a hostile file's may be of any length."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 4, 200, 200
    short.maxdict = short.maxlist = short.maxtuple = 20
    return one_line(short.repr(given), 400)


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """The field names of the model that stands at `path`, for the nearest-name hint."""
    kind: Any = model
    for part in path:
        if part.isdigit() and get_origin(kind) in (list, tuple):
            kind = get_args(kind)[0]
        else:
            field = kind.model_fields.get(part) if _is_model(kind) else None
            kind = None if field is None else field.annotation
    return list(kind.model_fields) if _is_model(kind) else []


def _below(model: type[BaseModel], name: str) -> str | None:
    """The path of the field of that name in a model's parts."""
    found = (part for part in model.model_fields if name in _fields_at(model, [part]))
    return next((f"{part}.{name}" for part in found), None)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
