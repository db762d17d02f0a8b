"""The state of a learner, as tensors and plain values."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from metaplug.contract import registry
from metaplug.contract.chain import Chain
from metaplug.contract.values import Kind
from metaplug.evaluation.evaluator import Evaluator
from metaplug.evaluation.scores import option_of
from metaplug.execution.batching import Batching
from metaplug.execution.engine import Engine
from metaplug.execution.settings import LearnerSettings
from metaplug.models.factories import name_of
from metaplug.tasks.identities import TrainedOn


class Learner(Protocol):
    """A learner, as far as its state goes."""

    model: nn.Module
    chain: Chain
    engine: Engine
    settings: LearnerSettings
    kind: Kind
    seed: int
    task_batching: Batching
    custom_loss: bool
    trained_on: TrainedOn
    evaluator: Evaluator


def state_of(learner: Learner) -> dict[str, Any]:
    """Everything that training goes on from: tensors and plain values, as State has them."""
    engine, plugins = learner.engine, learner.chain.plugins
    model: Any = learner.model
    spec = None
    if (name := name_of(model)) is not None:
        form = {"input_shape": list(model.input_shape), "outputs": model.outputs}
        spec = {"name": name, **form, "settings": settings_of(model)}
    return {
        "iteration": engine.iteration,
        "total": engine.total,
        "kind": learner.kind,
        "seed": learner.seed,
        "settings": learner.settings.model_dump(mode="json"),
        "task_batching": learner.task_batching,
        "score": option_of(learner.evaluator.score),
        "custom_score": option_of(learner.evaluator.score) is None,
        "custom_loss": learner.custom_loss,
        "model_spec": spec,
        "model": model.state_dict(),
        "plugins": [
            {
                "part": registry.name_of("plugin", type(plugin)),
                "name": plugin.name,
                "settings": settings_of(plugin),
            }
            for plugin in plugins
        ],
        "plugin_states": {plugin.name: plugin.state_dict() for plugin in plugins},
        "optimizer": engine.optimizer.state_dict(),
        "trained_on": learner.trained_on.to_state(),
        "skipped": [engine.skipped, engine.skipped_in_a_row],
    }


def settings_of(part: Any) -> dict[str, Any]:
    """The settings of a model or plugin with a Config, as plain values."""
    values: dict[str, Any] = part.config.model_dump(mode="json")
    return values
