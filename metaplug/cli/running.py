"""train, evaluate and compare."""

from __future__ import annotations

import re
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaplug.cli.options import RUN, Config, Json, PresetName, Set, With, resolve_options, shared
from metaplug.cli.ranks import ranks, refuse_several
from metaplug.cli.stopping import StoppedError, stop_on_signals
from metaplug.errors import RequestError, RunError
from metaplug.report.console import CONSOLE, emit, line

if TYPE_CHECKING:
    from metaplug.comparison import Comparison
    from metaplug.config import ExperimentConfig
    from metaplug.experiment import Experiment


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
    """Add the commands to the application."""
    app.command(epilog=_TRAIN_EXAMPLES)(shared(train))
    app.command(epilog=_EVALUATE_EXAMPLES)(evaluate)
    app.command(epilog=_COMPARE_EXAMPLES)(shared(compare))


_TRAIN_EXAMPLES = """**Examples**

- metaplug train --preset maml --with gradient-sharing:gate=0.3,momentum=0.9 --tasks glyphs --ways 5 --shots 1 --name mine

- metaplug train experiment.yaml --iterations 2000 --set training.validate_every=50 --resume

- metaplug train --from runs/mine

- torchrun --nproc-per-node 2 -m metaplug train --preset maml"""


def train(
    *,
    given: dict[str, Any],
    config: Config = None,
    preset: PresetName = None,
    use: With = None,
    sets: Set = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="The run's name.", show_default="CONFIG's name, or made of the options", rich_help_panel=RUN),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The folder that holds runs.", rich_help_panel=RUN)] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run of this name, bit for bit.", rich_help_panel=RUN)] = False,
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

    The run is kept in OUT/NAME: config.yaml, run.json, metrics.jsonl, last.pt, best.pt, curves.png and summary.json. Ctrl-C stops it after
    the current step with a checkpoint.
    """
    from metaplug.preset import parse_plugin
    from metaplug.report.figures import run_figure
    from metaplug.report.terminal import TrainingProgress, heading, result_line, show_memory, skipped_line, statements
    from metaplug.runs import read_metrics
    from metaplug.runs import train as train_in
    from metaplug.runs.folder import SUMMARY
    from metaplug.runs.repeating import check_same, configuration_of

    if source is not None:
        if config is not None:
            raise RequestError(f"--from {source} and {config}: both give a configuration; leave one of them out")
        config, name = configuration_of(source), name or f"{source.resolve().name}-repeated"
    with ranks() as world:
        settings = resolve_options(given, sets, config=config, preset=preset, uses=[parse_plugin(text) for text in use or ()]).config
        if source is not None:
            check_same(source, settings, given.get("model.name"))
        folder = out / (name or (config.stem if config is not None else _default_name(settings)))
        finished = (folder / SUMMARY).exists()
        progress = TrainingProgress(CONSOLE, settings.training.iterations)

        def begin(experiment: Experiment) -> None:
            line(heading(experiment))
            say_model(experiment)
            show_memory(experiment)
            done = experiment.learner.iteration
            line(f"going on in {folder} after iteration {done}" if done else f"a new run in {folder}")
            progress.begin(done, experiment.learner.skipped)

        with stop_on_signals() as stop, progress if world.is_main else nullcontext():
            summary = train_in(settings, folder, resume=resume, on_start=begin, on_record=progress.record, stop=stop, world=world)
        if finished:
            line(f"{folder} is finished already")
        world.from_main(lambda: run_figure(read_metrics(folder), folder / "curves.png"))
        if summary is None:
            raise StoppedError(f"stopped, with a checkpoint in {folder}: the same command with --resume goes on", stop.signal)
        line(f"test {result_line(summary['test'])}")
        line(f"by the weights after iteration {summary['best_validation']['iteration']}, which validated best; all of it is in {folder}")
        for text in statements(summary["test"]):
            line(text)
        if skipped := summary.get("skipped"):
            line(skipped_line(skipped, summary["iterations"]))
        if source is not None:
            world.from_main(lambda: _report_repetition(source, folder))


def _report_repetition(source: Path, folder: Path) -> None:
    """Say whether the run in `folder` gave what that in `source` had given."""
    from metaplug.runs.repeating import compare_runs

    found = compare_runs(source, folder)
    compared = f"{found.iterations} iterations{' and the test' if found.tested else ''}"
    if found.fault is None:
        line(f"matches {source} bit for bit: {compared}")
        return
    changes = "; ".join(found.changes) or "nothing that was recorded of the machine differs"
    raise RunError(
        f"{folder} does not match {source} bit for bit over {compared}: {found.fault}; {changes}: "
        "repeat it with the same versions, threads and kind of device, or judge by the size of the difference"
    )


def say_model(experiment: Experiment, before: str = "") -> None:
    """Say which code of the user's own made the model, where some did."""
    from metaplug.models.factories import origin_of

    model = experiment.config.model
    if text := origin_of(model.name, model.settings):
        line(before + text)


