"""Options that several commands take."""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from metaplug.errors import RequestError, one_line

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


RunModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FACTORY",
        help="The run's model, if it is your own code: no code runs because a file names it.",
    ),
]
RunPlugins = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="FILE.py",
        help="A file of the run's plugins, if it has one: that runs only if you name it, too. "
        "Repeatable.",
    ),
]
RunSteps = Annotated[
    int | None,
    typer.Option(
        "--inner-steps",
        metavar="K",
        min=0,
        max=1000,
        help="Inner steps.",
        show_default="as trained",
    ),
]


LONGEST_NAME = 200
"""Bytes of a folder's name that is given. File systems take 255, and files beside add to it."""


def check_name(name: str | None, what: str = "runs") -> None:
    """Refuse a name that is a path, or that a folder cannot have, or a terminal not show."""
    if name is not None and (len(os.fsencode(name)) > LONGEST_NAME or not name.isprintable()):
        raise RequestError(
            f"--name {one_line(name, 40)}: a name has at most {LONGEST_NAME} bytes, all of letters "
            "that can be shown: give another"
        )
    if name is not None and (Path(name).name != name or name == ".."):
        instead = f"give the folder that holds {what} by --out, and a plain name"
        raise RequestError(f"--name {name}: a name is no path; {instead}")


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
