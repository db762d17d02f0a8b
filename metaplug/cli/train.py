"""metaplug train."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaplug.cli import options
from metaplug.cli.ranks import ranks
from metaplug.cli.resolving import resolve_options
from metaplug.cli.stopping import StoppedError, stop_on_signals
from metaplug.errors import RequestError, RunError
from metaplug.report.console import CONSOLE, line, result, warn

if TYPE_CHECKING:
    from metaplug.experiments.build import Experiment
    from metaplug.experiments.configuration import ExperimentConfig

_option = partial(typer.Option, rich_help_panel=options.RUN)


@options.shared
@options.examples(
    "metaplug train --preset maml --with gradient-sharing:gate=0.3,momentum=0.9 "
    "--tasks glyphs --ways 5 --shots 1 --name mine",
    "metaplug train experiment.yaml --set training.validate_every=50 --log tensorboard --resume",
    "metaplug train --from runs/mine",
    "torchrun --nproc-per-node 2 -m metaplug train --preset maml",
)
def train(
    *,
    given: dict[str, Any],
    config: options.Config = None,
    preset: options.PresetName = None,
    use: options.With = None,
    sets: options.Set = None,
    log: options.Log = None,
    name: Annotated[
        str | None,
        _option(help="The run's name.", show_default="CONFIG's name, and what options set"),
    ] = None,
    out: Annotated[Path, _option(help="The folder that holds runs.")] = Path("runs"),
    resume: Annotated[
        bool, _option("--resume", help="Go on with the run of this name, bit for bit.")
    ] = False,
    source: Annotated[
        Path | None,
        _option("--from", metavar="RUN", help="Repeat this run as NAME; say if it gave the same."),
    ] = None,
) -> None:
    """Meta-train a model, and test it on tasks that it has not seen.

    The run is kept in OUT/NAME: its configuration, metrics.jsonl, the last and the best checkpoint,
    curves.png and summary.json. Ctrl-C stops it after the current step with a checkpoint.
    """
    from metaplug.experiments.runs import read_metrics
    from metaplug.experiments.runs import train as train_in
    from metaplug.experiments.runs.repeating import check_same
    from metaplug.report import terminal
    from metaplug.report.figures import run_figure

    files = None
    if source is not None:
        files, use = _files_of(source, use or [])
        config, name = _repeated(source, config), name or f"{source.resolve().name}-repeated"
    options.check_name(name)
    with ranks() as world:
        settings = resolve_options(
            given, sets, config=config, preset=preset, uses=use, files=files, logs=log
        ).config
        folder = out / (name or _default_name(settings, config))
        if source is not None:
            check_same(source, settings, given.get("model.name"))
            if folder.exists() and folder.samefile(source):
                raise RequestError(
                    f"--from {source}: {folder} is that run itself, which matches itself whatever "
                    "it holds: give a --name that is not taken"
                )
        trained, curves = False, folder / "curves.png"
        progress = terminal.TrainingProgress(CONSOLE, settings.training.iterations)

        def draw() -> None:
            try:
                run_figure(read_metrics(folder), curves)
            except RunError as error:  # a picture is no reason to lose the test
                warn(str(error))

        def begin(experiment: Experiment) -> None:
            nonlocal trained
            trained, done = True, experiment.learner.iteration
            line(terminal.heading(experiment))
            terminal.show_own_code(experiment)
            progress.measure_memory(experiment)
            line(
                f"going on in {folder} after iteration {done}" if done else f"a new run in {folder}"
            )
            progress.begin(done, experiment.learner.skipped, _validations(folder, done))

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
            if log:
                warn("--log has nothing to show: it shows a run while it trains")
        world.from_main(lambda: None if trained or curves.exists() else draw())
        if summary is None:
            raise StoppedError(f"stopped, with a checkpoint in {folder}", stop.signal)
        result(f"test {terminal.result_line(summary['test'])}")
        best = f"by the weights after iteration {summary['best_validation']['iteration']}"
        result(f"{best}, which validated best; all of it is in {folder}")
        for text in terminal.statements(summary["test"]):
            result(text)
        if skipped := summary.get("skipped"):
            result(terminal.skipped_line(skipped, summary["iterations"]))
        if source is not None:
            world.from_main(lambda: _report_repetition(source, folder))


def _repeated(source: Path, config: Path | None) -> Path:
    """The configuration of the run to repeat; `config` is that of the command line, if any."""
    from metaplug.experiments.runs.repeating import configuration_of

    if config is not None:
        raise RequestError(
            f"--from {source} and {config}: both give a configuration; leave one of them out"
        )
    return configuration_of(source)


def _files_of(source: Path, uses: list[str]) -> tuple[list[str], list[str]]:
    """Split --with beside --from: the run's plugin files, which it lets run, and other plugins.

    Raises:
        RequestError: a file has settings, which are the run's.
    """
    from metaplug.experiments.variant_texts import parse_plugin

    files, others = list[str](), list[str]()
    for text in uses:
        use = parse_plugin(text)
        if use.is_file and use.settings:
            raise RequestError(
                f"--from {source}: the run has the settings of {use.plugin}: leave them out, and "
                f"give --with {use.plugin} alone to let it run"
            )
        if use.is_file:
            files.append(use.plugin)
        else:
            others.append(text)
    return files, others


def _report_repetition(source: Path, folder: Path) -> None:
    """Say whether the run in `folder` gave the same as the run in `source`."""
    from metaplug.experiments.runs.repeating import compare_runs

    found = compare_runs(source, folder)
    compared = f"{found.iterations} iteration{'s' * (found.iterations != 1)}"
    compared += " and the test" * found.tested
    if found.fault is not None:
        changes = "; ".join(found.changes) or "nothing that was recorded of the machine differs"
        raise RunError(
            f"{folder} does not match {source} bit for bit over {compared}: {found.fault}; "
            f"{changes}: repeat it with the same versions, threads and kind of device, "
            "or judge by the size of the difference"
        )
    short = "" if found.tested else ", as it came no further"
    result(f"matches {source} bit for bit: {compared}{short}")


def _validations(folder: Path, done: int) -> list[float]:
    """The validations of a run up to the iteration from which it goes on; none for a new one."""
    from metaplug.experiments.runs import read_metrics

    try:
        lines = read_metrics(folder)[:done] if done else []
    except RunError:  # a curve is no reason to lose the run
        return []
    means = [line["validation"]["mean"] for line in lines if line.get("validation")]
    return [math.nan if mean is None else mean for mean in means]


def _default_name(settings: ExperimentConfig, file: Path | None) -> str:
    """Name a run by what it sets, or by its file and what options set over that."""
    from metaplug.experiments.run_names import name_of

    if file is None:
        return name_of(settings)
    return name_of(settings, file.stem, resolve_options({}, None, config=file).config)