_EVALUATE_EXAMPLES = """**Examples**

- metaplug evaluate runs/mine

- metaplug evaluate runs/mine --num-tasks 2000 --inner-steps 10 --interval bootstrap --json

- metaplug evaluate runs/own --model my_models:make"""


def evaluate(
    *,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or one of its checkpoints.", show_default=False)],
    num_tasks: Annotated[
        int | None, typer.Option("--num-tasks", min=2, help="How many tasks.", show_default="as the run was configured")
    ] = None,
    inner_steps: Annotated[
        int | None, typer.Option("--inner-steps", min=0, max=1000, help="Inner steps K.", show_default="as trained")
    ] = None,
    split: Annotated[Split, typer.Option("--split", help="Which tasks.")] = Split.TEST,
    interval: Annotated[
        Interval, typer.Option("--interval", help="The 95 % interval: by Student's t, or by a bootstrap over tasks (BCa).")
    ] = Interval.T,
    allow_training_classes: Annotated[
        bool, typer.Option("--allow-training-classes", help="Measure also on classes that were trained on; the result says so.")
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
        str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", show_default="as the run was configured")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a trained run on tasks that it has not seen, by the weights that validated best."""
    from metaplug.experiment import environment, result_values, to_json
    from metaplug.report.terminal import result_line, statements
    from metaplug.runs import load

    with ranks() as world:
        experiment = load(run, device, world, model=model)
        say_model(experiment)
        learner, tasks = experiment.learner, experiment.tasks
        count = experiment.config.training.test_tasks if num_tasks is None else num_tasks
        result = learner.evaluate(
            getattr(tasks, split.value), num_tasks=count, inner_steps=inner_steps, allow_training_classes=allow_training_classes
        )
    measured = result_values(result, interval.value)
    values = {"run": str(run), "split": split.value, "iteration": learner.iteration, **measured, **environment(learner)}
    if as_json:
        emit(to_json(values, indent=2))
        return
    line(f"{split.value} {result_line(values)}")
    for text in statements(values):
        line(text)


_COMPARE_EXAMPLES = """**Examples**

- metaplug compare --variant maml --variant maml+gradient-sharing --seeds 3 --json out.json

- metaplug compare --variant maml --variant "fomaml + gradient-sharing:gate=0.3" --tasks sinusoid --model mlp --inner-lr 0.01"""


def compare(
    *,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="PRESET[+PLUGIN[:FIELD=VALUE,...]]...",
            help="One algorithm; give two or more, the baseline first. PRESET may be a YAML file.",
            show_default=False,
            rich_help_panel="Comparison",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, max=1000, help="How many seeds, from --seed on.", rich_help_panel="Comparison")
    ] = 1,
    given: dict[str, Any],
    sets: Set = None,
    json_to: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE|-",
            help="Write everything that was measured as JSON, to a file or to standard output.",
            show_default=False,
            rich_help_panel="Comparison",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="A new folder for comparison.json, curves.png and report.txt.",
            show_default=False,
            rich_help_panel="Comparison",
        ),
    ] = None,
) -> None:
    """Meta-train several algorithms at an equal budget on the same tasks, and say how much faster each is than the first.

    Acceleration: the target is the best validation value that the first variant reaches; (iterations that it needs / iterations that the
    other needs - 1) x 100 %, for each seed.
    """
    refuse_several("compare", "start it without torchrun, or train each variant with torchrun -m metaplug train")
    from metaplug.comparison import Variant, to_values
    from metaplug.comparison import compare as compare_variants
    from metaplug.experiment import to_json
    from metaplug.preset import parse_variant
    from metaplug.report.terminal import TrainingProgress, comparison_report, show_memory

    for text in sets or ():
        if text.partition("=")[0].split(".")[0] in ("preset", "plugins"):
            raise RequestError(
                f"--set {text}: in a comparison every variant has its own; write it into --variant, as PRESET+PLUGIN:FIELD=VALUE"
            )
    variants = []
    for text in variant or ():
        preset, uses = parse_variant(text)
        variants.append(Variant(text.replace(" ", ""), resolve_options(given, sets, preset=preset, uses=uses).config))
    _check_outputs(json_to, out)
    first = variants[0].config.seed if variants else 0
    iterations = sum(one.config.training.iterations for one in variants)

    def begin(one: Variant, experiment: Experiment) -> None:
        if experiment.config.seed == first:
            show_memory(experiment, f"{one.label}: ")
            say_model(experiment, f"{one.label}: ")

    with TrainingProgress(CONSOLE, iterations * seeds) as progress:
        comparison = compare_variants(
            variants,
            range(first, first + seeds),
            on_start=begin,
            on_record=lambda one, seed, record: progress.record(record, f"{one.label}, seed {seed}"),
        )
    report = comparison_report(comparison)
    CONSOLE.print(report)
    if out is not None:
        _write_folder(comparison, report, out)
    if json_to == "-":
        emit(to_json(to_values(comparison), indent=2))
    elif json_to is not None:
        _write_json(to_values(comparison), Path(json_to))


