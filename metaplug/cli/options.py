"""The options that commands share, and how they become one configuration. Imports no torch: `--help` must be quick."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaplug.errors import RequestError

if TYPE_CHECKING:
    from metaplug.contract.presets import PluginUse
    from metaplug.experiments.configuration import Resolved

TASKS, LEARNING, RUN = "Tasks and model", "Learning", "Run"


def _option(panel: str, flag: str, kind: Any, default: object, text: str) -> Any:
    """The annotation of an option that overrides a field; its default is shown, and stays with the field."""
    return Annotated[
        kind, typer.Option(flag, help=text, show_default=str(default), rich_help_panel=panel)
    ]


SHARED: dict[str, Any] = {
    "tasks.source": _option(
        TASKS,
        "--tasks",
        str,
        "glyphs",
        "Task source, with its argument behind a colon: glyphs, sinusoid, folder:PATH. See: metaplug tasks.",
    ),
    "tasks.ways": _option(
        TASKS, "--ways", int, 5, "Classes in a task, 2 to 1000 (classification)."
    ),
    "tasks.shots": _option(
        TASKS,
        "--shots",
        int,
        1,
        "Support examples of each class, or of a regression task; 1 to 1000.",
    ),
    "tasks.queries": _option(
        TASKS,
        "--queries",
        int,
        5,
        "Query examples of each class, or of a regression task; 1 to 1000.",
    ),
    "model.name": _option(
        TASKS,
        "--model",
        str,
        "conv4",
        "Model: conv4, mlp, resnet12, wrn28_10, torchvision:NAME, or MODULE:FACTORY of your own. See: metaplug plugins.",
    ),
    "learner.inner_steps": _option(
        LEARNING, "--inner-steps", int, 3, "Inner steps K of a task, 0 to 1000."
    ),
    "learner.inner_lr": _option(
        LEARNING, "--inner-lr", float, 0.4, "Inner learning rate, 0 to 1000."
    ),
    "training.tasks_per_batch": _option(
        LEARNING, "--tasks-per-batch", int, 8, "Tasks in a meta-batch, at least 1."
    ),
    "training.iterations": _option(
        LEARNING, "--iterations", int, 400, "Meta-iterations, at least 1."
    ),
    "learner.meta_lr": _option(
        LEARNING,
        "--meta-lr",
        float,
        0.001,
        "Meta learning rate, in the outer loop; above 0, at most 10.",
    ),
    "seed": _option(
        RUN,
        "--seed",
        int,
        0,
        "Seed of the weights, the tasks and every other random number; at least 0.",
    ),
    "runtime.device": _option(RUN, "--device", str, "auto", "auto, cpu, cuda or cuda:N."),
}
"""By the path of the field that it sets, every option that train, compare and explain share."""

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
    typer.Argument(
        metavar="CONFIG", help="A configuration in YAML. Options override it.", show_default=False
    ),
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
        help="A plugin behind the preset's own. Repeatable; the order is the order of application.",
        rich_help_panel=LEARNING,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead.")]


def shared(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of SHARED in the place of its parameter `given`; there it receives those that were set, by path."""
    paths = {path.replace(".", "_"): path for path in SHARED}
    added = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=SHARED[path]
        )
        for name, path in paths.items()
    ]
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        parameters += added if parameter.name == "given" else [parameter]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        given = {
            path: value for name, path in paths.items() if (value := values.pop(name)) is not None
        }
        command(given=given, **values)

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def resolve_options(
    given: dict[str, Any],
    sets: Sequence[str] | None,
    *,
    config: Path | None = None,
    preset: str | None = None,
    uses: Sequence[PluginUse] = (),
) -> Resolved:
    """The configuration from a file, the shared options, a preset and plugins, and `--set`, each over what stands before."""
    from metaplug.experiments.configuration import assign, resolve
    from metaplug.yaml_text import read_yaml

    layers = [] if config is None else [(str(config), read_yaml(config))]
    pairs = [setting(text) for text in sets or ()]
    values: dict[str, Any] = {}
    for path, value in given.items():
        values = assign(values, path, value)
    if preset is not None:
        values["preset"] = preset
    if uses or any(path.startswith("plugins.") for path, _ in pairs):
        listed = layers[0][1].get("plugins") if layers else None
        values["plugins"] = [
            *(listed if isinstance(listed, list) else ()),
            *(use.model_dump() for use in uses),
        ]
    for path, value in pairs:
        if path.startswith("plugins."):
            _check_not_of_preset(
                path,
                values.get("preset") or (layers[0][1].get("preset") if layers else None) or "maml",
            )
        values = assign(values, path, value)
    return resolve([*layers, ("option", values)])


def _check_not_of_preset(path: str, preset: Any) -> None:
    """Refuse to change a plugin of the preset, whose settings are what its name stands for."""
    from metaplug.contract.presets import find_preset

    found, name = find_preset(preset) if isinstance(preset, str) else None, path.split(".")[1]
    if found is not None and name in [use.name or use.plugin for use in found.plugins]:
        raise RequestError(
            f"--set {path}: '{name}' is a plugin of the preset {found.name}, and its settings are part of it: write a preset of your own "
            f"with other ones (metaplug plugins {found.name} shows this one), and give its file by --preset"
        )


def setting(text: str) -> tuple[str, Any]:
    """A path and a value from "path.to.field=value"; the value is read as YAML."""
    from metaplug.cli.variants import read_scalar

    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise RequestError(f"--set {text}: no value is given; write --set path.to.field=value")
    return path.strip(), read_scalar(value)
