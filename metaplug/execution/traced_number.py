"""A whole number of the run, such as the meta-iteration, as an input of a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only


class TracedNumber:
    """A number that is another one at the next step: arithmetic with it gives tensors of shape ().

    What Python would decide by it, such as `if`, `range` or `math.sqrt`, is refused.

    Args:
        shown: the number in texts.
        value: (), in the dtype of the losses, so that what is computed with it is in that too.

    Example:
        >>> 2 / (1 + TracedNumber(3, torch.tensor(3.0)))
        tensor(0.5000)
    """

    def __init__(self, shown: int, value: Tensor) -> None:
        self.shown, self.value = shown, value

    def __repr__(self) -> str:
        return repr(self.shown)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, lambda each: each.value, (args, kwargs or {}))
        return func(*args, **kwargs)


def _refused(self: TracedNumber, *_: Any) -> Any:
    raise TypeError(
        "it computes with the meta-iteration outside torch, or decides by it, which a compiled or "
        "captured step would freeze at its first value: use plain arithmetic, torch's functions "
        "and torch.where"
    )


def _computed(name: str) -> Callable[..., Any]:
    operator = getattr(Tensor, f"__{name}__")

    def compute(self: TracedNumber, *others: Any) -> Any:
        others = tree_map_only(TracedNumber, lambda each: each.value, others)
        return operator(self.value, *others)

    return compute


_COMPUTED = """
    add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow eq ne lt le gt
    ge neg abs
"""
_REFUSED = """
    divmod rdivmod matmul rmatmul and rand or ror xor rxor lshift rlshift rshift rrshift pos
    int float index bool hash round trunc floor ceil
"""
for _name in _COMPUTED.split():
    setattr(TracedNumber, f"__{_name}__", _computed(_name))
for _name in _REFUSED.split():
    setattr(TracedNumber, f"__{_name}__", _refused)
