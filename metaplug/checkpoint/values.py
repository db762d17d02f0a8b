"""What a checkpoint may hold: plain values and tensors, walked within bounds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
"""Of the tensors that a file may hold, by the name that torch gives them there."""
MOST_VALUES, MOST_DEPTH, MOST_OVERLAP = 500_000, 50, 8
"""In a state; of these in one another; and how often a tensor's bytes may be used, on average."""


class ArchiveError(Exception):
    """Why a file is refused, in words that go on from "is not a whole checkpoint"."""


class TooMuchError(ArchiveError):
    """It is refused for its length alone."""


class Storage(NamedTuple):
    """Where the bytes of tensors lie: the file's member `key`, with `elements` of `dtype`."""

    dtype: torch.dtype
    key: str
    elements: int

    @property
    def nbytes(self) -> int:
        """As many as the member must have."""
        return self.elements * self.dtype.itemsize


class Stored(NamedTuple):
    """A tensor as the file describes it: its storage, and how it lies within that, in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def check_overlap(claimed: int, stored: int) -> None:
    """Refuse tensors that use the same bytes too often, so that a copy of them would be much larger than their file."""
    if claimed > MOST_OVERLAP * stored:
        raise ArchiveError(
            f"its tensors claim more than {MOST_OVERLAP} times the bytes that are there"
        )


def walked(value: Any) -> Iterator[Any]:
    """Every part of a value that is not itself made of parts.

    Raises:
        ArchiveError: there are too many, too deep, or of other types than a file may hold.
    """
    seen, waiting = 0, [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        parts: list[Any] = []
        if type(part) in (dict, OrderedDict):
            if wrong := [key for key in dict.keys(part) if type(key) not in (str, int)]:
                raise ArchiveError(f"a key in it is a {type(wrong[0]).__name__}")
            parts = [*dict.keys(part), *dict.values(part), *filter(None, [_metadata(part)])]
        elif type(part) in (list, tuple):
            parts = list(part)
        elif type(part) in _LEAVES or isinstance(part, Tensor):
            yield part
        else:
            raise ArchiveError(f"it holds a {type(part).__name__}")
        seen += len(parts)
        if seen > MOST_VALUES or depth > MOST_DEPTH:
            raise TooMuchError(
                f"it holds more than {MOST_VALUES} values, or more than {MOST_DEPTH} in one another"
            )
        waiting += [(inner, depth + 1) for inner in parts]


_LEAVES = (str, int, float, bool, type(None), Stored)


def changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """A value that `walked` passes, with `change` of every part that is not itself made of parts, but for keys."""
    if type(value) in (dict, OrderedDict):
        made: dict[Any, Any] = type(value)(
            (key, changed(inner, change)) for key, inner in dict.items(value)
        )
        if metadata := _metadata(value):
            if not isinstance(metadata, dict) or not all(
                isinstance(of_module, dict) for of_module in metadata.values()
            ):
                raise ArchiveError("the versions of modules in it have another form")
            setattr(made, "_metadata", changed(metadata, change))  # noqa: B010  # the versions of a model's modules, no field of a dict
        return made
    if type(value) in (list, tuple):
        return type(value)(changed(inner, change) for inner in value)
    return change(value)


def _metadata(value: dict[Any, Any]) -> Any:
    return vars(value).get("_metadata") if isinstance(value, OrderedDict) else None
