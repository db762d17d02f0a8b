"""Watches what goes into a plugin's hooks, and the plugin, before and after every call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from metaplug.contract import hookspecs
from metaplug.contract.inner_step import InnerStep
from metaplug.contract.link import Link
from metaplug.contract.outcome import Outcome
from metaplug.contract.plugin import Plugin
from metaplug.contract.schedule import iteration_text, step_text
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.values import Context
from metaplug.learner import MetaLearner

_FIELDS: dict[type, tuple[str, ...]] = {
    TaskBatch: ("support_x", "support_y", "query_x", "query_y"),
    InnerStep: (
        "parameters",
        "initial_parameters",
        "support_losses",
        "support_predictions",
        "support_inputs",
        "support_targets",
        "statistics",
    ),
    Outcome: (
        "batch",
        "initial_parameters",
        "adapted_parameters",
        "support_losses",
        "query_losses",
        "query_predictions",
        "query_parameters",
        "model_parameters",
        "statistics",
    ),
    Context: ("parameters",),
}
"""The fields of these values that are looked at."""

_SHOWN = {
    "support_losses": "losses",
    "support_predictions": "predictions",
    "support_inputs": "inputs",
    "support_targets": "targets",
}
"""What a step calls these fields."""

_REFUSALS = (
    "mappingproxy",
    "in-place operation",
    "in-place arithmetic",
    "written-to tensor",
    "cannot assign to field",
)
"""What Python and torch say when something is written that cannot be."""

_WRITERS = ("setup", "commit")
"""The hooks in which a plugin may change its own state."""


class Watch:
    """Watches one plugin of a learner from now on.

    Attributes:
        writes: what it wrote into that it was given, or that belongs to the model, in words.
        states: what of its own state changed in a hook that may not change it.
    """

    def __init__(self, learner: MetaLearner, plugin: Plugin) -> None:
        self.plugin, self.model = plugin, learner.model
        self.writes: list[str] = []
        self.states: list[str] = []
        learner.chain.wrap(self._around)

    def _around(self, link: Link) -> Link:
        if link.plugin is not self.plugin:
            return link
        known = inspect.signature(getattr(hookspecs, link.hook)).parameters
        more = [name for name in ("step", "iteration") if name in known]
        # The step and iteration are asked for beside its own arguments, to say when.
        arguments = tuple(dict.fromkeys((*link.arguments, *more)))

        def call(*values: Any) -> Any:
            given = dict(zip(arguments, values, strict=True))
            when = _when(link.hook, given)
            before, grads, own = self._tensors(given), self._grads(), fingerprint(self.plugin)
            try:
                return link.function(*values[: len(link.arguments)])
            except Exception as error:
                if any(refusal in str(error) for refusal in _REFUSALS):
                    what = f"what it was given ({type(error).__name__}: {error})"
                    self.writes.append(f"{when} tried to write into {what}")
                raise
            finally:
                written = [each[0] for each in before if _changed(*each[1:])]
                written += [path for path, grad in self._grads().items() if grads[path] != grad]
                self.writes += [f"{when} wrote into {path}" for path in written]
                after = fingerprint(self.plugin)
                if link.hook not in _WRITERS:
                    changed = [path for path in own | after if own.get(path) != after.get(path)]
                    self.states += [f"{when} changed {path}" for path in changed]

        return replace(link, function=call, arguments=arguments)

    def _tensors(self, given: Mapping[str, Any]) -> list[tuple[str, Tensor, int, Tensor]]:
        """List every tensor that can be reached, with its version and a copy."""
        reached = [pair for name, value in given.items() for pair in _reach(value, name)]
        for name, parameter in self.model.named_parameters():
            reached.append((f"the model's parameter '{name}'", parameter))
        return [
            (path, tensor, tensor._version, tensor.detach().clone())
            for path, tensor in reached
            if not tensor.is_inference()
        ]

    def _grads(self) -> dict[str, Any]:
        parameters = self.model.named_parameters()
        return {
            f"the .grad of the model's parameter '{name}'": frozen(each.grad)
            for name, each in parameters
        }


def fingerprint(plugin: Plugin) -> dict[str, Any]:
    """Map everything that a plugin remembers, by path, to a copy that compares by value."""
    internals = vars(nn.Module()).keys()
    own = {name: value for name, value in vars(plugin).items() if name not in internals}
    own |= {**dict(plugin.named_parameters()), **dict(plugin.named_buffers())}
    found = {f"self.{name}": frozen(value) for name, value in own.items()}
    for place, values in ((type(plugin).__name__, vars(type(plugin))), *_modules(plugin)):
        for name, value in values.items():
            if not name.startswith("__") and not callable(value):
                found[f"{place}.{name}"] = frozen(value)
    return found


def _modules(plugin: Plugin) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The module that a plugin in the shortest form is: it has no other place for state."""
    if ":" in getattr(plugin, "written_as", ":"):
        return
    for hook in vars(type(plugin)).values():
        if isinstance(hook, staticmethod) and isinstance(function := hook.__func__, FunctionType):
            yield function.__module__, function.__globals__
            return


def _when(hook: str, given: Mapping[str, Any]) -> str:
    step = given.get("step")
    if not isinstance(step, InnerStep):
        return hook + (f" ({iteration_text(given['iteration'])})" if "iteration" in given else "")
    when = step_text(step.meta_iteration, step.index, training=step.training)
    return f"{hook} ({when})"


def _reach(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _reach(each, f"{path}['{name}']")
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _reach(each, f"{path}[{index}]")
    for name in _FIELDS.get(type(value), ()):
        shown = _SHOWN.get(name, name) if isinstance(value, InnerStep) else name
        yield from _reach(getattr(value, name), f"{path}.{shown}")


def _changed(tensor: Tensor, version: int, copy: Tensor) -> bool:
    return tensor._version != version or frozen(tensor) != frozen(copy)


def frozen(value: Any, depth: int = 4) -> Any:
    """Copy to what compares by value: bits of tensors, contents of containers and attributes."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        return tuple(value.shape), str(value.dtype), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(value, torch.Generator):
        return frozen(value.get_state())
    if isinstance(value, str | bytes | int | float | complex | bool | None):
        return value
    if depth == 0:
        return id(value)
    if isinstance(value, Mapping):
        return [(frozen(name, depth - 1), frozen(each, depth - 1)) for name, each in value.items()]
    if isinstance(value, list | tuple):
        return [frozen(each, depth - 1) for each in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if (
        isinstance(value, BaseModel | nn.Module | ModuleType | type)
        or callable(value)
        or not hasattr(value, "__dict__")
    ):
        return id(value)
    return [id(value), frozen(vars(value), depth - 1)]
