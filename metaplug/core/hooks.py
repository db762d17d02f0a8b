"""The hooks of a copied model: where they are methods of its modules, they become the copy's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
_CALLED = (
    *("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs"),
    "_forward_hooks_always_called",
)
_Held = dict[int, Any]
"""Hooks, or what is known of them, by their handles' ids."""


class CopiedHooks:
    """The hooks of a copy of a model, which are to be those that the model has.

    A method of a module of the model becomes that of the module's copy, or it would read and write
    the model itself. All else is shared.

    Args:
        model, copied: of the same modules, in the same order.
    """

    def __init__(self, model: nn.Module, copied: nn.Module) -> None:
        pairs = list(zip(model.modules(), copied.modules(), strict=True))
        self._copies = {id(own): copy for own, copy in pairs}
        for own, copy in pairs:
            for kind in _HOOKS:
                if held := vars(own).get(kind):
                    self._give(held, vars(copy)[kind])
        self._followed: list[tuple[_Held, _Held]] = [
            (vars(own)[kind], vars(copy)[kind]) for own, copy in pairs for kind in _CALLED
        ]

    def follow(self) -> None:
        """Give the copy the hooks that passes call and that the model has now."""
        for own, copied in self._followed:
            if (own or copied) and [*own] != [*copied]:
                self._give(own, copied)

    def _give(self, own: _Held, copied: _Held) -> None:
        copied.clear()
        copied.update({key: _rebound(hook, self._copies) for key, hook in own.items()})


def _rebound(value: Any, copies: Mapping[int, nn.Module]) -> Any:
    """Return a hook, or what it is given, with copies in the place of the model's modules."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, MethodType) and id(value.__self__) in copies:
        return MethodType(value.__func__, copies[id(value.__self__)])
    if type(value) is partial:
        given = [_rebound(each, copies) for each in value.args]
        named = {name: _rebound(each, copies) for name, each in value.keywords.items()}
        return partial(_rebound(value.func, copies), *given, **named)
    return value
