"""Whether a state is of the same model, plugins and meta-optimizer as a learner."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaplug.checkpoint.state import Learner, settings_of
from metaplug.errors import RunError, one_line, quoted


def check_fit(learner: Learner, state: Mapping[str, Any], origin: str) -> None:
    """Refuse a state of another model or meta-optimizer, of other plugins or settings of them.

    Args:
        learner: the one that the state is for, on any device, the meta device too.
        state: as State has it.
        origin: where the state is from, for errors.

    Raises:
        RunError: names `origin`, and the first that differs.
    """
    plugins, saved_plugins = learner.chain.plugins, state["plugins"]
    names, own = [one["name"] for one in saved_plugins], [one.name for one in plugins]
    if names != own:
        has = f"belongs to the plugins {quoted(names)}, this learner has {quoted(own)}"
        raise RunError(f"{origin} {has}: make it with the same list")
    pairs = zip(plugins, saved_plugins, strict=True)
    for one, saved in pairs:
        if text := _differing(saved["settings"], settings_of(one)):
            has = f"has other settings of plugin '{one.name}' than this learner: {text}"
            raise RunError(f"{origin} {has}; make it with the same settings")
    what, mend = f"{origin} belongs to another model", "build the model as it was"
    _check_tensors(state["model"], learner.model.state_dict(), what, mend)
    for one in plugins:
        what, mend = f"{origin} has another form of plugin '{one.name}'", "use it as it was"
        _check_tensors(state["plugin_states"][one.name], one.state_dict(), what, mend)
    what = f"{origin} belongs to another optimizer"
    _check_optimizer(state["optimizer"], learner.engine.optimizer, what)


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Write the first fields that differ, with both values: "gate is 0.5 there and 0.1 here"."""
    differing = [
        name
        for name in dict.fromkeys([*here, *there])
        if name not in there or name not in here or there[name] != here[name]
    ]

    def value(settings: Mapping[str, Any], name: str) -> str:
        return one_line(repr(settings[name])) if name in settings else "missing"

    return ", ".join(
        f"{one_line(name)} is {value(there, name)} there and {value(here, name)} here"
        for name in differing[:3]
    )


def _check_tensors(saved: Mapping[str, Any], own: Mapping[str, Any], what: str, mend: str) -> None:
    missing = [name for name in own if name not in saved][:3]
    extra = [one_line(name) for name in saved if name not in own][:3]
    if missing or extra:
        raise RunError(f"{what}: it lacks {quoted(missing)} and has {quoted(extra)} beside; {mend}")
    for name, value in own.items():
        there, here = _form(saved[name], value), _form(value, saved[name])
        if there != here:
            raise RunError(f"{what}: '{name}' is {there} there and {here} here; {mend}")


def _form(value: Any, beside: Any) -> str:
    """The first of type, shape and dtype of `value` that differs from those of `beside`."""
    if not (isinstance(value, Tensor) and isinstance(beside, Tensor)):
        return "a tensor" if isinstance(value, Tensor) else "no tensor"
    return str(value.dtype if value.shape == beside.shape else tuple(value.shape))


def _check_optimizer(saved: Mapping[str, Any], own: torch.optim.Optimizer, what: str) -> None:
    mend = "use the meta-optimizer, model and plugins as they were"
    groups: Any = saved["param_groups"], own.state_dict()["param_groups"]
    # A schedule changes the first of these, and the others are but how torch computes.
    free = {"lr", "foreach", "fused", "capturable", "differentiable"}
    for theirs, ours in itertools.zip_longest(*groups, fillvalue={}):
        for key in sorted({*theirs, *ours} - free):
            if repr(theirs.get(key)) != repr(ours.get(key)):
                raise RunError(f"{what}: its setting '{one_line(key)}' is another one; {mend}")
        if type(theirs.get("lr")) not in (int, float) or not 0 <= theirs["lr"] < math.inf:
            raise RunError(f"{what}: its setting 'lr' is another one; {mend}")
    parameters = [parameter for group in own.param_groups for parameter in group["params"]]
    is_adam = isinstance(own, torch.optim.Adam)
    for index, moments in saved["state"].items():
        if not 0 <= index < len(parameters):
            raise RunError(f"{what}: it has moments of a parameter {index} beside; {mend}")
        if any(value is not None for value in moments.values()):  # None is SGD's without momentum
            like = {"exp_avg": parameters[index], "exp_avg_sq": parameters[index]}
            like = {"step": torch.zeros((), dtype=torch.float32), **like} if is_adam else {}
            _check_tensors(moments, like, f"{what}, parameter {index}", mend)
            if not 0 <= moments["step"] < math.inf:
                raise RunError(f"{what}, parameter {index}: its 'step' is no count; {mend}")
