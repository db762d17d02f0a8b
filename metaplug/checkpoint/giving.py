"""A state given to a learner: as a whole, or not at all."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metaplug.checkpoint.fit import check_fit
from metaplug.checkpoint.form import check_form
from metaplug.checkpoint.state import Learner
from metaplug.errors import RunError, one_line
from metaplug.tasks.identities import TrainedOn


def give_state(learner: Learner, state: Mapping[str, Any], origin: str) -> None:
    """Let a learner go on from a state of the same model and plugins.

    Args:
        learner: one with the model, plugins and meta-optimizer that the state is of.
        state: as State has it, with tensors on any device.
        origin: where the state is from, for errors.

    Raises:
        RunError: it is of another form, model or plugins; names `origin`, and nothing was loaded.
    """
    check_form(state, origin)
    check_fit(learner, state, origin)
    engine, optimizer = learner.engine, _copy(state["optimizer"])  # torch keeps what it is given
    for own, saved in zip(engine.optimizer.param_groups, optimizer["param_groups"], strict=True):
        saved |= {key: own[key] for key in own.keys() - {"lr", "params"}}
    parts: list[Any] = [learner.model, *learner.chain.plugins, engine.optimizer]
    before = [_copy(part.state_dict()) for part in parts]
    plugin_states = [state["plugin_states"][plugin.name] for plugin in learner.chain.plugins]
    try:
        for part, values in zip(parts, [state["model"], *plugin_states, optimizer], strict=True):
            part.load_state_dict(values)
    except Exception as error:  # of a module or plugin that loads in a way of its own
        for part, values in zip(parts, before, strict=True):
            part.load_state_dict(values)
        said = f"is refused by the model or a plugin ({one_line(error)})"
        raise RunError(f"{origin} {said}: make them as they were") from error
    engine.iteration, engine.total = state["iteration"], state["total"]
    engine.skipped, engine.skipped_in_a_row = state.get("skipped", (0, 0))
    learner.trained_on = TrainedOn.from_state(state.get("trained_on"))


def _copy(part: Any) -> Any:
    """A deep copy, also of tensors that were computed, which deepcopy refuses."""
    if isinstance(part, Tensor):
        return part.detach().clone()
    if isinstance(part, dict):
        made = copy.copy(part)  # with the versions of modules, an attribute
        made.update((key, _copy(value)) for key, value in part.items())
        return made
    return type(part)(map(_copy, part)) if type(part) in (list, tuple) else copy.deepcopy(part)
