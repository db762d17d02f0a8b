"""A configured experiment, built from installed parts."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch

from metaplug.checks.model import check_outputs
from metaplug.contract import registry
from metaplug.errors import RequestError, quoted
from metaplug.execution import determinism
from metaplug.execution.devices import resolve_device
from metaplug.execution.ranks import ALONE, World
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.learner import MetaLearner
from metaplug.models.factories import make_model
from metaplug.random_streams import mix, stream
from metaplug.tasks.sources import TaskSource


@dataclass(frozen=True)
class Experiment:
    """A learner and its tasks, ready to train, with the configuration that they were built from."""

    config: ExperimentConfig
    learner: MetaLearner
    tasks: TaskSource


def build_tasks(config: ExperimentConfig) -> TaskSource:
    """The configured task source.

    Raises:
        RequestError: no such source, an argument too many or too few, or a setting that it refuses.
    """
    settings = config.tasks
    name, colon, argument = settings.source.partition(":")
    source = registry.load("task source", name)
    if source.argument is None and colon:
        fault = f"takes no argument, but '{settings.source}' gives one: write {name}"
        raise RequestError(f"the task source '{name}' {fault}")
    if source.argument is not None and not argument:
        mend = f"write {name}:{source.argument.upper()}"
        raise RequestError(
            f"the task source '{name}' needs a {source.argument} after a colon: {mend}"
        )
    size = {"shots": settings.shots, "queries": settings.queries, "seed": config.seed}
    if source.has_ways(argument):
        size["ways"] = settings.ways
    if twice := sorted({*size, "ways"} & settings.settings.keys()):
        field = "seed" if twice[0] == "seed" else f"tasks.{twice[0]}"
        raise RequestError(
            f"tasks.settings.{twice[0]}: no source has it as a setting; give {field}"
        )
    own = {**_tokenizer(source, config), **settings.settings}
    made: TaskSource = source(*([argument] if argument else []), **size, **own)
    return made


def _tokenizer(source: type[TaskSource], config: ExperimentConfig) -> dict[str, Any]:
    """The model's own tokenizer, for a source of texts; it is fetched where the model may be."""
    zoo, _, name = config.model.name.partition(":")
    if "tokenizer" not in source.Config.model_fields or zoo != "transformers":
        return {}
    return {"tokenizer": name, "download": config.model.settings.get("download", False)}


def task_form(config: ExperimentConfig) -> list[str]:
    """The form of the configured tasks: ["5-way", "1-shot"], or ["10-shot"] without ways."""
    name, _, argument = config.tasks.source.partition(":")
    ways = registry.load("task source", name).has_ways(argument)
    return [*([f"{config.tasks.ways}-way"] if ways else []), f"{config.tasks.shots}-shot"]


def build(
    config: ExperimentConfig, tasks: TaskSource | None = None, world: World = ALONE
) -> Experiment:
    """Build everything that the configuration names, from its seed alone.

    Sets torch's number of threads where the configuration does.

    Args:
        tasks: the source that `build_tasks` made of the same configuration, to share it.
        world: the processes that train together.

    Raises:
        RequestError: a part is unknown, refuses its settings, or does not fit the others.
    """
    runtime = config.runtime
    if runtime.deterministic:
        determinism.prepare()
    device = resolve_device(runtime.device, world)
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    if tasks is None:
        with world.main_first():
            tasks = build_tasks(config)
    tasks = tasks.to(device)
    options = runtime.model_dump(exclude={"device", "threads", "save_every"})
    learner = make_learner(config, tasks, device, world=world, **options)
    first = tasks.train.batch(0, [0]).to(device)
    check_outputs(learner.engine.inner, first, tasks.outputs, tasks.kind)
    return Experiment(config, learner, tasks)


def make_learner(
    config: ExperimentConfig, tasks: TaskSource, device: torch.device, **options: Any
) -> MetaLearner:
    """The configured learner with its first weights, and `options` for how it runs."""
    shape, settings = tuple(tasks.input_shape), config.model.settings
    _check_takes(config.model.name, tasks)
    # Iterations count from 0, so -1 is free; on the CPU, weights do not depend on the device.
    with stream(mix(config.seed, -1), torch.device("cpu")):
        model = make_model(config.model.name, shape, tasks.outputs, settings)
    return MetaLearner(
        model.to(device),
        preset=config.preset,
        plugins=config.plugins,
        kind=tasks.kind,
        score=config.training.score,
        seed=config.seed,
        **config.learner.model_dump(),
        **options,
    )


def _check_takes(name: str, tasks: TaskSource) -> None:
    """Refuse a model of one tensor for tasks of several, as far as its name tells.

    Raises:
        RequestError: names the inputs of the tasks.
    """
    zoo, colon, _ = name.partition(":")
    takes = zoo not in ("torchvision", "timm")
    made = None if colon else registry.load("model", name)
    if isinstance(made, type) and issubclass(made, torch.nn.Module):
        parameters = signature(made.forward).parameters.values()
        known = {parameter.name for parameter in parameters}
        takes = {*tasks.inputs} <= known or any(
            each.kind == each.VAR_KEYWORD for each in parameters
        )
    if tasks.inputs and not takes:
        raise RequestError(
            f"the model '{name}' takes one tensor, but the tasks have {quoted(tasks.inputs)}: "
            "choose transformers:NAME_OR_FOLDER, or a model of your own that takes these by name"
        )
