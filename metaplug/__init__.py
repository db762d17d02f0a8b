"""metaplug: a plugin framework for gradient-based meta-learning on PyTorch."""

from metaplug.errors import MetaplugError, RequestError, RunError
from metaplug.evaluation import EvaluationResult
from metaplug.history import History, Record
from metaplug.learner import MetaLearner
from metaplug.plugin import Plugin, PluginConfig, hookimpl
from metaplug.preset import PluginUse, Preset
from metaplug.tasks.batch import TaskBatch
from metaplug.values import Context, Gradients, InnerStep, LearningRates, Outcome, Parameters

__version__ = "0.1.0"

__all__ = [
    "Context",
    "EvaluationResult",
    "Gradients",
    "History",
    "InnerStep",
    "LearningRates",
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
    "TaskBatch",
    "hookimpl",
]
