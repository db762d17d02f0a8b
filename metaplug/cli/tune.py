"""metaplug tune."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaplug.cli import options
from metaplug.cli.resolving import parse_setting, resolve_options
from metaplug.cli.stopping import StoppedError, stop_on_signals
from metaplug.cli.study import refuse_ranks
from metaplug.errors import RequestError
from metaplug.report.console import CONSOLE, emit, line, show

if TYPE_CHECKING:
    from metaplug.experiments.configuration import ExperimentConfig
    from metaplug.experiments.tuning import Asked

_option = partial(typer.Option, rich_help_panel="Search")


@options.shared
@options.examples(
    "metaplug tune --preset maml --search learner.inner_lr=log:0.01..1 "
    "--search learner.inner_steps=1..5 --trials 40 --name mine",
    'metaplug tune --with gradient-sharing --search "learner.inner_optimizer=[sgd, adam]" '
    "--search plugins.gradient-sharing.gate=0..1 --json",
    "metaplug tune experiment.yaml --trials 100",
)
def tune(
    *,
    given: dict[str, Any],
    config: options.Config = None,
    preset: options.PresetName = None,
    use: options.With = None,
    sets: options.Set = None,
    log: options.Log = None,
    search: Annotated[
        list[str] | None,
        _option(
            metavar="FIELD=RANGE",
            help="A field to search: LOW..HIGH, log:LOW..HIGH or a list as [sgd, adam]. "
            "Repeatable; in CONFIG they stand under search.",
        ),
    ] = None,
    trials: Annotated[
        int, _option(min=1, max=100_000, help="How many there shall be, with those done before.")
    ] = 40,
    name: Annotated[
        str | None,
        _option(help="The search's name.", show_default="CONFIG's name, and what options set"),
    ] = None,
    out: Annotated[Path, _option(help="The folder that holds runs.")] = Path("runs"),
    as_json: options.Json = False,
) -> None:
    """Search for the values of some fields that validate best, each trial a run of its own.

    Test tasks are never drawn. OUT/NAME/best.yaml is the best configuration, for metaplug train.
    Ctrl-C stops after the current step, and the same command goes on.
    """
    refuse_ranks("tune", "as a search trains one trial at a time")
    options.check_name(name)
    from metaplug.experiments.json_values import to_json
    from metaplug.experiments.tuning import to_values
    from metaplug.experiments.tuning import tune as tune_in
    from metaplug.report.tuning import TuningProgress, tuning_report
    from metaplug.yaml_text import read_yaml

    content = {} if config is None else read_yaml(config)
    asked = _asked(content.pop("search", {}), config, search or ())
    settings = resolve_options(
        given, sets, config=config, preset=preset, uses=use, logs=log, content=content
    ).config
    _check_not_set(asked, given, sets or (), use or ())
    folder = out / (name or f"tuned-{_default_name(settings, config, content)}")
    with stop_on_signals() as stop, TuningProgress(CONSOLE, settings) as progress:
        outcome = tune_in(
            settings,
            asked,
            folder,
            trials=trials,
            on_start=progress.begin,
            on_build=progress.show_experiment,
            on_record=progress.record,
            on_trial=progress.end_trial,
            stop=stop,
        )
    if outcome is None:
        raise StoppedError(f"stopped, with all of it in {folder}", stop.signal, "")
    if as_json:
        emit(to_json(to_values(outcome), indent=2))
    else:
        show(tuning_report(outcome))
    line(f"the best configuration is {folder / 'best.yaml'}; all of it is in {folder}")


def _asked(in_file: Any, config: Path | None, texts: Any) -> list[Asked]:
    """The fields to search, of the file and of the options, which override it."""
    from metaplug.experiments.configuration import flatten
    from metaplug.experiments.tuning import Asked

    if not isinstance(in_file, dict):
        raise RequestError(
            f"{config}: search is no mapping: write a line as learner.inner_lr: log:0.01..1"
        )
    found = [Asked(f"{config}, search:", path, value) for path, value in flatten(in_file).items()]
    by_option = [Asked("--search", *parse_setting(text, "--search")) for text in texts]
    paths = {one.path for one in by_option}
    return [*(one for one in found if one.path not in paths), *by_option]


def _check_not_set(asked: list[Asked], given: dict[str, Any], sets: Any, uses: Any) -> None:
    """Refuse to search a field that another option sets, as one of the two would not count."""
    from metaplug.experiments.variant_texts import parse_plugin

    by = {path: options.flag(path) for path in given}
    by |= {parse_setting(text)[0]: "--set" for text in sets}
    for use in map(parse_plugin, uses):
        by |= {f"plugins.{use.label}.{field}": "--with" for field in use.settings}
    for one in asked:
        if (option := by.get(one.path)) is not None:
            raise RequestError(f"{one}: {option} sets this field, too: leave one of them out")


def _default_name(settings: ExperimentConfig, file: Path | None, content: dict[str, Any]) -> str:
    from metaplug.experiments.run_names import name_of

    if file is None:
        return name_of(settings)
    alone = resolve_options({}, None, config=file, content=content).config
    return name_of(settings, file.stem, alone)
