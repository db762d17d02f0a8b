"""metaplug explain, metaplug plugins and metaplug tasks: what a run would be made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from metaplug.cli import options
from metaplug.cli.resolving import resolve_options, task_settings
from metaplug.errors import RequestError, unknown
from metaplug.report.console import RESULTS, emit, line, result, show

if TYPE_CHECKING:
    from metaplug.experiments.configuration import ExperimentConfig, TaskSettings


@options.shared
@options.examples(
    "metaplug explain experiment.yaml",
    "metaplug explain --preset fomaml --with gradient-sharing --inner-lr 1.0",
)
def explain(
    *,
    given: dict[str, Any],
    config: options.Config = None,
    preset: options.PresetName = None,
    use: options.With = None,
    sets: options.Set = None,
) -> None:
    """Show what a configuration resolves to: the plugins at every hook, and each value's origin.

    Takes the options of train, and trains nothing.
    """
    from metaplug.contract.chain import Chain
    from metaplug.contract.presets import find_preset, make_plugins
    from metaplug.report.tables import explanation

    resolved = resolve_options(given, sets, config=config, preset=preset, uses=use)
    algorithm = find_preset(resolved.config.preset)
    chain = Chain(make_plugins(algorithm, resolved.config.plugins))
    RESULTS.print(explanation(resolved, chain, algorithm.summary))


@options.examples(
    "metaplug plugins",
    "metaplug plugins gradient-sharing",
    "metaplug plugins ./my_idea.py --compose",
)
def plugins(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|FILE.py",
            help="One part, with its settings and hooks; or the plugin in a file.",
        ),
    ] = None,
    compose: Annotated[
        bool,
        typer.Option(
            "--compose", help="Try which plugins go together: every pair, or those of NAME."
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """List what is installed: plugins, presets, models and loggers; or show one of them in full."""
    if compose:
        _compose(name, as_json=as_json)
        return
    from metaplug.contract.plugin_files import is_file
    from metaplug.experiments.json_values import to_json
    from metaplug.report.catalogue import entries, file_entry
    from metaplug.report.tables import catalogue_page, catalogue_table

    if name is not None and is_file(name):
        found = chosen = [file_entry(name)]
    else:
        found = entries("plugin", "preset", "model", "logger")
        chosen = [entry for entry in found if name in (None, entry.name)]
    if not chosen:
        known = dict.fromkeys(entry.name for entry in found)
        raise unknown("plugin, preset, model or logger", str(name), known)
    if as_json:
        emit(to_json([entry.values(whole=name is not None) for entry in chosen], indent=2))
    elif name is None:
        RESULTS.print(catalogue_table(chosen, "Installed"))
        line("metaplug plugins NAME shows one with its settings; metaplug tasks lists task sources")
    else:
        RESULTS.print(*map(catalogue_page, chosen), sep="\n")


def _compose(name: str | None, *, as_json: bool) -> None:
    """Try pairs of plugins, in both orders, and show what came of it."""
    from dataclasses import asdict

    from metaplug.contract.presets import label_of
    from metaplug.experiments.compositions import compositions
    from metaplug.experiments.json_values import to_json
    from metaplug.report.compositions import composition_table

    line("trying every pair in both orders, on small models")
    found = compositions(name)
    if as_json:
        emit(to_json(asdict(found), indent=2))
    else:
        show(composition_table(found, None if name is None else label_of(name)))


@options.sharing("tasks.ways", "tasks.shots", "tasks.queries", "seed")
@options.examples(
    "metaplug tasks",
    "metaplug tasks glyphs",
    "metaplug tasks folder path/to/images --draw task.png --shots 1 "
    "--set tasks.settings.mode=colour",
)
def tasks(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One source, with its settings and data.")
    ] = None,
    argument: Annotated[
        str | None, typer.Argument(metavar="ARGUMENT", help="Its argument, such as folder's path.")
    ] = None,
    *,
    draw: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw one task as a picture.")
    ] = None,
    split: Annotated[
        Literal["train", "val", "test"], typer.Option(help="The split of the drawn task.")
    ] = "train",
    given: dict[str, Any],
    sets: options.TaskSet = None,
    as_json: options.Json = False,
) -> None:
    """List the task sources; or show one, with the classes of its splits, and draw a task."""
    from metaplug.experiments.json_values import to_json
    from metaplug.report.catalogue import entries
    from metaplug.report.tables import catalogue_page, catalogue_table, values_table

    found = entries("task source")
    if name is None:
        if draw is not None:
            like = "as in metaplug tasks glyphs --draw task.png"
            raise RequestError(f"--draw draws a task of one source: name the source, {like}")
        if as_json:
            emit(to_json([entry.values(whole=False) for entry in found], indent=2))
        else:
            RESULTS.print(catalogue_table(found, "Task sources"))
        return
    source, _, rest = name.partition(":")
    chosen = next((entry for entry in found if entry.name == source), None)
    if chosen is None:
        raise unknown("task source", source, [entry.name for entry in found])
    whole = f"{source}:{argument or rest}" if argument or rest else source
    why = "what is shown are tasks alone"
    paths = task_settings(given, sets, why, also=["seed"])
    if "tasks.source" in paths:
        raise RequestError(
            f"--set tasks.source: the source is named already, {whole}: leave it out"
        )
    config = resolve_options({**paths, "tasks.source": whole}, ()).config
    data = None if chosen.error else _describe(config.tasks)
    if draw is not None:
        _draw(config, split, draw)
    if as_json:
        emit(to_json({**chosen.values(whole=True), "data": data}, indent=2))
        return
    RESULTS.print(catalogue_page(chosen))
    if data is not None:
        RESULTS.print(values_table("Data", data))
    if draw is not None:
        result(f"one {split} task is drawn in {draw}")


def _describe(tasks: TaskSettings) -> dict[str, Any] | None:
    """Describe the data of a source; None for one that needs an argument and has none."""
    from metaplug.contract import registry
    from metaplug.experiments.build import build_tasks
    from metaplug.experiments.configuration import ExperimentConfig

    if registry.load("task source", tasks.source.partition(":")[0]).argument and (
        ":" not in tasks.source
    ):
        return None
    # The smallest tasks there are, since no data set is too small for them.
    smallest = tasks.model_copy(update={"ways": 2, "shots": 1, "queries": 1})
    found = dict(build_tasks(ExperimentConfig(tasks=smallest)).describe())
    if found["kind"] != "regression":
        found.pop("outputs", None)  # the ways of these tasks, not the data's
    return found


def _draw(config: ExperimentConfig, split: str, path: Path) -> None:
    """Draw the first task of a split."""
    from metaplug.experiments.build import build_tasks, task_form
    from metaplug.report.episodes import episode_figure, texts_figure
    from metaplug.tasks.text.episodes import TextEpisodes

    stream = getattr(build_tasks(config), split)
    title = f"{config.tasks.source}: one {' '.join(task_form(config))} {split} task"
    if isinstance(stream, TextEpisodes):
        texts_figure(stream.texts(0, 0), path, title)
    else:
        episode_figure(stream.batch(0, [0]), path, title)
