"""explain, plugins and tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from metaplug.cli.options import (
    Config,
    Json,
    PresetName,
    Set,
    With,
    resolve_options,
    setting,
    shared,
)
from metaplug.errors import RequestError, unknown
from metaplug.report.console import CONSOLE, emit, line

if TYPE_CHECKING:
    from metaplug.experiments.configuration import ExperimentConfig


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command(epilog=_EXPLAIN_EXAMPLES)(shared(explain))
    app.command(epilog=_PLUGINS_EXAMPLES)(plugins)
    app.command(epilog=_TASKS_EXAMPLES)(tasks)


_EXPLAIN_EXAMPLES = """**Examples**

- metaplug explain experiment.yaml

- metaplug explain --preset fomaml --with gradient-sharing --inner-lr 1.0"""


def explain(
    *,
    given: dict[str, Any],
    config: Config = None,
    preset: PresetName = None,
    use: With = None,
    sets: Set = None,
) -> None:
    """Show what a configuration comes to: the order of plugins at every hook, their settings, and where every value is from.

    Takes the options of train, and trains nothing.
    """
    from metaplug.contract.chain import Chain
    from metaplug.contract.presets import find_preset, make_plugins, parse_plugin
    from metaplug.report.terminal import explanation
    from metaplug.settings import own_first

    resolved = resolve_options(
        given, sets, config=config, preset=preset, uses=[parse_plugin(text) for text in use or ()]
    )
    algorithm = find_preset(resolved.config.preset)
    chain = Chain(make_plugins(algorithm, resolved.config.plugins))
    dumped = {
        plugin.name: (own_first(type(plugin.config)), plugin.config.model_dump(mode="json"))
        for plugin in chain.plugins
    }
    settings = {
        name: {field: values[field] for field in fields}
        for name, (fields, values) in dumped.items()
    }
    CONSOLE.print(explanation(resolved, chain.order(), settings, algorithm.summary))


_PLUGINS_EXAMPLES = """**Examples**

- metaplug plugins

- metaplug plugins gradient-sharing

- metaplug plugins gradient-sharing --json"""


def plugins(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="One part, with its settings and hooks.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List what is installed: plugins, the presets that are made of them, and models; or show one of them in full."""
    from metaplug.experiments.json_values import to_json
    from metaplug.report.catalogue import entries
    from metaplug.report.terminal import catalogue_page, catalogue_table

    found = entries("plugin", "preset", "model")
    chosen = [entry for entry in found if name in (None, entry.name)]
    if not chosen:
        raise unknown(
            "plugin, preset or model", str(name), dict.fromkeys(entry.name for entry in found)
        )
    if as_json:
        emit(to_json([entry.values(whole=name is not None) for entry in chosen], indent=2))
    elif name is None:
        CONSOLE.print(catalogue_table(chosen, "Installed"))
        line("metaplug plugins NAME shows one with its settings; metaplug tasks lists task sources")
    else:
        CONSOLE.print(*(catalogue_page(entry) for entry in chosen), sep="\n")


_TASKS_EXAMPLES = """**Examples**

- metaplug tasks

- metaplug tasks glyphs

- metaplug tasks folder path/to/images --draw task.png --ways 5 --shots 1"""


def tasks(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="One source, with its settings and its data.", show_default=False
        ),
    ] = None,
    argument: Annotated[
        str | None,
        typer.Argument(
            metavar="ARGUMENT",
            help="What the source needs, such as folder's path.",
            show_default=False,
        ),
    ] = None,
    *,
    draw: Annotated[
        Path | None,
        typer.Option(
            "--draw", metavar="FILE.png", help="Draw one task as a picture.", show_default=False
        ),
    ] = None,
    split: Annotated[
        Literal["train", "val", "test"], typer.Option("--split", help="Of which split it is.")
    ] = "train",
    ways: Annotated[
        int, typer.Option("--ways", min=2, max=1000, help="Its classes (classification).")
    ] = 5,
    shots: Annotated[
        int,
        typer.Option(
            "--shots", min=1, max=1000, help="Its support examples, of each class or in all."
        ),
    ] = 1,
    queries: Annotated[
        int,
        typer.Option(
            "--queries", min=1, max=1000, help="Its query examples, of each class or in all."
        ),
    ] = 5,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Another seed draws another task.")
    ] = 0,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="A setting of the source, as YAML. Repeatable."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the task sources; or show one of them, with the classes and images of its splits, and draw one of its tasks."""
    from metaplug.experiments.configuration import ExperimentConfig, TaskSettings
    from metaplug.experiments.json_values import to_json
    from metaplug.report.catalogue import entries
    from metaplug.report.terminal import catalogue_page, catalogue_table, values_table

    found = entries("task source")
    if name is None:
        if draw is not None:
            raise RequestError(
                "--draw draws a task of one source: name the source, as in metaplug tasks glyphs --draw task.png"
            )
        if as_json:
            emit(to_json([entry.values(whole=False) for entry in found], indent=2))
        else:
            CONSOLE.print(catalogue_table(found, "Task sources"))
        return
    source, _, behind = name.partition(":")
    chosen = next((entry for entry in found if entry.name == source), None)
    if chosen is None:
        raise unknown("task source", source, [entry.name for entry in found])
    settings = dict(setting(text) for text in sets or ())
    whole = f"{source}:{argument or behind}" if argument or behind else source
    data = None if chosen.error else _describe(source, whole, settings)
    if draw is not None:
        task = TaskSettings(
            source=whole, ways=ways, shots=shots, queries=queries, settings=settings
        )
        _draw(ExperimentConfig(tasks=task, seed=seed), split, draw)
    if as_json:
        emit(to_json({**chosen.values(whole=True), "data": data}, indent=2))
        return
    CONSOLE.print(catalogue_page(chosen))
    if data is not None:
        CONSOLE.print(values_table("Data", data))
    if draw is not None:
        line(f"one {split} task is drawn in {draw}")


def _describe(source: str, whole: str, given: dict[str, Any]) -> dict[str, Any] | None:
    """The data of a source; None for one that needs an argument and has none."""
    from metaplug.contract import registry
    from metaplug.experiments.build import build_tasks
    from metaplug.experiments.configuration import ExperimentConfig, TaskSettings

    if registry.load("task source", source).argument is not None and whole == source:
        return None
    # The smallest tasks there are, so that no data set is too small to be described.
    settings = TaskSettings(source=whole, ways=2, shots=1, queries=1, settings=given)
    found = build_tasks(ExperimentConfig(tasks=settings)).describe()
    return {
        field: value
        for field, value in found.items()
        if field != "outputs" or found["kind"] == "regression"
    }


def _draw(config: ExperimentConfig, split: str, path: Path) -> None:
    """The first task of a split as a picture."""
    from metaplug.experiments.build import build_tasks, task_form
    from metaplug.report.episodes import episode_figure

    batch = getattr(build_tasks(config), split).batch(0, [0])
    episode_figure(
        batch, path, f"{config.tasks.source}: one {' '.join(task_form(config))} {split} task"
    )