def _check_outputs(json_to: str | None, out: Path | None) -> None:
    """Refuse before an hour of training what could not be written after it."""
    if json_to not in (None, "-"):
        target = Path(json_to)
        if target.is_dir() or not target.parent.is_dir():
            what = "is a folder" if target.is_dir() else f"lies in a folder {target.parent} that does not exist"
            raise RequestError(f"--json {target}: it {what}; give a file in a folder that exists, or - for standard output")
    if out is not None and out.exists():
        raise RequestError(f"the folder {out} already exists: give another --out")


def _write_folder(comparison: Comparison, report: Any, out: Path) -> None:
    from rich.console import Console

    from metaplug.comparison import to_values
    from metaplug.report.figures import comparison_figure

    out.mkdir(parents=True)
    _write_json(to_values(comparison), out / "comparison.json")
    comparison_figure(comparison, out / "curves.png")
    with (out / "report.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=120).print(report)
    line(f"comparison.json, curves.png and report.txt are in {out}")


def _write_json(values: Any, path: Path) -> None:
    from metaplug.experiment import to_json
    from metaplug.files import replacing

    with replacing(path) as file:
        file.write((to_json(values, indent=2) + "\n").encode())


def _default_name(config: ExperimentConfig) -> str:
    """A name that says what the run is, and that the same options give again."""
    from metaplug.experiment import task_form

    plugins = [use.name or use.plugin for use in config.plugins]
    source, _, argument = config.tasks.source.partition(":")
    parts = ["+".join([config.algorithm, *plugins]), source, *([Path(argument).stem] if argument else [])]
    parts += [*(form.replace("-", "") for form in task_form(config)), f"seed{config.seed}"]
    return re.sub(r"[^\w.+-]+", "-", "-".join(parts))
