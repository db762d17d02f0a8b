"""Checks of what a plugin returns, one for each hook that has an answer, made after every link.

A check gives None, or the fault in words that follow the plugin's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import did_you_mean, quoted


def form(tensor: Tensor) -> str:
    """Describe a tensor in errors.

    >>> form(torch.ones(2, 3))
    'shape (2, 3), torch.float32 on cpu'
    """
    return f"shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"


def _check_tensor(before: Any, after: Any, _: Mapping[str, Any]) -> str | None:
    if not isinstance(after, Tensor):
        return f"returned {type(after).__name__}, not a tensor"
    if (after.shape, after.dtype, after.device) != (before.shape, before.dtype, before.device):
        return f"returned {form(after)}; it was given {form(before)}, which it must keep"
    return None


def _check_names(before: Mapping[str, Tensor], after: Any) -> str | None:
    if not isinstance(after, Mapping):
        return f"returned {type(after).__name__}, not a mapping from names to tensors"
    if after.keys() == before.keys():
        return None
    missing = quoted(name for name in before if name not in after)
    extra = quoted(name for name in after if name not in before)
    return f"returned other names than it was given: missing {missing}, not known {extra}"


def _check_mapping(before: Any, after: Any, arguments: Mapping[str, Any]) -> str | None:
    if fault := _check_names(before, after):
        return fault
    for name, tensor in after.items():
        if tensor is not before[name] and (fault := _check_tensor(before[name], tensor, arguments)):
            return f"{fault} (for '{name}')"
    return None


def _check_learning_rates(before: Any, after: Any, arguments: Mapping[str, Any]) -> str | None:
    if fault := _check_names(before, after):
        return fault
    for name, rate in after.items():
        target = arguments["step"].parameters[name]
        is_tensor, wanted = isinstance(rate, Tensor), (target.dtype, target.device)
        if not is_tensor or (rate.dtype, rate.device) != wanted:
            given = form(rate) if is_tensor else type(rate).__name__
            return f"returned {given} for '{name}', not a tensor of {wanted[0]} on {wanted[1]}"
        if not _broadcasts(rate.shape, target.shape):
            shapes = f"{tuple(rate.shape)} for '{name}'", f"(tasks, *shape) = {tuple(target.shape)}"
            return f"returned shape {shapes[0]}, which does not broadcast to {shapes[1]}"
    return None


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(own in (1, other) for own, other in pairs)


def _check_subset(before: Any, after: Any, _: Mapping[str, Any]) -> str | None:
    if isinstance(after, str) or not isinstance(after, Collection):
        return f"returned {after!r}, not a tuple of names"
    if wrong := [name for name in after if name not in before]:
        hint = did_you_mean(wrong[0], before)
        return f"selects {quoted(wrong)}, not among what it was given: {hint}"
    return None


def _check_batch(before: Any, after: Any, _: Mapping[str, Any]) -> str | None:
    """Let tasks be more or fewer, and integer labels become probabilities of the inputs' dtype."""
    if not isinstance(after, TaskBatch):
        return f"returned {type(after).__name__}, not a TaskBatch"
    if before.sizes is not None and after.sizes is None:
        return (
            "returned a batch without the sizes of its tasks, so padding would count: make it by "
            "dataclasses.replace(batch, ...), or give TaskBatch(..., sizes=...)"
        )
    old_tensors, new_tensors = before.named_tensors(), after.named_tensors()
    if fault := _check_names(old_tensors, new_tensors):
        return fault
    inputs = [each.dtype for name, each in old_tensors.items() if not name.endswith("_y")]
    for name, old in old_tensors.items():
        new = new_tensors[name]
        softened = name.endswith("_y") and not old.is_floating_point() and new.is_floating_point()
        floating = next((dtype for dtype in inputs if dtype.is_floating_point), new.dtype)
        dtype = floating if softened else old.dtype
        if (new.dtype, new.device) != (dtype, old.device):
            given, wanted = f"{new.dtype} on {new.device}", f"{dtype} on {old.device}"
            return f"returned a batch whose {name} is {given}; it must be {wanted}"
    return None


def _check_factor(before: Any, after: Any, _: Mapping[str, Any]) -> str | None:
    fits = isinstance(after, int | float) and math.isfinite(after) and after >= 0
    return None if fits else f"returned {after!r}, not a finite factor of at least 0"


