"""The fields that are searched, each with its range, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from metaplug.contract.presets import find_preset, make_plugins
from metaplug.errors import MetaplugError, RequestError, did_you_mean, one_line
from metaplug.experiments.build import build
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.resolving import assign, resolve
from metaplug.experiments.tuning.ranges import Range, choice_text, read_range
from metaplug.settings import validated
from metaplug.tasks.sources import TaskSource
from metaplug.yaml_text import number_of

Space = Mapping[str, Range]
"""Ranges by the dotted path of the field."""

_APART = {
    "preset": "two algorithms are two searches: tune each under its own --preset, or search a "
    "field of its plugins as preset.NAME.FIELD",
    "plugins": "a list of plugins has no range: search a field of one, as plugins.NAME.FIELD",
    "tasks": "values on other tasks cannot be compared: search a field of the learner instead",
    "seed": "the best of several seeds is luck: search a field of the learner instead",
    "runtime": "it changes how a step is computed, not what is learned: leave it out",
    "loggers": "it changes where figures are shown, not what is learned: leave it out",
    "training.iterations": "trials of other lengths cannot be compared: leave it out",
    "training.validate_every": "all trials are measured alike: leave it out",
    "training.validation_tasks": "all trials are measured alike: leave it out",
    "training.test_tasks": "a search does not touch test tasks: leave it out",
    "training.score": "all trials are measured alike: leave it out",
}


@dataclass(frozen=True)
class Asked:
    """A field to search as it was asked for: by which option or file, and the text of its range."""

    origin: str
    path: str
    value: Any

    def __str__(self) -> str:
        text = one_line(choice_text(self.value))
        return f"{self.origin} {self.path}={text}"


def read_space(config: ExperimentConfig, asked: Sequence[Asked]) -> dict[str, Range]:
    """The ranges of the fields that are asked for, in their order.

    Raises:
        RequestError: no field, one that is unknown, that no search may change or that stands
            twice, or a range that is none for it.
    """
    if not asked:
        raise RequestError(
            "there is no field to search: give one, as --search learner.inner_lr=log:0.01..1"
        )
    space: dict[str, Range] = {}
    for one in asked:
        _check_searched(one)
        for other in space:
            if one.path == other or f"{one.path}.".startswith(f"{other}."):
                raise RequestError(f"{one}: {other} is searched already: leave one out")
            if other.startswith(f"{one.path}."):
                raise RequestError(f"{one}: {other} in it is searched already: leave one out")
        kinds = _kinds(config, one)
        space[one.path] = read_range(_as_stored(config, one), kinds, str(one))
    return space


def check_space(
    config: ExperimentConfig, space: Space, asked: Sequence[Asked], tasks: TaskSource
) -> None:
    """Build the experiment at both ends of every range, and with every value of a list.

    Raises:
        RequestError: a value is out of the bounds of its field, or does not fit the other parts.
    """
    for one in asked:
        for value in space[one.path].ends:
            at_end = changed(config, {one.path: value}, str(one))
            try:
                build(at_end, tasks)
            except MetaplugError as error:
                raise RequestError(f"{one}: with {choice_text(value)}, {error}") from error


def changed(
    config: ExperimentConfig, values: Mapping[str, Any], owner: str = "trial"
) -> ExperimentConfig:
    """The configuration with values in the fields of these paths.

    Args:
        owner: who has these values, for errors.

    Raises:
        RequestError: a field is unknown, or a value is out of its bounds.
    """
    nested = config.model_dump(mode="json")
    for path, value in values.items():
        nested = assign(nested, path, value)
    if any(path.startswith("preset.") for path in values):
        return resolve([(owner, nested)]).config
    return validated(ExperimentConfig, nested, owner)


def value_at(config: ExperimentConfig, path: str) -> Any:
    """The value of a field that `changed` has set."""
    head, _, rest = path.partition(".")
    if head in ("plugins", "preset"):
        name, _, field = rest.partition(".")
        uses = config.plugins if head == "plugins" else find_preset(config.preset).plugins
        return next(use for use in uses if use.label == name).settings[field]
    value: Any = config.model_dump(mode="json")
    for part in path.split("."):
        value = value[part]
    return value


def _check_searched(one: Asked) -> None:
    for apart, why in _APART.items():
        is_plugin_field = apart in ("plugins", "preset") and one.path.count(".") >= 2
        if f"{one.path}.".startswith(f"{apart}.") and not is_plugin_field:
            raise RequestError(f"{one}: {why}")


def _as_stored(config: ExperimentConfig, one: Asked) -> Any:
    """The range, with the values of a list as the configuration of a trial has them.

    By these a trial that was begun is found again: 1e-2, a text in YAML, and 1 are 0.01 and 1.0.
    """
    if not isinstance(one.value, list):
        return one.value
    found = [changed(config, {one.path: value}, str(one)) for value in number_of(one.value)]
    return [value_at(each, one.path) for each in found]


def _kinds(config: ExperimentConfig, one: Asked) -> frozenset[type] | None:
    """The types that a field takes; None where it stands in settings of a form that is not known.

    Raises:
        RequestError: it is unknown, a section, or of a plugin that is not used.
    """
    model: type[BaseModel] = ExperimentConfig
    parts = one.path.split(".")
    if parts[0] in ("plugins", "preset"):
        model, parts = _config_of_plugin(config, one), [".".join(parts[2:])]
    for place, part in enumerate(parts):
        if part not in model.model_fields:
            if model.model_config.get("extra") == "allow":
                return None
            hint = did_you_mean(part, model.model_fields)
            raise RequestError(f"{one}: unknown field '{one_line(one.path)}': {hint}")
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return _types_in(annotation) if place == len(parts) - 1 else None
        model = annotation
    fields = ", ".join(f"{one.path}.{name}" for name in [*model.model_fields][:3])
    raise RequestError(f"{one}: {one.path} is a section, not a field: search one of {fields}, …")


def _config_of_plugin(config: ExperimentConfig, one: Asked) -> type[BaseModel]:
    """The settings of the plugin that plugins.NAME.FIELD or preset.NAME.FIELD is of.

    Raises:
        RequestError: it is not used.
    """
    head, name, *_ = one.path.split(".")
    of_preset = {plugin.name: plugin for plugin in make_plugins(config.preset, ())}
    if head == "plugins" and name in of_preset:
        raise RequestError(
            f"{one}: '{name}' is a plugin of the preset {config.algorithm}, and none after it: "
            f"search {one.path.replace('plugins', 'preset', 1)}"
        )
    try:
        changed(config, {one.path: None}, str(one))  # says which plugins there are
    except RequestError as error:
        raise error if head == "preset" else RequestError(f"{one}: {error}") from None
    used = {plugin.name: plugin for plugin in make_plugins(config.preset, config.plugins)}
    return type(used[name].config)


def _types_in(annotation: Any) -> frozenset[type]:
    """The plain types of an annotation: int and NoneType of `int | None`."""
    origin = get_origin(annotation)
    if origin is Literal:
        return frozenset(type(value) for value in get_args(annotation))
    if origin in (Union, UnionType):
        return frozenset().union(*map(_types_in, get_args(annotation)))
    if origin is Annotated:
        return _types_in(get_args(annotation)[0])
    return frozenset({origin or annotation})
