"""evaluate."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from metaplug.cli.options import Json
from metaplug.cli.own_model import say_model
from metaplug.cli.ranks import ranks
from metaplug.report.console import emit, line

_EVALUATE_EXAMPLES = """**Examples**

- metaplug evaluate runs/mine

- metaplug evaluate runs/mine --num-tasks 2000 --inner-steps 10 --interval bootstrap --json

- metaplug evaluate runs/own --model my_models:make"""


class Split(StrEnum):
    """What `evaluate` may measure on."""

    TEST = "test"
    VAL = "val"
    TRAIN = "train"


class Interval(StrEnum):
    """How `evaluate` computes a 95 % interval."""

    T = "t"
    BOOTSTRAP = "bootstrap"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog=_EVALUATE_EXAMPLES)(evaluate)


def evaluate(
    *,
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="The folder of a run, or one of its checkpoints.",
            show_default=False,
        ),
    ],
    num_tasks: Annotated[
        int | None,
        typer.Option(
            "--num-tasks", min=2, help="How many tasks.", show_default="as the run was configured"
        ),
    ] = None,
    inner_steps: Annotated[
        int | None,
        typer.Option(
            "--inner-steps", min=0, max=1000, help="Inner steps K.", show_default="as trained"
        ),
    ] = None,
    split: Annotated[Split, typer.Option("--split", help="Which tasks.")] = Split.TEST,
    interval: Annotated[
        Interval,
        typer.Option(
            "--interval",
            help="The 95 % interval: by Student's t, or by a bootstrap over tasks (BCa).",
        ),
    ] = Interval.T,
    allow_training_classes: Annotated[
        bool,
        typer.Option(
            "--allow-training-classes",
            help="Measure also on classes that were trained on; the result says so.",
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODULE:FACTORY",
            help="Of a run whose model is code of your own: its name, since no code runs because a file names it.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", help="auto, cpu, cuda or cuda:N.", show_default="as the run was configured"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a trained run on tasks that it has not seen, by the weights that validated best."""
    from metaplug.experiments.json_values import environment, result_values, to_json
    from metaplug.experiments.runs import load
    from metaplug.experiments.runs.layout import SUMMARY
    from metaplug.report.terminal import result_line, statements

    with ranks() as world:
        experiment = load(run, device, world, model=model)
        say_model(experiment)
        learner, tasks = experiment.learner, experiment.tasks
        count = experiment.config.training.test_tasks if num_tasks is None else num_tasks
        result = learner.evaluate(
            getattr(tasks, split.value),
            num_tasks=count,
            inner_steps=inner_steps,
            allow_training_classes=allow_training_classes,
        )
    measured = result_values(result, interval.value)
    values = {
        "run": str(run),
        "split": split.value,
        "iteration": learner.iteration,
        **measured,
        **environment(learner),
    }
    if as_json:
        emit(to_json(values, indent=2))
        return
    line(f"{split.value} {result_line(values)}")
    total = experiment.config.training.iterations
    if run.is_dir() and not (run / SUMMARY).exists():
        line(
            f"the run is unfinished: these are its best weights so far, after iteration {learner.iteration} of {total}"
        )
    for text in statements(values):
        line(text)
