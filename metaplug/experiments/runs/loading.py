"""A run read back as an experiment, without what a file may not make happen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from metaplug import checkpoint
from metaplug.contract.presets import YAML_ENDINGS
from metaplug.errors import RequestError, RunError, names_code, one_line, quoted
from metaplug.execution.ranks import ALONE, World
from metaplug.experiments.build import Experiment, build, build_tasks, make_learner
from metaplug.experiments.configuration import (
    ExperimentConfig,
    TaskSettings,
    from_yaml,
    merge,
)
from metaplug.experiments.plugin_files import permitted
from metaplug.experiments.runs.data import as_trained, claimed, settings_for
from metaplug.experiments.runs.layout import BEST, FORMER
from metaplug.models.factories import is_own
from metaplug.settings import validated


def load(
    path: Path,
    device: str | None = None,
    world: World = ALONE,
    *,
    model: str | None = None,
    tasks: Mapping[str, Any] | None = None,
    plugins: Sequence[str] = (),
) -> Experiment:
    """The experiment of a run, as its best validation left it.

    Nothing that the files of the run say is executed, downloaded, or written anywhere.

    Args:
        path: a run's folder, or one of its checkpoints.
        device: default: as the run was configured.
        world: the processes that evaluate together, of which rank 0 reads.
        model: the run's MODULE:FACTORY, where its model is one: a file names code, but only a
            caller lets it run.
        tasks: fields of TaskSettings that take the place of the run's own, to measure it on other
            tasks. Another `source` takes of the run's `settings` only what its data are read with,
            as `TaskSource.resolved` has it, and one of another kind nothing.
        plugins: the paths of the run's plugin files, where it has some: they are as good as then,
            by their digests, and only a caller lets them run.

    Raises:
        RequestError: nothing is there, it is not a run's, or its model or a plugin is code that
            `model` or `plugins` do not name, or that was changed; or the other tasks do not fit
            the model.
        RunError: the checkpoint is damaged, or of another model or version.
    """
    file, state = world.from_main(lambda: _read(path))
    config = permitted(_config_of(state, file, model), plugins, file)
    own = config.tasks
    if device is not None:
        config = _changed(config, "runtime", device=device)
    if tasks:
        config = config.model_copy(update={"tasks": _other_tasks(own, tasks, state)})
    with nullcontext() if tasks else checkpoint.naming(file), world.main_first():
        source = build_tasks(config)
    try:
        if not is_own(config.model.name):
            meta = torch.device("meta")
            checkpoint.rehearse(lambda: make_learner(config, source, meta), state, str(file))
        with checkpoint.naming(file):
            experiment = build(config, source, world)
        learner = experiment.learner
        learner.load_state_dict(state, str(file))
        learner.trained_on = claimed(learner.trained_on, state, own)
    except RunError as error:
        if not tasks:
            raise
        raise RequestError(
            f"the tasks {config.tasks.source} ask for a model with {source.outputs} outputs and "
            f"inputs {tuple(source.input_shape)}, which the trained one is not ({error}): give "
            "tasks of the form that it was trained on; of fewer ways, by "
            "tasks.settings.train_ways with tasks.settings.varied_evaluation=true"
        ) from error
    return experiment


def _other_tasks(
    own: TaskSettings, given: Mapping[str, Any], state: Mapping[str, Any]
) -> TaskSettings:
    """The tasks of a run with other fields; another source takes few of its settings over."""
    under = own.model_dump()
    if "source" in given:
        under["settings"] = settings_for(str(given["source"]), state, own)
    tasks = validated(TaskSettings, merge(under, given), "tasks")
    drawn = [name for name in ("ways", "shots") if name in given]
    if drawn and tasks.settings.get("varied_evaluation"):
        raise RequestError(
            f"tasks.{drawn[0]} says nothing where the run draws {drawn[0]} for each task of an "
            "evaluation: give tasks.settings.varied_evaluation=false too, or other bounds in "
            f"tasks.settings.train_{drawn[0]}"
        )
    return tasks


def _config_of(state: dict[str, Any], file: Path, model: str | None) -> ExperimentConfig:
    """The configuration in a checkpoint, without what a file may not make happen."""
    config = from_yaml(state["config"], f"the configuration in {file}")
    name = config.model.name
    if model is not None and model != name:
        has = f"has the model {quoted([one_line(name)])}, not '{model}'"
        raise RequestError(f"{file} {has}: give the model that it was trained with")
    if is_own(name) and model is None:
        raise RequestError(f"{names_code(file, name)}, or runs.load(..., model=...)")
    if isinstance(config.preset, str) and config.preset.endswith(YAML_ENDINGS):
        what = f"names the file {one_line(config.preset)} as its preset, which no run does"
        raise RunError(f"{file} {what}: use another checkpoint of the run")
    config = config.model_copy(update={"tasks": as_trained(state, config.tasks)})
    for section, part in (("tasks", config.tasks), ("model", config.model)):
        if part.settings.get("download"):  # what is there is used, and nothing fetched
            settings = {**part.settings, "download": False}
            config = _changed(config, section, settings=settings)
    return config


def _changed(config: ExperimentConfig, section: str, **values: Any) -> ExperimentConfig:
    changed = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: changed})


def checkpoint_of(path: Path) -> Path:
    """The file of a run's best weights, or the checkpoint itself that a path names.

    Raises:
        RequestError: there is none.
    """
    files = [path / name for name in (BEST, *reversed(FORMER))] if path.is_dir() else [path]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        what = f"{path} has no {BEST} yet" if path.is_dir() else f"there is no run {path}"
        how = "give the folder of a run that `metaplug train` has validated at least once"
        raise RequestError(f"{what}: {how}")
    return file


def _read(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a run, and the file that it is from."""
    file = checkpoint_of(path)
    state = checkpoint.read(file)
    if state.get("config") is None:
        what = "holds a learner without its experiment"
        raise RequestError(f"{file} {what}: load it in Python with MetaLearner.load")
    return file, state
