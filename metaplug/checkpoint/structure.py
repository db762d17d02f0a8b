"""The pickle in the zip that `torch.save` writes, which describes tensors beside plain values: read so that nothing in it is called."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaplug.checkpoint.values import DTYPES, ArchiveError, Storage, Stored, TooMuchError, walked

PROTOCOL, MOST_STRUCTURE = 2, 16 * 2**20
"""Of the pickle: others have codes that are refused; and the bytes that it may have."""
_OPCODES = {
    *(
        "PROTO",
        "STOP",
        "MARK",
        "GLOBAL",
        "REDUCE",
        "BUILD",
        "BINPERSID",
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
    ),
    *(
        "EMPTY_DICT",
        "SETITEM",
        "SETITEMS",
        "EMPTY_LIST",
        "APPEND",
        "APPENDS",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
    ),
    *(
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "BINUNICODE",
    ),
}
"""Of a pickle, those that torch.save uses for a state."""


class Description(NamedTuple):
    """A value with Stored in place of tensors, the bytes of all of these, and the storages that they lie in, by key."""

    value: Any
    claimed: int
    storages: dict[str, Storage]


def parse(structure: bytes) -> Description:
    """What a pickle describes.

    Raises:
        ArchiveError: it does more than describe tensors and plain values, or too many of them.
    """
    check_length(len(structure))
    _check_opcodes(structure)
    value = _Unpickler(io.BytesIO(structure)).load()
    claimed, storages = 0, dict[str, Storage]()
    for part in walked(value):
        if isinstance(part, Stored):
            claimed += math.prod(part.size) * part.storage.dtype.itemsize
            if (
                storages.setdefault(part.storage.key, part.storage).elements
                != part.storage.elements
            ):
                raise ArchiveError("two tensors differ about what they share")
    return Description(value, claimed, storages)


def describe(value: Any) -> bytes:
    """The pickle that `torch.save` writes of a value, but for the keys of storages."""
    file = io.BytesIO()
    _Pickler(file, PROTOCOL).dump(value)
    return file.getvalue()


def check_length(count: int) -> None:
    """Refuse a pickle of too many bytes, before it is read."""
    if count > MOST_STRUCTURE:
        raise TooMuchError(f"it describes its tensors in more than {MOST_STRUCTURE} bytes")


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Storage):
            return None
        name = next(name for name, dtype in DTYPES.items() if dtype is value.dtype)
        return "storage", getattr(torch, name), value.key, "cpu", value.elements

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        bytes_of = value.untyped_storage()
        storage = Storage(
            value.dtype,
            f"{bytes_of.data_ptr()}, {bytes_of.nbytes()}",
            bytes_of.nbytes() // value.element_size(),
        )
        place = storage, value.storage_offset(), tuple(value.size()), value.stride()
        return torch._utils._rebuild_tensor_v2, (*place, value.requires_grad, OrderedDict())


class _Unpickler(pickle.Unpickler):
    """Knows the names that a state needs and no others; none of them is code of the file's choice."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise ArchiveError(f"it names {module}.{name}, and no code is loaded from it")

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage":
            raise ArchiveError("it refers to something other than tensors")
        if not isinstance(dtype, torch.dtype) or type(key) is not str:
            raise ArchiveError("a tensor in it has no storage")
        if not _are_counts((count,)):
            raise ArchiveError("a tensor in it has no shape")
        return Storage(dtype, key, count)


def _rebuilt(*described: Any) -> Stored:
    """In the place of torch's function: storage, offset, size, stride, whether it requires a gradient, and hooks."""
    *place, requires_grad, hooks = described
    if len(place) != 4 or requires_grad is not False or hooks:
        raise ArchiveError("a tensor in it has more than values")
    storage, offset, size, stride = place
    if not isinstance(storage, Storage):
        raise ArchiveError("a tensor in it has no storage")
    if (
        not (_are_counts((offset,)) and _are_counts(size) and _are_counts(stride))
        or len(size) != len(stride)
        or len(size) > 64
    ):
        raise ArchiveError("a tensor in it has no shape")
    last = (
        offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if math.prod(size)
        else -1
    )
    if last >= storage.elements or offset > storage.elements:
        raise ArchiveError("a tensor in it reaches beyond its bytes")
    return Stored(storage, offset, size, stride)


def _are_counts(numbers: Any) -> bool:
    return type(numbers) is tuple and all(
        type(number) is int and 0 <= number < 2**62 for number in numbers
    )


def _check_opcodes(structure: bytes) -> None:
    """Refuse what makes a pickle machine do more than build values: `torch.save` uses few of its codes, and numbers its memo in order."""
    puts = 0
    for opcode, argument, _ in pickletools.genops(structure):
        if opcode.name not in _OPCODES:
            raise ArchiveError(f"it is described by {opcode.name}, which torch.save does not use")
        if opcode.name.endswith("BINPUT"):
            if argument != puts:
                raise ArchiveError("its description is out of order")
            puts += 1
