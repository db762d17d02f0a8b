"""Hooks of the user's that a copy of the model cannot have are refused."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from metaplug.errors import RequestError

_KINDS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


def check_hooks(model: nn.Module) -> None:
    """Refuse hooks on parameters, and those that hold on to the model, of which tasks run a copy.

    Methods of its modules do not count: those of the copy take their place.

    Raises:
        RequestError: a parameter has hooks, or a function closes over a module of the model; the
            parameter or the place is named.
    """
    for name, parameter in model.named_parameters():
        if hooked(parameter):
            raise RequestError(
                f"the model's parameter '{name}' has a hook on its gradient, which no gradient of "
                "a task's own weights would reach: remove it, and change gradients in a plugin's "
                "transform_gradients, and meta-gradients in its transform_meta_gradients"
            )
    own = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        for kind, text in _KINDS.items():
            for hook in vars(module)[kind].values():
                if _reaches(hook, own, set()):
                    raise RequestError(
                        f"a {text} of the module '{path or 'model'}' is a function that closes "
                        "over the model, and would read and write yours where a copy of it runs: "
                        "make it a method of the module, or override forward"
                    )


def hooked(parameter: nn.Parameter) -> bool:
    """Return whether hooks wait for a parameter's gradient, in place of which tasks have theirs."""
    held = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
    return any(held)


def _reaches(hook: Any, own: Collection[int], seen: set[int]) -> bool:
    """Return whether a function that is no method of the model holds one of its modules."""
    if type(hook) is partial:  # the modules that it gives are those of the copy
        return _reaches(hook.func, own, seen)
    if not isinstance(hook, FunctionType) or id(hook) in seen:
        return False
    seen.add(id(hook))
    return any(_holds(value, own) or _reaches(value, own, seen) for value in _values_within(hook))


def _holds(value: Any, own: Collection[int]) -> bool:
    if isinstance(value, MethodType):
        value = value.__self__
    if type(value) is partial:
        return any(_holds(each, own) for each in (value.func, *value.args))
    return isinstance(value, nn.Module) and any(id(each) in own for each in value.modules())


def _values_within(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it has no value yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
