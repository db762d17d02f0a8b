"""A run read back as an experiment, without what a file may not make happen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metaplug import checkpoint
from metaplug.checkpoint import naming, rehearse
from metaplug.contract.presets import YAML_ENDINGS
from metaplug.errors import RequestError, RunError, one_line, quoted
from metaplug.execution.ranks import ALONE, World
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.experiment import Experiment, build, build_tasks
from metaplug.experiments.runs.layout import BEST
from metaplug.learner import MetaLearner
from metaplug.models.factories import is_own, make_model, names_code
from metaplug.settings import validated
from metaplug.tasks.sources import TaskSource
from metaplug.yaml_text import parse_yaml


def load(
    path: Path, device: str | None = None, world: World = ALONE, *, model: str | None = None
) -> Experiment:
    """The experiment of a run, as its best validation left it.

    Nothing that the files of the run say is executed, downloaded, or written anywhere.

    Args:
        path: a run's folder, or one of its checkpoints.
        device: default: as the run was configured.
        world: the processes that evaluate together, of which rank 0 reads.
        model: the run's MODULE:FACTORY, where its model is one: a file names code, but only a caller lets it run.

    Raises:
        RequestError: nothing is there, it is not a run's, or its model is code that `model` does not name.
        RunError: the checkpoint is damaged, or of another model or version.
    """
    file, state = world.from_main(lambda: _read(path))
    config = _config_of(state, file, model)
    if device is not None:
        config = config.model_copy(
            update={"runtime": config.runtime.model_copy(update={"device": device})}
        )
    with naming(file), world.main_first():
        tasks = build_tasks(config)
    if not is_own(config.model.name):
        rehearse(lambda: _without_memory(config, tasks), state, str(file))
    with naming(file):
        experiment = build(config, tasks, world)
    experiment.learner.load_state_dict(state, str(file))
    return experiment


def _without_memory(config: ExperimentConfig, tasks: TaskSource) -> MetaLearner:
    """The learner that `build` makes, as far as its state's form depends on it."""
    model = make_model(
        config.model.name, tuple(tasks.input_shape), tasks.outputs, config.model.settings
    )
    settings = config.learner.model_dump()
    return MetaLearner(
        model,
        preset=config.preset,
        plugins=config.plugins,
        kind=tasks.kind,
        seed=config.seed,
        **settings,
    )


def _config_of(state: dict[str, Any], file: Path, model: str | None) -> ExperimentConfig:
    """The configuration in a checkpoint, without what a file may not make happen."""
    config = validated(
        ExperimentConfig,
        parse_yaml(state["config"], f"the configuration in {file}"),
        f"the configuration in {file}",
    )
    name = config.model.name
    if model is not None and model != name:
        raise RequestError(
            f"{file} has the model {quoted([one_line(name)])}, not '{model}': give the model that it was trained with"
        )
    if is_own(name) and model is None:
        raise RequestError(f"{names_code(file, name)}, or runs.load(..., model=...)")
    if isinstance(config.preset, str) and config.preset.endswith(YAML_ENDINGS):
        raise RunError(
            f"{file} names the file {one_line(config.preset)} as its preset, which no run does: use another checkpoint of the run"
        )
    if config.tasks.settings.get(
        "download"
    ):  # what is there is used; a file that somebody sent fetches nothing
        settings = {**config.tasks.settings, "download": False}
        config = config.model_copy(
            update={"tasks": config.tasks.model_copy(update={"settings": settings})}
        )
    return config


def _read(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a run, and the file that it is from."""
    file = path / BEST if path.is_dir() else path
    if not file.exists():
        what = f"{path} has no {BEST} yet" if path.is_dir() else f"there is no run {path}"
        raise RequestError(
            f"{what}: give the folder of a run that `metaplug train` has validated at least once"
        )
    state = checkpoint.read(file)
    if state.get("config") is None:
        raise RequestError(
            f"{file} holds a learner without its experiment: load it in Python with MetaLearner.load"
        )
    return file, state
