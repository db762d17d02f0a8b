"""What `torch.nn.utils.parametrize.cached` keeps of the parametrized modules of a copy."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def cache_apart(copied: nn.Module) -> None:
    """Let a copied model have places of its own in the cache of `parametrize.cached`.

    A copy has the class of its original, and torch keeps the id of the original there: one would
    get the weights that were computed for the other.
    """
    for module in copied.modules():
        if not parametrize.is_parametrized(module):
            continue
        shared = type(module)
        held: Any = module.parametrizations
        names = [*held]
        own = {key: each for key, each in vars(shared).items() if key not in names}
        for key in ("__dict__", "__weakref__"):
            own.pop(key, None)
        module.__class__ = type(shared.__name__, shared.__bases__, own)
        for name in names:
            parametrize._inject_property(module, name)
            parametrize._cache.pop((id(module), name), None)  # of one that had this id before
