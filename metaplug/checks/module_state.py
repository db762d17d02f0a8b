"""What forward leaves on the modules of a model, and what it reads of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from unittest import mock

import numpy as np
import torch.utils.checkpoint
from torch import Tensor, nn

from metaplug.core.functional_model import PLAIN, Place, version


def snapshot(model: nn.Module) -> dict[Place, Any]:
    """What stands at every attribute: numbers and texts by value, the rest by identity."""
    found: dict[Place, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, PLAIN):
                found[path, name] = value if value == value else "NaN"  # noqa: PLR0124
            elif isinstance(value, list | tuple | set | dict) and name not in _TORCHS_OWN:
                found[path, name] = (id(value), *map(id, value), *_values_of(value))
            elif name not in _TORCHS_OWN:
                found[path, name] = Held(id(value), _contents(value))
    return {place: value for place, value in found.items() if place[1] != "training"}


@dataclass(frozen=True)
class Held:
    """A value that is no container: which one it is, and what it holds now."""

    place: int
    contents: Any

    def same_place(self, before: object) -> bool:
        return isinstance(before, Held) and before.place == self.place


def _contents(value: Any) -> Any:
    """What may be written within a value: an array's numbers, a tensor's version, plain fields."""
    if isinstance(value, np.ndarray):
        return hash(value.tobytes())
    if isinstance(value, Tensor):
        return version(value)
    if isinstance(value, nn.Module | type | FunctionType):
        return None
    fields = getattr(value, "__dict__", {}).items()
    return [(key, each) for key, each in fields if isinstance(each, PLAIN) and each == each]  # noqa: PLR0124


def _values_of(value: Any) -> list[int]:
    return [*map(id, value.values())] if isinstance(value, dict) else []


_TORCHS_OWN = frozenset(vars(nn.Module())) | {"_flat_weights"}


class Tally:
    """A number that can be added to, and that does not show what it is."""

    def __add__(self, other: object) -> Tally:
        return Tally() if isinstance(other, int | float) else NotImplemented

    __radd__ = __sub__ = __add__

    def _refuse(self, *_: object) -> Any:
        raise TypeError("a number that is only counted is not to be read")

    __bool__ = __eq__ = __ne__ = __hash__ = __repr__ = __format__ = _refuse


@contextmanager
def noting_checkpoints() -> Iterator[list[str]]:
    """Inside, every use of torch's activation checkpointing is noted."""
    noted: list[str] = []
    module: Any = torch.utils.checkpoint
    reentrant = module.CheckpointFunction

    def noting(real: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            noted.append(real.__name__)
            return real(*args, **kwargs)

        return called

    class Noted:
        apply = staticmethod(noting(reentrant.apply))

    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(module, "CheckpointFunction", Noted))
        for name in _NON_REENTRANT:
            if hasattr(module, name):
                replaced = noting(getattr(module, name))
                patched.enter_context(mock.patch.object(module, name, replaced))
        yield noted


_NON_REENTRANT = (
    "_checkpoint_without_reentrant_generator_impl",  # of newer versions of torch
    "_checkpoint_without_reentrant_generator",
)