def _check_order(before: Any, after: Any, _: Mapping[str, Any]) -> str | None:
    fits = after in (0, 1, 2) and not isinstance(after, bool)
    return None if fits else f"answered {after!r}: the derivative order is 0, 1 or 2"


def _check_task_parameters(plugin: Any, after: Any, arguments: Mapping[str, Any]) -> str | None:
    """Of tensors by name; a parameter stands under the name by which it is meta-learned."""
    context, own = arguments["context"], dict(plugin.named_parameters())
    if not isinstance(after, Mapping):
        return f"answered {type(after).__name__}, not a mapping from names to tensors"
    for name, start in after.items():
        where = f"answered '{name}'"
        if not isinstance(name, str) or not isinstance(start, Tensor):
            return f"answered {name!r}: {type(start).__name__}, not a tensor by name"
        if (start.dtype, start.device) != (context.dtype, context.device):
            wanted = f"{context.dtype} on {context.device}"
            return f"{where} of {form(start)}; make it {wanted}, by context.dtype and device"
        if f"{plugin.name}.{name}" in context.shapes:
            return f"{where}, but '{plugin.name}.{name}' is a parameter of the model: rename one"
        is_parameter = isinstance(start, nn.Parameter)
        if is_parameter and start is not own.get(name):
            known = next((key for key, each in own.items() if each is start), None)
            advice = f"call it '{known}'" if known else "register it with the plugin in setup"
            return f"{where}, a parameter that the plugin does not have by this name: {advice}"
        if start.requires_grad and not is_parameter:
            return f"{where}, which requires a gradient but is no nn.Parameter: nothing learns it"
    return None


def _check_updated(before: Any, after: Any, arguments: Mapping[str, Any]) -> str | None:
    return _check_mapping(arguments["parameters"], after, arguments)


def _check_weights(before: Any, after: Any, arguments: Mapping[str, Any]) -> str | None:
    steps, fits = arguments["inner_steps"], isinstance(after, Sequence)
    fits = fits and all(isinstance(each, int | float) and math.isfinite(each) for each in after)
    if fits and len(after) == steps and any(after):
        return None
    wanted = f"give {steps} finite weights, one for each inner step, not all of them 0"
    return f"answered {after!r}: {wanted}"


def _check_meta_gradients(before: Any, after: Any, arguments: Mapping[str, Any]) -> str | None:
    known, learned = arguments["meta_parameters"], arguments["learned"]
    if not isinstance(after, Mapping):
        return f"answered {type(after).__name__}, not a mapping from names to tensors"
    wrong = [name for name in after if name not in known]
    left_out = [name for name in learned if name not in after]
    if wrong:
        return (
            f"answered names that are not meta-learned ({quoted(wrong)}): "
            "answer by the names of MetaLearner.meta_gradients"
        )
    if left_out:
        return (
            f"left out a plugin's parameters ({quoted(left_out)}), which would then never learn: "
            "answer for them too or, where nothing leads to them, leave their plugin out"
        )
    for name, gradient in after.items():
        if fault := _check_tensor(known[name], gradient, arguments):
            return f"{fault.replace('it was given', 'the parameter is')} (for '{name}')"
    return None


def _check_figures(before: Any, after: Any, _: Mapping[str, Any]) -> str | None:
    if isinstance(after, Mapping) and all(isinstance(each, int | float) for each in after.values()):
        return None
    return f"returned {after!r}, not numbers by name"


CHECKS: dict[str, Callable[[Any, Any, Mapping[str, Any]], str | None]] = {
    "select_adapted": _check_subset,
    "task_parameters": _check_task_parameters,
    "transform_tasks": _check_batch,
    "initialize_parameters": _check_mapping,
    "transform_parameters": _check_mapping,
    "transform_inner_losses": _check_tensor,
    "derivative_order": _check_order,
    "transform_gradients": _check_mapping,
    "transform_learning_rates": _check_learning_rates,
    "update_parameters": _check_updated,
    "outer_step_weights": _check_weights,
    "transform_outer_losses": _check_tensor,
    "compute_meta_gradients": _check_meta_gradients,
    "transform_meta_gradients": _check_mapping,
    "scale_meta_learning_rate": _check_factor,
    "end_meta_step": _check_figures,
}
"""By hook, its check: (value before, value after, the hook's other arguments) → a fault or None."""
