"""train."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaplug.cli.options import RUN, Config, PresetName, Set, With, resolve_options, shared
from metaplug.cli.own_model import say_model
from metaplug.cli.ranks import ranks
from metaplug.cli.stopping import StoppedError, stop_on_signals
from metaplug.errors import RequestError, RunError
from metaplug.report.console import CONSOLE, line

if TYPE_CHECKING:
    from metaplug.experiments.build import Experiment
    from metaplug.experiments.configuration import ExperimentConfig

_TRAIN_EXAMPLES = """**Examples**

- metaplug train --preset maml --with gradient-sharing:gate=0.3,momentum=0.9 --tasks glyphs --ways 5 --shots 1 --name mine

- metaplug train experiment.yaml --iterations 2000 --set training.validate_every=50 --resume

- metaplug train --from runs/mine

- torchrun --nproc-per-node 2 -m metaplug train --preset maml"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog=_TRAIN_EXAMPLES)(shared(train))


def train(
    *,
    given: dict[str, Any],
    config: Config = None,
    preset: PresetName = None,
    use: With = None,
    sets: Set = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            help="The run's name.",
            show_default="CONFIG's name, or made of the options",
            rich_help_panel=RUN,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="The folder that holds runs.", rich_help_panel=RUN)
    ] = Path("runs"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run of this name, bit for bit.", rich_help_panel=RUN
        ),
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="Train the run in this folder again, as NAME, and say whether it gave the same.",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None,
) -> None:
    """Meta-train a model, and test it on tasks that it has not seen.

    The run is kept in OUT/NAME: config.yaml, run.json, metrics.jsonl, last.safetensors, best.safetensors, curves.png and summary.json. Ctrl-C stops it after
    the current step with a checkpoint.
    """
    from metaplug.contract.presets import parse_plugin
    from metaplug.experiments.runs import read_metrics
    from metaplug.experiments.runs import train as train_in
    from metaplug.experiments.runs.repeating import check_same, configuration_of
    from metaplug.report.figures import run_figure
    from metaplug.report.terminal import (
        TrainingProgress,
        heading,
        result_line,
        show_memory,
        skipped_line,
        statements,
    )

    if source is not None:
        if config is not None:
            raise RequestError(
                f"--from {source} and {config}: both give a configuration; leave one of them out"
            )
        config, name = configuration_of(source), name or f"{source.resolve().name}-repeated"
    if name is not None and (Path(name).name != name or name == ".."):
        raise RequestError(
            f"--name {name}: a name is no path; give the folder that holds runs by --out, and a plain name"
        )
    with ranks() as world:
        settings = resolve_options(
            given,
            sets,
            config=config,
            preset=preset,
            uses=[parse_plugin(text) for text in use or ()],
        ).config
        if source is not None:
            check_same(source, settings, given.get("model.name"))
        folder = out / (name or (config.stem if config is not None else _default_name(settings)))
        if source is not None and folder.exists() and folder.samefile(source):
            raise RequestError(
                f"--from {source}: {folder} is that run itself, which matches itself whatever it holds: give a --name that is not taken"
            )
        trained, curves = False, folder / "curves.png"
        progress = TrainingProgress(CONSOLE, settings.training.iterations)

        def draw() -> None:
            try:
                run_figure(read_metrics(folder), curves)
            except RunError as error:  # a picture is no reason to lose the test
                line(f"metaplug: warning: {error}", style="yellow")

        def begin(experiment: Experiment) -> None:
            nonlocal trained
            trained = True
            line(heading(experiment))
            say_model(experiment)
            show_memory(experiment)
            done = experiment.learner.iteration
            line(
                f"going on in {folder} after iteration {done}" if done else f"a new run in {folder}"
            )
            progress.begin(done, experiment.learner.skipped)

        with stop_on_signals() as stop, progress if world.is_main else nullcontext():
            summary = train_in(
                settings,
                folder,
                resume=resume,
                on_start=begin,
                on_record=progress.record,
                on_trained=draw,
                stop=stop,
                world=world,
            )
        if not trained:
            line(f"{folder} is finished already")
        world.from_main(lambda: None if trained or curves.exists() else draw())
        if summary is None:
            raise StoppedError(
                f"stopped, with a checkpoint in {folder}: the same command with --resume goes on",
                stop.signal,
            )
        line(f"test {result_line(summary['test'])}")
        line(
            f"by the weights after iteration {summary['best_validation']['iteration']}, which validated best; all of it is in {folder}"
        )
        for text in statements(summary["test"]):
            line(text)
        if skipped := summary.get("skipped"):
            line(skipped_line(skipped, summary["iterations"]))
        if source is not None:
            world.from_main(lambda: _report_repetition(source, folder))


def _report_repetition(source: Path, folder: Path) -> None:
    """Say whether the run in `folder` gave what that in `source` had given."""
    from metaplug.experiments.runs.repeating import compare_runs

    found = compare_runs(source, folder)
    compared = f"{found.iterations} iteration{'s' * (found.iterations != 1)}{' and the test' if found.tested else ''}"
    if found.fault is None:
        line(
            f"matches {source} bit for bit: {compared}{'' if found.tested else ', as it came no further'}"
        )
        return
    changes = "; ".join(found.changes) or "nothing that was recorded of the machine differs"
    raise RunError(
        f"{folder} does not match {source} bit for bit over {compared}: {found.fault}; {changes}: "
        "repeat it with the same versions, threads and kind of device, or judge by the size of the difference"
    )


def _default_name(config: ExperimentConfig) -> str:
    """A name that says what the run is, and that the same options give again."""
    from metaplug.experiments.build import task_form

    plugins = [use.name or use.plugin for use in config.plugins]
    source, _, argument = config.tasks.source.partition(":")
    parts = [
        "+".join([config.algorithm, *plugins]),
        source,
        *([Path(argument).stem] if argument else []),
    ]
    parts += [*(form.replace("-", "") for form in task_form(config)), f"seed{config.seed}"]
    return re.sub(r"[^\w.+-]+", "-", "-".join(parts))
