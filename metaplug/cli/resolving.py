"""From the words of a command line to one configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaplug.errors import RequestError

if TYPE_CHECKING:
    from metaplug.contract.presets import PluginUse
    from metaplug.experiments.resolving import Resolved


def resolve_options(
    given: dict[str, Any],
    sets: Sequence[str] | None,
    *,
    config: Path | None = None,
    preset: str | None = None,
    uses: Sequence[str | PluginUse] | None = None,
    files: Sequence[str] | None = None,
    logs: Sequence[str] | None = None,
    content: dict[str, Any] | None = None,
) -> Resolved:
    """Resolve a file, the shared options, a preset, plugins and `--set`, each over the former.

    Args:
        files: where `config` is a run's record, the plugin files that the caller lets run. Its
            loggers are left out: only a caller sends figures anywhere.
        logs: loggers after those of the file; one that it lists too takes its place.
        content: of `config`, where the caller has read it and taken out what is its own.
    """
    from metaplug.experiments.configuration import ExperimentConfig
    from metaplug.experiments.plugin_files import permitted, recorded
    from metaplug.experiments.resolving import assign, resolve
    from metaplug.experiments.variant_texts import parse_logger, parse_plugin
    from metaplug.settings import validated
    from metaplug.yaml_text import read_yaml

    file = content if content is not None else {} if config is None else read_yaml(config)
    if files is not None:
        record = validated(ExperimentConfig, file, str(config))
        file = permitted(record, files, config).model_dump(mode="json", exclude={"loggers"})
    layers = [] if config is None else [(str(config), file)]
    pairs = [parse_setting(text) for text in sets or ()]
    added = [parse_plugin(use) if isinstance(use, str) else use for use in uses or ()]
    lists = {"preset": preset, "plugins": added, "loggers": logs}
    options = [*given, *(name for name, value in lists.items() if value)]
    options += [f"plugins.{use.label}.{field}" for use in added for field in use.settings]
    _check_once(options, [path for path, _ in pairs])
    values: dict[str, Any] = {}
    for path, value in given.items():
        values = assign(values, path, value)
    if preset is not None:
        values["preset"] = preset
    if uses or any(path.startswith("plugins.") for path, _ in pairs):
        listed = file.get("plugins")
        values["plugins"] = [*listed] if isinstance(listed, list) else []
        values["plugins"] += [use.model_dump() for use in added]
    if logs:
        given_now = [parse_logger(text).model_dump() for text in logs]
        names = [use["logger"] for use in given_now]
        values["loggers"] = [*_without(file.get("loggers"), names), *given_now]
    for path, value in pairs:
        if path.startswith("plugins."):
            _check_not_of_preset(path, [*layers, ("option", values)])
        values = assign(values, path, value)
    resolved = resolve([*layers, ("option", values)])
    return replace(resolved, config=recorded(resolved.config))


_WHOLE = ("preset", "plugins", "loggers")
"""Fields of which another value would replace all that options have put together."""


def _check_once(options: Sequence[str], sets: Sequence[str]) -> None:
    """Refuse a `--set` that replaces more than the one value which it gives anew."""
    from metaplug.experiments.resolving import is_inside

    for place, path in enumerate(sets):
        given = [each for each in (*options, *sets[:place]) if is_inside(each, path)]
        if lost := [each for each in given if each != path or path in _WHOLE]:
            raise RequestError(
                f"--set {path} would replace {lost[0]}, which is given, too: leave one of them out"
            )


def _without(loggers: Any, names: Sequence[str]) -> list[Any]:
    """The loggers of a file but for some; what is no list of them is refused later."""
    listed = loggers if isinstance(loggers, list) else []
    return [
        use for use in listed if (use.get("logger") if isinstance(use, dict) else use) not in names
    ]


def _check_not_of_preset(path: str, layers: Sequence[tuple[str, Any]]) -> None:
    """Refuse to change a plugin of the preset as if it were one of the plugins after it."""
    from metaplug.contract.presets import find_preset
    from metaplug.experiments.resolving import resolve

    of_preset = [
        (origin, {"preset": layer["preset"]}) for origin, layer in layers if "preset" in layer
    ]
    preset = find_preset(resolve(of_preset).config.preset)
    name, _, field = path.removeprefix("plugins.").partition(".")
    if name in [use.label for use in preset.plugins]:
        raise RequestError(
            f"--set {path}: '{name}' is a plugin of the preset {preset.name}, and none after it: "
            f"write --set preset.{name}.{field or 'FIELD'}=VALUE"
        )


def parse_setting(text: str, option: str = "--set") -> tuple[str, Any]:
    """Split "path.to.field=value" into the path and the value, read as YAML."""
    from metaplug.experiments.variant_texts import read_scalar

    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        form = "path.to.field=value" if option == "--set" else "FIELD=VALUE"
        raise RequestError(f"{option} {text}: no value is given; write {option} {form}")
    if option in ("--set", "--search") and (whole := _whole_path(path.strip())) is not None:
        raise _short(text, whole, option)
    return path.strip(), read_scalar(value)


def _whole_path(name: str) -> str | None:
    """Return the path of the field of this name, if that is not the name itself."""
    from metaplug.experiments.configuration import ExperimentConfig, flatten

    if name in ExperimentConfig.model_fields:
        return None
    paths = flatten(ExperimentConfig().model_dump())
    return next((path for path in paths if path.endswith(f".{name}")), None)


def _short(text: str, path: str, option: str = "--set") -> RequestError:
    value = text.partition("=")[2]
    return RequestError(
        f"{option} {text}: a field is given by its whole path in the configuration; write {option} "
        f"{path}={value}"
    )


def task_settings(
    given: Mapping[str, Any],
    sets: Sequence[str] | None,
    why: str,
    *,
    also: Sequence[str] = (),
    instead: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return by path what options set, in a command that takes fields of the tasks alone.

    Args:
        why: the other fields are refused.
        also: paths of fields that are taken too.
        instead: by the path of a field that is refused, the option to give.

    Raises:
        RequestError: an option sets another field.
    """
    from metaplug.experiments.configuration import ExperimentConfig

    values = dict(given)
    for text in sets or ():
        path, value = parse_setting(text)
        if not path.startswith("tasks.") and path not in also:
            if "." not in path and path not in ExperimentConfig.model_fields:
                raise _short(text, f"tasks.settings.{path}")
            form = (instead or {}).get(path, "tasks.FIELD=VALUE")
            raise RequestError(f"--set {path}: {why}: give {form}")
        values[path] = value
    return values
