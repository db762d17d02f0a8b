"""A whole number of the run, such as the meta-iteration, as an input of a trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

Kind = type[bool] | type[int] | type[float]


class TracedNumber:
    """A number that is another one at the next step.

    Arithmetic with numbers gives such a number, in float64 as Python's own; with a tensor it gives
    one of the dtype that Python's number would give. What Python would decide by it, such as `if`,
    `range`, a text or `math.sqrt`, is refused.

    Args:
        shown: the number in messages.
        value: (), float64.
        kind: of the number that it stands for.

    Example:
        >>> torch.ones(2) * (2 / (1 + TracedNumber(3, torch.tensor(3.0, dtype=torch.float64))))
        tensor([0.5000, 0.5000])
    """

    def __init__(self, shown: int, value: Tensor, kind: Kind = int) -> None:
        self.shown, self.value, self.kind = shown, value, kind

    def __repr__(self) -> str:
        return f"TracedNumber({self.shown})"

    def beside(self, *tensors: Tensor) -> Tensor:
        """The number as a tensor (), in the dtype that results of these have with Python's own."""
        dtypes = [torch.result_type(each, self.kind(1)) for each in tensors]
        return self.value.to(reduce(torch.promote_types, dtypes))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = args, kwargs or {}
        tensors = [each for each in tree_leaves(given) if isinstance(each, Tensor)]
        if not tensors:
            _refused()
        args, kwargs = tree_map_only(cls, lambda each: each.beside(*tensors), given)
        return func(*args, **kwargs)


def _refused(*_: Any) -> Any:
    raise TypeError(
        "it computes with the meta-iteration outside torch, or decides by it, which a compiled or "
        "captured step would freeze at its first value: use plain arithmetic with tensors, torch's "
        "functions and torch.where"
    )


def _computed(name: str) -> Callable[..., Any]:
    operator = getattr(Tensor, f"__{name}__")

    def compute(self: TracedNumber, *others: Any) -> Any:
        if others and isinstance(others[0], Tensor):
            return operator(self.beside(*others), *others)
        if not all(isinstance(each, TracedNumber | Real) for each in others):
            return NotImplemented
        values = tree_map_only(TracedNumber, lambda each: each.value, others)
        value = operator(self.value, *values)
        return TracedNumber(self.shown, value.to(torch.float64), _kind(name, self, *others))

    return compute


def _kind(name: str, *numbers: Any) -> Kind:
    """The kind of what Python's operator gives of numbers."""
    if name in _COMPARED:
        return bool
    kinds = {each.kind if isinstance(each, TracedNumber) else type(each) for each in numbers}
    whole = all(issubclass(kind, Integral) for kind in kinds)
    return int if whole and name not in ("truediv", "rtruediv", "pow", "rpow") else float


_COMPARED = frozenset(["eq", "ne", "lt", "le", "gt", "ge"])
_COMPUTED = """
    add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow neg abs
"""
_REFUSED = """
    divmod rdivmod matmul rmatmul and rand or ror xor rxor lshift rlshift rshift rrshift pos invert
    int float complex index bool hash round trunc floor ceil str format
"""
for _name in (*_COMPUTED.split(), *_COMPARED):
    setattr(TracedNumber, f"__{_name}__", _computed(_name))
for _name in _REFUSED.split():
    setattr(TracedNumber, f"__{_name}__", _refused)
