"""One experiment as its configuration says it, built from installed parts; and what it says of itself as plain values."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

import metaplug
from metaplug.checks.model import check_outputs
from metaplug.contract import registry
from metaplug.errors import RequestError
from metaplug.evaluation.results import EvaluationResult, IntervalMethod
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
        raise RequestError(
            f"the task source '{name}' takes no argument, but '{settings.source}' gives one: write {name}"
        )
    if source.argument is not None and not argument:
        raise RequestError(
            f"the task source '{name}' needs a {source.argument} behind a colon: write {name}:{source.argument.upper()}"
        )
    size = {"shots": settings.shots, "queries": settings.queries, "seed": config.seed}
    if source.has_ways(argument):
        size["ways"] = settings.ways
    made: TaskSource = source(*([argument] if argument else []), **size, **settings.settings)
    return made


def task_form(config: ExperimentConfig) -> list[str]:
    """The form of the configured tasks in words: ["5-way", "1-shot"], or ["10-shot"] where the source knows no ways."""
    name, _, argument = config.tasks.source.partition(":")
    ways = registry.load("task source", name).has_ways(argument)
    return [*([f"{config.tasks.ways}-way"] if ways else []), f"{config.tasks.shots}-shot"]


def build(
    config: ExperimentConfig, tasks: TaskSource | None = None, world: World = ALONE
) -> Experiment:
    """Everything that the configuration names, from its seed alone. Sets torch's number of threads where the configuration does.

    Args:
        tasks: the source that `build_tasks` made of the same configuration, to share it; default: a new one.
        world: the processes that train together.

    Raises:
        RequestError: a part is unknown, refuses its settings, or does not fit the others.
    """
    if config.runtime.deterministic:
        determinism.prepare()
    device = resolve_device(config.runtime.device, world)
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
    if tasks is None:
        with world.main_first():
            tasks = build_tasks(config)
    tasks = tasks.to(device)
    # Iterations count from 0, so that -1 is a stream of its own; drawn on the CPU, weights do not depend on the device.
    with stream(mix(config.seed, -1), torch.device("cpu")):
        model = make_model(
            config.model.name, tuple(tasks.input_shape), tasks.outputs, config.model.settings
        )
    learner = MetaLearner(
        model.to(device),
        preset=config.preset,
        plugins=config.plugins,
        kind=tasks.kind,
        task_batching=config.runtime.task_batching,
        checkpoint_steps=config.runtime.checkpoint_steps,
        chunk_size=config.runtime.chunk_size,
        compile=config.runtime.compile,
        capture=config.runtime.capture,
        metrics_every=config.runtime.metrics_every,
        precision=config.runtime.precision,
        deterministic=config.runtime.deterministic,
        seed=config.seed,
        world=world,
        **config.learner.model_dump(),
    )
    check_outputs(
        learner.engine.inner, tasks.train.batch(0, [0]).to(device), tasks.outputs, tasks.kind
    )
    return Experiment(config, learner, tasks)


def to_json(values: Any, indent: int | None = None) -> str:
    """Values as JSON, with null for NaN and Inf, which JSON does not have."""
    return json.dumps(_finite(values), indent=indent, ensure_ascii=False, allow_nan=False)


def result_values(result: EvaluationResult, method: IntervalMethod = "t") -> dict[str, Any]:
    """An evaluation as JSON values, with the 95 % interval from `low` to `high` by a method, and half its width.

    Of transductive, an empty list says that it is not; of training_classes, None that it is not known.
    """
    low, high = result.bounds(method)
    return {
        "metric": result.metric,
        "mean": result.mean,
        "interval": result.interval if method == "t" else (high - low) / 2,
        "interval_method": method,
        "low": low,
        "high": high,
        "num_tasks": result.num_tasks,
        "inner_steps": result.inner_steps,
        "transductive": list(result.transductive),
        "training_classes": result.training_classes,
    }


def environment(learner: MetaLearner) -> dict[str, Any]:
    """What a result depends on: versions, device, threads, precision, ranks, and how tasks were batched, with the reason."""
    device = learner.engine.device
    return {
        "versions": {
            **versions_of_plugins(learner),
            **{name: version(name) for name in ("higher", "numpy", "pillow")},
            "torch": torch.__version__,
            **(
                {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
                if device.type == "cuda"
                else {}
            ),
            "python": platform.python_version(),
        },
        "device": f"cuda ({torch.cuda.get_device_name(device)})"
        if device.type == "cuda"
        else device.type,
        "threads": torch.get_num_threads(),
        "precision": learner.engine.precision,
        "deterministic": learner.engine.deterministic,
        "ranks": learner.world.size,
        "batching": None
        if learner.batching is None
        else {"choice": learner.batching.batching, "reason": learner.batching.reason},
    }


def versions_of_plugins(learner: MetaLearner) -> dict[str, str]:
    """metaplug's own version, and those of the distributions that the learner's plugins come from."""
    versions = {"metaplug": metaplug.__version__}
    for plugin in learner.chain.plugins:
        if name := registry.name_of("plugin", type(plugin)):
            versions.update(registry.versions_of("plugin", name))
    return versions


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
