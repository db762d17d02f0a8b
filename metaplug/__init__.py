"""metaplug: a plugin framework for gradient-based meta-learning on PyTorch.

* `learner`: MetaLearner, the face; `training`: its engine put together, and its loop.
* `contract`: hooks, plugins and the values that pass through them; `core`: the mathematics.
* `execution`: how a step runs; `checks`: what is refused or diagnosed; `evaluation`: results.
* `tasks`, `models`: where tasks come from, and the models of the field.
* `checkpoint`: a learner in a safetensors file; `experiments`: runs in folders, and comparisons.
* `cli`, `report`, `bench`, `gpu_report`: commands, tables and pictures, measurements.
* `testing`, `templates`: the conformance suite, and new packages, for authors of plugins.
* `errors`, `files`, `commits`, `settings`, `yaml_text`, `random_streams`: what every room uses.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaplug.contract.inner_step import InnerStep
    from metaplug.contract.logger import LoggedRun, LoggedStep, Logger, LoggerConfig, LoggerUse
    from metaplug.contract.outcome import Outcome
    from metaplug.contract.plugin import LearnedPluginConfig, Plugin, PluginConfig, hookimpl, key_of
    from metaplug.contract.presets import PluginUse, Preset
    from metaplug.contract.schedule import epoch_of
    from metaplug.contract.task_batch import TaskBatch
    from metaplug.contract.values import (
        Context,
        Gradients,
        LearningRates,
        Parameters,
        gradients_of,
        per_task,
        task_vectors,
        tensor_means,
    )
    from metaplug.errors import MetaplugError, RequestError, RunError
    from metaplug.evaluation.history import History, Record
    from metaplug.evaluation.results import EvaluationResult
    from metaplug.evaluation.scores import Score
    from metaplug.learner import MetaLearner

__version__ = "0.1.0"

__all__ = [
    "Context",
    "EvaluationResult",
    "Gradients",
    "History",
    "InnerStep",
    "LearnedPluginConfig",
    "LearningRates",
    "LoggedRun",
    "LoggedStep",
    "Logger",
    "LoggerConfig",
    "LoggerUse",
    "MetaLearner",
    "MetaplugError",
    "Outcome",
    "Parameters",
    "Plugin",
    "PluginConfig",
    "PluginUse",
    "Preset",
    "Record",
    "RequestError",
    "RunError",
    "Score",
    "TaskBatch",
    "epoch_of",
    "gradients_of",
    "hookimpl",
    "key_of",
    "per_task",
    "task_vectors",
    "tensor_means",
]

if not TYPE_CHECKING:
    # Names are imported on first use: torch takes seconds, and `metaplug --help` needs none of it.
    _HOMES = {
        "contract.plugin": ("LearnedPluginConfig", "Plugin", "PluginConfig", "hookimpl", "key_of"),
        "contract.logger": ("LoggedRun", "LoggedStep", "Logger", "LoggerConfig", "LoggerUse"),
        "contract.presets": ("PluginUse", "Preset"),
        "contract.schedule": ("epoch_of",),
        "contract.task_batch": ("TaskBatch",),
        "contract.inner_step": ("InnerStep",),
        "contract.outcome": ("Outcome",),
        "contract.values": (
            *("Context", "Gradients", "LearningRates", "Parameters"),
            *("gradients_of", "per_task", "task_vectors", "tensor_means"),
        ),
        "errors": ("MetaplugError", "RequestError", "RunError"),
        "evaluation.history": ("History", "Record"),
        "evaluation.results": ("EvaluationResult",),
        "evaluation.scores": ("Score",),
        "learner": ("MetaLearner",),
    }
    _HOME = {name: home for home, names in _HOMES.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'metaplug' has no attribute '{name}'")
        value = getattr(import_module(f"metaplug.{_HOME[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted([*__all__, "__version__"])
