"""Options that several commands take, and the configuration that they resolve to."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaplug.errors import RequestError

if TYPE_CHECKING:
    from metaplug.contract.presets import PluginUse
    from metaplug.experiments.configuration import Resolved

TASKS, LEARNING, RUN = "Tasks and model", "Learning", "Run"

_SOURCES = "Task source (metaplug tasks lists them): glyphs, sinusoid, folder:PATH, text:FILE."
_MODELS = (
    "Model: conv4, mlp, resnet12, wrn28_10, transformers:NAME_OR_FOLDER, timm:NAME, "
    "torchvision:NAME or your own MODULE:FACTORY."
)
_PER_TASK = "examples of each class, or of a regression task; 1 to 1000."
_SHARED: dict[str, list[tuple[str, str, Any, str]]] = {
    TASKS: [
        ("tasks.source", "--tasks", "glyphs", _SOURCES),
        ("tasks.ways", "--ways", 5, "Classes in a task, 2 to 1000 (classification)."),
        ("tasks.shots", "--shots", 1, f"Support {_PER_TASK}"),
        ("tasks.queries", "--queries", 5, f"Query {_PER_TASK}"),
        ("model.name", "--model", "conv4", _MODELS),
    ],
    LEARNING: [
        ("learner.inner_steps", "--inner-steps", 3, "Inner steps K of a task, 0 to 1000."),
        ("learner.inner_lr", "--inner-lr", 0.4, "Inner learning rate, 0 to 1000."),
        ("training.tasks_per_batch", "--tasks-per-batch", 8, "Tasks in a meta-batch, at least 1."),
        ("training.iterations", "--iterations", 400, "Meta-iterations, at least 1."),
        ("learner.meta_lr", "--meta-lr", 0.001, "Meta (outer) learning rate; above 0, at most 10."),
    ],
    RUN: [
        ("seed", "--seed", 0, "Seed of weights, tasks and every other random number; at least 0."),
        ("runtime.device", "--device", "auto", "auto, cpu, cuda or cuda:N."),
    ],
}


_annotated: Any = Annotated  # for types that are values, as `type(default)`
SHARED: dict[str, Any] = {
    path: _annotated[
        type(default),
        typer.Option(flag, help=text, show_default=str(default), rich_help_panel=panel),
    ]
    for panel, fields in _SHARED.items()
    for path, flag, default, text in fields
}
"""Options by the path of the field that each overrides: they mean the same in every command.

Their defaults are only shown: a default stays with its field.
"""


def flag(path: str) -> str:
    """Return the option that sets the field of this path."""
    return next(flag for fields in _SHARED.values() for own, flag, *_ in fields if own == path)


Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Any other field of the configuration, as YAML. Repeatable.",
        rich_help_panel=RUN,
    ),
]
TaskSet = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="tasks.FIELD=VALUE",
        help="Any other field of the tasks, as YAML; tasks.settings.FIELD is one of the source's "
        "own. Repeatable.",
        rich_help_panel=TASKS,
    ),
]
Config = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG", help="A configuration in YAML. Options override it."),
]
PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="Algorithm, or a YAML file with one. See: metaplug plugins.",
        show_default="maml",
        rich_help_panel=LEARNING,
    ),
]
With = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="PLUGIN[:FIELD=VALUE,...]",
        help="A plugin after the preset's own, applied in the given order: its name, or the path "
        "of a file as ./my_idea.py. Repeatable.",
        rich_help_panel=LEARNING,
    ),
]
Log = Annotated[
    list[str] | None,
    typer.Option(
        "--log",
        metavar="LOGGER[:FIELD=VALUE,...]",
        help="Show the run's figures there too: tensorboard, wandb, mlflow or a logger of yours. "
        "Repeatable.",
        rich_help_panel=RUN,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON instead, which standard output then has alone.")
]


def examples(*commands: str) -> Callable[[Any], Any]:
    """Give a command its `epilog`: the examples below its help."""

    def decorate(command: Any) -> Any:
        command.epilog = "\n\n".join(["**Examples**", *(f"- {text}" for text in commands)])
        return command

    return decorate


def sharing(*paths: str, default: str | None = None) -> Callable[[Callable[..., None]], Any]:
    """Replace a command's parameter `given` by these options of SHARED.

    The command receives those that were set, by path, as `given`.

    Args:
        default: what the help says of each; None says the default of its field.
    """
    names = {path.replace(".", "_"): path for path in paths}

    def decorate(command: Callable[..., None]) -> Any:
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name != "given":
                parameters.append(parameter)
                continue
            for name, path in names.items():
                annotation = SHARED[path]
                if default is not None:
                    option = copy.copy(annotation.__metadata__[0])
                    option.show_default = default
                    annotation = _annotated[annotation.__origin__, option]
                parameters.append(parameter.replace(name=name, annotation=annotation, default=None))

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            options = {path: values.pop(name) for name, path in names.items()}
            given = {path: value for path, value in options.items() if value is not None}
            command(given=given, **values)

        # typer reads both: the signature for the order of parameters, the annotations for types.
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {each.name: each.annotation for each in parameters}
        return wrapper

    return decorate


shared = sharing(*SHARED)
"""For a command with all of them."""


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
    from metaplug.experiments.configuration import ExperimentConfig, assign, resolve
    from metaplug.experiments.plugin_files import permitted, recorded
    from metaplug.experiments.variant_texts import parse_logger, parse_plugin
    from metaplug.settings import validated
    from metaplug.yaml_text import read_yaml

    file = content if content is not None else {} if config is None else read_yaml(config)
    if files is not None:
        record = validated(ExperimentConfig, file, str(config))
        file = permitted(record, files, config).model_dump(mode="json", exclude={"loggers"})
    layers = [] if config is None else [(str(config), file)]
    pairs = [parse_setting(text) for text in sets or ()]
    values: dict[str, Any] = {}
    for path, value in given.items():
        values = assign(values, path, value)
    if preset is not None:
        values["preset"] = preset
    if uses or any(path.startswith("plugins.") for path, _ in pairs):
        listed = file.get("plugins")
        added = [parse_plugin(use) if isinstance(use, str) else use for use in uses or ()]
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


def _without(loggers: Any, names: Sequence[str]) -> list[Any]:
    """The loggers of a file but for some; what is no list of them is refused later."""
    listed = loggers if isinstance(loggers, list) else []
    return [
        use for use in listed if (use.get("logger") if isinstance(use, dict) else use) not in names
    ]


def _check_not_of_preset(path: str, layers: Sequence[tuple[str, Any]]) -> None:
    """Refuse to change a plugin of the preset as if it were one of the plugins after it."""
    from metaplug.contract.presets import find_preset
    from metaplug.experiments.configuration import resolve

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
