"""Options that several commands take, and the configuration that they resolve to."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
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
"""The options of train, compare and explain, by the path of the field that each overrides.

Their defaults are only shown: a default stays with its field.
"""

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Any other field of the configuration, as YAML. Repeatable.",
        rich_help_panel=RUN,
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
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead.")]


def examples(*commands: str) -> Callable[[Any], Any]:
    """Give a command its `epilog`: the examples below its help."""

    def decorate(command: Any) -> Any:
        command.epilog = "\n\n".join(["**Examples**", *(f"- {text}" for text in commands)])
        return command

    return decorate


def shared(command: Callable[..., None]) -> Any:
    """Replace a command's parameter `given` by the options of SHARED.

    The command receives those that were set, by path, as `given`.
    """
    paths = {path.replace(".", "_"): path for path in SHARED}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if parameter.name != "given":
            parameters.append(parameter)
            continue
        for name, path in paths.items():
            parameters.append(parameter.replace(name=name, annotation=SHARED[path], default=None))

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        options = {path: values.pop(name) for name, path in paths.items()}
        given = {path: value for path, value in options.items() if value is not None}
        command(given=given, **values)

    # typer reads both: the signature for the order of parameters, the annotations for their types.
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def resolve_options(
    given: dict[str, Any],
    sets: Sequence[str] | None,
    *,
    config: Path | None = None,
    preset: str | None = None,
    uses: Sequence[str | PluginUse] | None = None,
    files: Sequence[str] | None = None,
    logs: Sequence[str] | None = None,
) -> Resolved:
    """Resolve a file, the shared options, a preset, plugins and `--set`, each over the former.

    Args:
        files: where `config` is a run's record, the plugin files that the caller lets run. Its
            loggers are left out: only a caller sends figures anywhere.
        logs: loggers after those of the file; one that it lists too takes its place.
    """
    from metaplug.cli.variants import parse_logger, parse_plugin
    from metaplug.experiments.configuration import ExperimentConfig, assign, resolve
    from metaplug.experiments.plugin_files import permitted, recorded
    from metaplug.settings import validated
    from metaplug.yaml_text import read_yaml

    file = {} if config is None else read_yaml(config)
    if files is not None:
        record = validated(ExperimentConfig, file, str(config))
        file = permitted(record, files, config).model_dump(mode="json", exclude={"loggers"})
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
            _check_not_of_preset(path, values.get("preset") or file.get("preset") or "maml")
        values = assign(values, path, value)
    resolved = resolve([*([] if config is None else [(str(config), file)]), ("option", values)])
    return replace(resolved, config=recorded(resolved.config))


def _without(loggers: Any, names: Sequence[str]) -> list[Any]:
    """The loggers of a file but for some; what is no list of them is refused later."""
    listed = loggers if isinstance(loggers, list) else []
    return [
        use for use in listed if (use.get("logger") if isinstance(use, dict) else use) not in names
    ]


def _check_not_of_preset(path: str, preset: Any) -> None:
    """Refuse to change a plugin of the preset, whose settings are what its name stands for."""
    from metaplug.contract.presets import find_preset

    found, name = find_preset(preset) if isinstance(preset, str) else None, path.split(".")[1]
    if found is not None and name in [use.label for use in found.plugins]:
        raise RequestError(
            f"--set {path}: '{name}' is part of the preset {found.name}, with its settings: write "
            f"your own preset (metaplug plugins {found.name} shows this one), and give its file by "
            "--preset"
        )


def parse_setting(text: str, option: str = "--set") -> tuple[str, Any]:
    """Split "path.to.field=value" into the path and the value, read as YAML."""
    from metaplug.cli.variants import read_scalar

    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        form = "path.to.field=value" if option == "--set" else "FIELD=VALUE"
        raise RequestError(f"{option} {text}: no value is given; write {option} {form}")
    return path.strip(), read_scalar(value)
