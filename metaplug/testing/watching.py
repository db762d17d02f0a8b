"""Looks at what goes into a plugin's hooks, and at the plugin, before and after every call."""

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
from metaplug.contract.chain import Link
from metaplug.contract.plugin import Plugin
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.values import Context, InnerStep, Outcome
from metaplug.learner import MetaLearner

_FIELDS: dict[type, tuple[str, ...]] = {
    TaskBatch: ("support_x", "support_y", "query_x", "query_y"),
    InnerStep: ("parameters", "initial_parameters", "support_losses", "support_predictions"),
    Outcome: (
        "batch",
        "initial_parameters",
        "adapted_parameters",
        "support_losses",
        "query_losses",
        "query_predictions",
        "query_parameters",
    ),
    Context: ("parameters",),
}
"""What of these values is looked at."""

_SHOWN = {"support_losses": "losses", "support_predictions": "predictions"}
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
        arguments = (
            *link.arguments,
            *(
                name
                for name in ("step", "iteration")
                if name in known and name not in link.arguments
            ),
        )

        def call(*values: Any) -> Any:
            given = dict(zip(arguments, values, strict=True))
            when = _when(link.hook, given)
            before, grads, own = self._tensors(given), self._grads(), fingerprint(self.plugin)
            try:
                result = link.function(*values[: len(link.arguments)])
            except Exception as error:
                if any(refusal in str(error) for refusal in _REFUSALS):
                    self.writes.append(
                        f"{when} tried to write into what it was given ({type(error).__name__}: {error})"
                    )
                raise
            finally:
                self.writes += [
                    f"{when} wrote into {path}"
                    for path, tensor, version, copy in before
                    if _changed(tensor, version, copy)
                ]
                self.writes += [
                    f"{when} wrote into {path}"
                    for path, grad in self._grads().items()
                    if grads[path] != grad
                ]
                after = fingerprint(self.plugin)
                if link.hook not in _WRITERS:
                    self.states += [
                        f"{when} changed {path}"
                        for path in {**own, **after}
                        if own.get(path) != after.get(path)
                    ]
            return result

        return replace(link, function=call, arguments=arguments)

    def _tensors(self, given: Mapping[str, Any]) -> list[tuple[str, Tensor, int, Tensor]]:
        """Every tensor that can be reached, with its version and a copy."""
        reached = [pair for name, value in given.items() for pair in _reach(value, name)]
        reached += [
            (f"the model's parameter '{name}'", parameter)
            for name, parameter in self.model.named_parameters()
        ]
        return [
            (path, tensor, tensor._version, tensor.detach().clone())
            for path, tensor in reached
            if not tensor.is_inference()
        ]

    def _grads(self) -> dict[str, Any]:
        return {
            f"the .grad of the model's parameter '{name}'": _frozen(each.grad)
            for name, each in self.model.named_parameters()
        }


def fingerprint(plugin: Plugin) -> dict[str, Any]:
    """Everything that a plugin remembers, by path: what of it compares unequal has changed."""
    internals = vars(nn.Module()).keys()
    found = {
        f"self.{name}": _frozen(value)
        for name, value in vars(plugin).items()
        if name not in internals
    }
    found |= {
        f"self.{name}": _frozen(value)
        for name, value in (*plugin.named_parameters(), *plugin.named_buffers())
    }
    for place, values in ((type(plugin).__name__, vars(type(plugin))), *_modules(plugin)):
        own = {
            name: value
            for name, value in values.items()
            if not name.startswith("__") and not callable(value)
        }
        found |= {f"{place}.{name}": _frozen(value) for name, value in own.items()}
    return found


def _modules(plugin: Plugin) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What the module remembers that a plugin in the shortest form is: it has no other place."""
    if ":" in getattr(plugin, "written_as", ":"):
        return
    for hook in vars(type(plugin)).values():
        if isinstance(hook, staticmethod) and isinstance(function := hook.__func__, FunctionType):
            yield function.__module__, function.__globals__
            return


def _when(hook: str, given: Mapping[str, Any]) -> str:
    step = given.get("step")
    if not isinstance(step, InnerStep):
        return hook + (f" (iteration {given['iteration']})" if "iteration" in given else "")
    return f"{hook} (iteration {step.meta_iteration}, inner step {step.index}{'' if step.training else ', at evaluation'})"


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
    return tensor._version != version or _frozen(tensor) != _frozen(copy)


def _frozen(value: Any, depth: int = 4) -> Any:
    """A copy that compares by value: of tensors the bits, of containers what they hold, of other objects what their attributes hold."""
    if isinstance(value, Tensor):
        return (
            tuple(value.shape),
            str(value.dtype),
            value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, torch.Generator):
        return _frozen(value.get_state())
    if isinstance(value, str | bytes | int | float | complex | bool | None):
        return value
    if depth == 0:
        return id(value)
    if isinstance(value, Mapping):
        return [
            (_frozen(name, depth - 1), _frozen(each, depth - 1)) for name, each in value.items()
        ]
    if isinstance(value, list | tuple):
        return [_frozen(each, depth - 1) for each in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if (
        isinstance(value, BaseModel | nn.Module | ModuleType | type)
        or callable(value)
        or not hasattr(value, "__dict__")
    ):
        return id(value)
    return [id(value), _frozen(vars(value), depth - 1)]
