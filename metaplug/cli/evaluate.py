"""metaplug evaluate."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from metaplug.cli.options import Json, RunModel, RunPlugins, RunSteps, TaskSet, examples, sharing
from metaplug.cli.ranks import ranks
from metaplug.cli.resolving import task_settings
from metaplug.evaluation.score_names import ScoreName
from metaplug.report.console import emit, result

_AS_THE_RUN = "as the run was configured"
_of_run = partial(typer.Option, show_default=_AS_THE_RUN)

_INSTEAD = {
    "learner.inner_steps": "--inner-steps",
    "model.name": "--model",
    "runtime.device": "--device",
    "training.score": "--score",
    "training.test_tasks": "--num-tasks",
}


@sharing("tasks.source", "tasks.ways", "tasks.shots", "tasks.queries", default=_AS_THE_RUN)
@examples(
    "metaplug evaluate runs/mine",
    "metaplug evaluate runs/mine --num-tasks 2000 --inner-steps 10 --interval bootstrap --json",
    "metaplug evaluate runs/own --model my_models:make --with ./my_idea.py --tasks folder:other "
    "--shots 5",
)
def evaluate(
    *,
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run, or one of its checkpoints.")
    ],
    num_tasks: Annotated[int | None, _of_run(metavar="N", min=2, help="How many tasks.")] = None,
    inner_steps: RunSteps = None,
    score: Annotated[ScoreName | None, _of_run(help="How well targets are predicted.")] = None,
    split: Annotated[Literal["test", "val", "train"], typer.Option(help="Which tasks.")] = "test",
    interval: Annotated[
        Literal["t", "bootstrap"],
        typer.Option(help="The 95 % interval: by Student's t, or by a bootstrap over tasks (BCa)."),
    ] = "t",
    allow_training_classes: Annotated[
        bool,
        typer.Option("--allow-training-classes", help="Allow trained classes; the result says so."),
    ] = False,
    model: RunModel = None,
    plugins: RunPlugins = None,
    given: dict[str, Any],
    sets: TaskSet = None,
    device: Annotated[str | None, _of_run(help="auto, cpu, cuda or cuda:N.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a trained run on tasks that it has not seen, by the weights that validated best."""
    from metaplug.experiments.json_values import environment, result_values, to_json
    from metaplug.experiments.resolving import assign
    from metaplug.experiments.runs import load
    from metaplug.experiments.runs.layout import SUMMARY
    from metaplug.report.terminal import class_lines, result_line, show_own_code, statements

    why = "an evaluation changes the tasks alone, as the rest is what was trained"
    others: dict[str, Any] = {}
    for path, value in task_settings(given, sets, why, instead=_INSTEAD).items():
        others = assign(others, path.removeprefix("tasks."), value)
    with ranks() as world:
        experiment = load(run, device, world, model=model, tasks=others, plugins=plugins or ())
        show_own_code(experiment)
        learner, training = experiment.learner, experiment.config.training
        found = learner.evaluate(
            getattr(experiment.tasks, split),
            num_tasks=training.test_tasks if num_tasks is None else num_tasks,
            inner_steps=inner_steps,
            score=score,
            allow_training_classes=allow_training_classes,
        )
    tasks_of = experiment.config.tasks.model_dump(mode="json")
    values = {"run": str(run), "tasks": tasks_of, "split": split, "iteration": learner.iteration}
    values |= {**result_values(found, interval), **environment(learner)}
    if as_json:
        emit(to_json(values, indent=2))
        return
    for text in (f"{split} {result_line(values)}", *class_lines(values)):
        result(text)
    if run.is_dir() and not (run / SUMMARY).exists():
        result(
            "the run is unfinished: these are its best weights so far, "
            f"after iteration {learner.iteration} of {training.iterations}"
        )
    for text in statements(values):
        result(text)
