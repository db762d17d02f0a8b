"""Tensors that torch.vmap stacks, seen through it: the tensor of all tasks behind that of one.

torch has no public way to these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch._C._functorch import (
    _add_batch_dim,
    current_level,
    get_unwrapped,
    is_batchedtensor,
    maybe_get_bdim,
    maybe_get_level,
    pop_dynamic_layer_stack,
    push_dynamic_layer_stack,
)


@contextmanager
def outside_vmap() -> Iterator[None]:
    """Inside, a Function sees stacked tensors as they are, without what torch.func does around it.

    That takes longer than a small layer.
    """
    layer = pop_dynamic_layer_stack()
    try:
        yield
    finally:
        push_dynamic_layer_stack(layer)


def as_stacked(value: Any) -> tuple[Any, int | None]:
    """Return a value as it is outside vmap, and its axis of tasks; None where it has none."""
    if is_stacked(value):
        return get_unwrapped(value), maybe_get_bdim(value)
    return value, None


def from_stacked(value: Any, axis: int | None) -> Any:
    """Return a value as vmap sees it, from what `as_stacked` gave in another call of vmap."""
    return value if axis is None else _add_batch_dim(value, axis, current_level())


def is_stacked(value: Any) -> bool:
    """Whether the innermost vmap sees this tensor as one task's of many."""
    if not isinstance(value, Tensor) or not is_batchedtensor(value):
        return False
    return bool(maybe_get_level(value) == current_level())


def stack_of(x: Tensor) -> Tensor:
    """(tasks, ...) from one task's as vmap sees it."""
    stacked: Tensor = get_unwrapped(x)
    place = maybe_get_bdim(x)
    return stacked.movedim(place, 0) if place else stacked


def fold(x: Tensor) -> tuple[Tensor, int]:
    """(n, tasks · channels, ...) from one task's (n, channels, ...), and the number of tasks."""
    folded: Tensor = get_unwrapped(x).movedim(maybe_get_bdim(x), 1)
    return folded.flatten(1, 2), folded.shape[1]


def unfold(folded: Tensor, tasks: int) -> Any:
    """One task's as vmap sees it, from (n, tasks · channels, ...)."""
    return _add_batch_dim(folded.unflatten(1, (tasks, -1)), 1, current_level())
