"""What a model takes: one tensor, or several by name or place, all with the same leading axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

Inputs: TypeAlias = Any
"""A tensor; a mapping of tensors by name, given to the model as keyword arguments; or a tuple of
tensors, given as positional arguments."""


def tensors_of(x: Inputs) -> list[Tensor]:
    """Return the tensors, in order.

    >>> len(tensors_of({"input_ids": Tensor(), "attention_mask": Tensor()}))
    2
    """
    return [*named_tensors("", x).values()]


def named_tensors(name: str, x: Inputs) -> dict[str, Tensor]:
    """Return the tensors by how a user would write them.

    >>> list(named_tensors("support_x", (Tensor(), Tensor())))
    ['support_x[0]', 'support_x[1]']
    """
    if isinstance(x, Mapping):
        return {f"{name}['{key}']": each for key, each in x.items()}
    if isinstance(x, tuple):
        return {f"{name}[{place}]": each for place, each in enumerate(x)}
    return {name: x}


def map_inputs(function: Callable[[Tensor], Tensor], x: Inputs) -> Inputs:
    """Return what `function` makes of each tensor, in the same form.

    >>> map_inputs(len, ([1, 2], [3]))
    (2, 1)
    """
    if isinstance(x, Mapping):
        return {key: function(each) for key, each in x.items()}
    if isinstance(x, tuple):
        return tuple(function(each) for each in x)
    return function(x)


def with_tensors(x: Inputs, tensors: list[Tensor]) -> Inputs:
    """Return these tensors in the form of `x`."""
    given = iter(tensors)
    return map_inputs(lambda _: next(given), x)


def count_of(x: Inputs) -> int:
    """Return the length of the leading axis."""
    return len(tensors_of(x)[0])


def device_of(x: Inputs) -> Any:
    """Return the device of the tensors."""
    return tensors_of(x)[0].device
