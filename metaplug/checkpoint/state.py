"""A learner's state: taken, held against the learner that is to take it, and given back as a whole or not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from metaplug import checkpoint
from metaplug.checkpoint.fit import check_optimizer, check_tensors, rehearsal
from metaplug.checkpoint.form import check_form
from metaplug.checkpoint.values import changed
from metaplug.contract import registry
from metaplug.errors import RunError, one_line, quoted
from metaplug.tasks.identities import TrainedOn

if TYPE_CHECKING:
    from metaplug.learner import MetaLearner


def state_of(learner: MetaLearner) -> dict[str, Any]:
    """Everything that training goes on from: tensors and plain values only, as form.State has it."""
    engine, plugins = learner.engine, learner.chain.plugins
    return {
        "iteration": engine.iteration,
        "total": engine.total,
        "kind": learner.kind,
        "seed": learner.seed,
        "settings": learner.settings.model_dump(mode="json"),
        "task_batching": learner.task_batching,
        "custom_loss": learner.custom_loss,
        "model_spec": checkpoint.model_spec(learner.model),
        "model": learner.model.state_dict(),
        "plugins": [
            {
                "part": registry.name_of("plugin", type(plugin)),
                "name": plugin.name,
                "settings": plugin.config.model_dump(mode="json"),
            }
            for plugin in plugins
        ],
        "plugin_states": {plugin.name: plugin.state_dict() for plugin in plugins},
        "optimizer": engine.optimizer.state_dict(),
        "trained_on": learner.trained_on.to_state(),
        "skipped": [engine.skipped, engine.skipped_in_a_row],
    }


def give_state(learner: MetaLearner, state: Mapping[str, Any], origin: str) -> None:
    """Let a learner go on from a state of the same model and plugins.

    Raises:
        RunError: it is of another form, or belongs to another model or to other plugins; `origin` is named, nothing was loaded.
    """
    check_form(state, origin)
    _check(learner, state, origin)
    before = changed(_parts(learner), _copy)
    optimizer: dict[str, Any] = copy.deepcopy(state["optimizer"])  # torch would share its tensors
    groups = learner.engine.optimizer.state_dict()["param_groups"]
    groups = [
        {**own, "lr": saved["lr"]}
        for own, saved in zip(groups, optimizer["param_groups"], strict=True)
    ]
    try:
        _give_parts(
            learner, (state["model"], state["plugin_states"], {**optimizer, "param_groups": groups})
        )
    except Exception as error:  # of a module or plugin that loads in a way of its own
        _give_parts(learner, before)
        raise RunError(
            f"{origin} is refused by the model or a plugin ({one_line(error)}): make them as they were"
        ) from error
    learner.engine.iteration, learner.engine.total = state["iteration"], state["total"]
    learner.engine.skipped, learner.engine.skipped_in_a_row = state.get("skipped", (0, 0))
    learner.trained_on = TrainedOn.from_state(state.get("trained_on"))


def rehearse(make: Callable[[], MetaLearner], state: Mapping[str, Any], origin: str) -> None:
    """Refuse a state that does not fit the learner that `make` makes, before that takes memory.

    Raises:
        RunError: as `give_state`. What cannot be built at all is left to be refused where it is built.
    """
    learner: MetaLearner | None = None
    with rehearsal(state, f"{origin} belongs to another model"):
        learner = make()
    if learner is not None:
        _check(learner, state, origin)


def _check(learner: MetaLearner, state: Mapping[str, Any], origin: str) -> None:
    """Refuse a state of another model, or of other plugins or settings of them, by its values' names, shapes and dtypes."""
    names = [plugin["name"] for plugin in state["plugins"]]
    own = [plugin.name for plugin in learner.chain.plugins]
    if names != own:
        raise RunError(
            f"{origin} belongs to the plugins {quoted(names)}, this learner has {quoted(own)}: make it with the same list"
        )
    changed = [
        plugin.name
        for plugin, saved in zip(learner.chain.plugins, state["plugins"], strict=True)
        if plugin.config.model_dump(mode="json") != saved["settings"]
    ]
    if changed:
        raise RunError(
            f"{origin} has other settings of plugin {quoted(changed)} than this learner: make it with the same settings"
        )
    check_tensors(state["model"], learner.model.state_dict(), f"{origin} belongs to another model")
    for plugin in learner.chain.plugins:
        check_tensors(
            state["plugin_states"][plugin.name],
            plugin.state_dict(),
            f"{origin} has another form of plugin '{plugin.name}'",
            "use the plugin and the model as they were",
        )
    check_optimizer(
        state["optimizer"], learner.engine.optimizer, f"{origin} belongs to another optimizer"
    )


def _parts(learner: MetaLearner) -> tuple[Any, Any, Any]:
    plugins = {plugin.name: plugin.state_dict() for plugin in learner.chain.plugins}
    return learner.model.state_dict(), plugins, learner.engine.optimizer.state_dict()


def _copy(part: Any) -> Any:
    """Of a tensor that was computed, its values: deepcopy takes no others than leaves."""
    return part.detach().clone() if isinstance(part, Tensor) else copy.deepcopy(part)


def _give_parts(learner: MetaLearner, parts: tuple[Any, Any, Any]) -> None:
    model, plugins, optimizer = parts
    learner.model.load_state_dict(model)
    for plugin in learner.chain.plugins:
        plugin.load_state_dict(plugins[plugin.name])
    learner.engine.optimizer.load_state_dict(optimizer)


def load(cls: Any, path: Any, *, model: Any, plugins: Any, loss: Any, world: Any) -> Any:
    from pathlib import Path

    from metaplug.checkpoint.form import naming
    from metaplug.errors import RequestError

    state = checkpoint.read(Path(path))
    if loss is None and state["custom_loss"]:
        raise RequestError(
            f"{path} was trained with a loss of your own, which a file cannot hold: give it as MetaLearner.load(..., loss=...)"
        )
    arguments: dict[str, Any] = {
        "kind": state["kind"],
        "loss": loss,
        "seed": state["seed"],
        "task_batching": state["task_batching"],
    }
    arguments |= state["settings"]
    with naming(path):
        learner = cls(
            checkpoint.rebuilt_model(state["model_spec"], path) if model is None else model,
            plugins=[checkpoint.plugin_use(use, path) for use in state["plugins"]]
            if plugins is None
            else plugins,
            world=world,
            **arguments,
        )
    learner.load_state_dict(state, str(path))
    return learner
