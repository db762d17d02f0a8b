"""Results and what they depend on, as values for JSON."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

import metaplug
from metaplug.contract import plugin_files, registry
from metaplug.evaluation.results import EvaluationResult, IntervalMethod
from metaplug.learner import MetaLearner


def to_json(values: Any, indent: int | None = None, *, dense: bool = False) -> str:
    """Values as JSON, with null for NaN and Inf, which JSON lacks; `dense` has no spaces."""
    marks = (",", ":") if dense else None
    return json.dumps(
        _finite(values), indent=indent, ensure_ascii=False, allow_nan=False, separators=marks
    )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def result_values(result: EvaluationResult, method: IntervalMethod = "t") -> dict[str, Any]:
    """An evaluation, with the 95 % interval from `low` to `high` by a method, and half its width.

    An empty `transductive` says that it is not; None as `training_classes`, that it is not known.
    With per-class accuracy there is a table `by_class`, over the tasks that have a class, by t.
    """
    low, high = result.bounds(method)
    table = [
        {"class": place, "mean": own.mean, "interval": own.interval, "num_tasks": own.num_tasks}
        for place, own in result.by_class.items()
    ]
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
        **({"by_class": table} if table else {}),
    }


def environment(learner: MetaLearner) -> dict[str, Any]:
    """What a result depends on: versions, device, threads, precision, ranks, and the batching."""
    device, batching = learner.engine.device, learner.batching
    is_cuda = device.type == "cuda"
    libraries = {name: version(name) for name in ("higher", "numpy", "pillow")}
    libraries["torch"] = torch.__version__
    zoos = ("transformers", "tokenizers", "peft", "timm", "torchvision")
    libraries |= {name: version(name) for name in zoos if name in sys.modules}
    cuda = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if is_cuda else {}
    return {
        "versions": {
            **versions_of_plugins(learner),
            **libraries,
            **cuda,
            "python": platform.python_version(),
        },
        "device": f"cuda ({torch.cuda.get_device_name(device)})" if is_cuda else device.type,
        "threads": torch.get_num_threads(),
        "precision": learner.engine.precision,
        "deterministic": learner.engine.deterministic,
        "ranks": learner.world.size,
        "batching": batching and {"choice": batching.batching, "reason": batching.reason},
        **({"plugin_files": files} if (files := _files_of_plugins(learner)) else {}),
    }


def _files_of_plugins(learner: MetaLearner) -> dict[str, dict[str, str]]:
    """Of the plugins that are no installed parts but files: the path and the SHA-256."""
    origins = {each.name: plugin_files.origin_of(type(each)) for each in learner.chain.plugins}
    return {name: origin for name, origin in origins.items() if origin is not None}


def versions_of_plugins(learner: MetaLearner) -> dict[str, str]:
    """The versions of metaplug and of the distributions that the plugins come from."""
    versions = {"metaplug": metaplug.__version__}
    for plugin in learner.chain.plugins:
        if name := registry.name_of("plugin", type(plugin)):
            versions.update(registry.versions_of("plugin", name))
    return versions
