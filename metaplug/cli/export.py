"""metaplug export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from metaplug.cli.options import RunModel, RunPlugins, RunSteps, examples
from metaplug.report.console import result


@examples(
    "metaplug export runs/mine --support new_classes/ --out exported",
    "metaplug export runs/mine --support new_classes/ --out exported --format torch --format onnx",
    "metaplug export runs/texts --support new_intents.csv --out exported --inner-steps 10",
)
def export(
    *,
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run, or one of its checkpoints.")
    ],
    support: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="The support examples: a folder of class folders of images, or a zip of it; of a "
            "run on texts, a table of texts and labels.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to write: a new folder.")],
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="[torch|onnx|state]",
            help="torch: model.pt2, a program of torch.export. onnx: model.onnx. state: neither. "
            "The weights and labels.json are always written. Repeatable.",
            show_default="torch",
        ),
    ] = None,
    inner_steps: RunSteps = None,
    ways: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="The number of classes, where they are fewer than the model's outputs.",
            show_default="as many as outputs",
        ),
    ] = None,
    model: RunModel = None,
    plugins: RunPlugins = None,
) -> None:
    """Adapt a trained run to new classes, and write a model that runs without metaplug."""
    from metaplug.experiments.export import digest_of, export_run
    from metaplug.experiments.runs import load
    from metaplug.experiments.runs.loading import checkpoint_of
    from metaplug.report.terminal import show_own_code

    experiment = load(run, model=model, plugins=plugins or ())
    show_own_code(experiment)
    files = export_run(
        experiment,
        support,
        out,
        formats=formats or ["torch"],
        inner_steps=inner_steps,
        ways=ways,
        about={
            "run": str(run),
            "iteration": experiment.learner.iteration,
            "checkpoint_sha256": digest_of(checkpoint_of(run)),
        },
    )
    result(f"{out} has the model, adapted to {support}:")
    for name in files:
        result(f"- {name}")
    if json.loads(files["labels.json"].read_text(encoding="utf-8"))["depends_on_batch"]:
        result(
            "batch norm uses the statistics of the examples that are given together, so an output "
            "depends on the others of its batch, as in training"
        )
