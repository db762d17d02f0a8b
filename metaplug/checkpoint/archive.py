"""Tensors and plain values in the zip that `torch.save` writes, read so that nothing is executed and every byte is verified.

`torch.load` passes over the checksums of tensors, and knows formats and constructors that no checkpoint of metaplug's needs. Here the bytes
that were checked are the bytes that are used: one reader, which takes memory for what the file holds and no more.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import stat
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaplug.runtime.free_memory import available, size_text

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
MOST_STRUCTURE, MOST_VALUES, MOST_DEPTH, MOST_OVERLAP = 16 * 2**20, 500_000, 50, 8
"""Bytes of what describes the tensors; values in that; of these in one another; and how often a tensor's bytes may be used, on average."""
_OPCODES = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
}
"""Of a pickle, those that torch.save uses for a state."""


class ArchiveError(Exception):
    """Why a file is refused, in words that go on from "is not a whole checkpoint"."""


class _Stored(NamedTuple):
    """A tensor as the file describes it: its storage, and how it lies in that."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


class _Storage(NamedTuple):
    dtype: Any
    key: Any
    count: Any


def load(path: Path) -> Any:
    """What `torch.save` wrote there: dicts, lists, tuples, strings, numbers, None and tensors, on the CPU.

    Raises:
        ArchiveError: the file is none of torch's, damaged, or holds something else.
        OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe or device may have no end
        raise ArchiveError("it is no regular file")
    free = available(torch.device("cpu"))
    if free is not None and status.st_size > free:
        raise ArchiveError(f"it has {size_text(status.st_size)}, more than the {size_text(free)} of memory that are free")
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ArchiveError("it is no zip, as which torch saves")
        with zipfile.ZipFile(file) as archive:
            return _Reader(archive, status.st_size).read()


def check(value: Any) -> None:
    """Refuse to write what `load` would not read.

    Raises:
        ArchiveError: it holds something other than dicts, lists, tuples, strings, numbers, None and dense tensors, or too much of it.
    """
    claimed, stored = 0, dict[int, int]()
    for part in _walked(value):
        if isinstance(part, Tensor):
            if part.dtype not in DTYPES.values() or part.layout is not torch.strided or part.is_quantized:
                raise ArchiveError(f"it holds a tensor of {part.dtype}, {part.layout}")
            claimed += part.numel() * part.element_size()
            stored[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    _check_overlap(claimed, sum(stored.values()))


class _Reader:
    """One archive of `size` bytes that is being read."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive = archive
        self._members = {member.filename: member for member in archive.infolist()}
        if len(self._members) != len(archive.infolist()):
            raise ArchiveError("a name stands twice in it")
        if packed := [name for name, member in self._members.items() if member.compress_type or member.flag_bits & 1]:
            raise ArchiveError(f"'{packed[0]}' in it is compressed, which torch never does")
        if sum(member.file_size for member in self._members.values()) > size:
            raise ArchiveError("its members lie over each other")
        self._folder = next((name.rpartition("/")[0] for name in self._members if name.endswith("/data.pkl")), "")
        for name in self._members:
            if not name.startswith(f"{self._folder}/") or name.startswith((f"{self._folder}/code/", f"{self._folder}/constants.pkl")):
                raise ArchiveError(f"'{name}' in it is nothing that torch.save writes")
        self._storages: dict[str, Tensor] = {}

    def read(self) -> Any:
        if bytes(self._bytes("byteorder")).decode("ascii", "replace") != sys.byteorder:
            raise ArchiveError("it is from a machine of another byte order")
        for name, member in self._members.items():  # what is not a tensor's is not read below, and would go unverified
            if "/data/" not in name and member.file_size <= MOST_STRUCTURE:
                self._bytes(name.removeprefix(f"{self._folder}/"))
        structure = bytes(self._bytes("data.pkl"))
        _check_opcodes(structure)
        value = _Unpickler(io.BytesIO(structure)).load()
        claimed, needed = 0, dict[str, int]()
        for part in _walked(value):
            if isinstance(part, _Stored):
                claimed += _check_stored(part) * part.storage.dtype.itemsize
                if needed.setdefault(part.storage.key, part.storage.count) != part.storage.count:
                    raise ArchiveError("two tensors differ about what they share")
        tensors = {name.rpartition("/")[2] for name in self._members if name.startswith(f"{self._folder}/data/")}
        if tensors != needed.keys():
            raise ArchiveError("its tensors are not those that it describes")
        _check_overlap(claimed, sum(self._member(f"data/{key}").file_size for key in needed))
        return self._plain(value)

    def _member(self, name: str) -> zipfile.ZipInfo:
        try:
            return self._members[f"{self._folder}/{name}"]
        except KeyError:
            raise ArchiveError(f"'{name}' is not in it") from None

    def _bytes(self, name: str) -> Tensor | bytearray:
        """A member, whose checksum zipfile verifies as the last byte is read."""
        member = self._member(name)
        if name == "data.pkl" and member.file_size > MOST_STRUCTURE:
            raise ArchiveError(f"it describes its tensors in more than {MOST_STRUCTURE} bytes")
        whole = bytearray(member.file_size) if "data/" not in name else torch.empty(member.file_size, dtype=torch.uint8)
        view: Any = memoryview(whole) if isinstance(whole, bytearray) else whole.numpy().data
        place = 0
        with self._archive.open(member) as file:
            while part := file.read(2**20):
                view[place : place + len(part)] = part
                place += len(part)
        if place != member.file_size:
            raise ArchiveError(f"'{name}' in it is cut short")
        return whole

    def _plain(self, value: Any) -> Any:
        """The value with tensors in place of their descriptions."""
        if isinstance(value, _Stored):
            return self._tensor(value)
        if isinstance(value, dict):
            made: dict[Any, Any] = type(value)((key, self._plain(inner)) for key, inner in dict.items(value))
            if metadata := _metadata(value):
                if not isinstance(metadata, dict) or not all(isinstance(of_module, dict) for of_module in metadata.values()):
                    raise ArchiveError("the versions of modules in it have another form")
                made._metadata = self._plain(metadata)  # type: ignore[attr-defined]  # the versions of a model's modules
            return made
        if type(value) in (list, tuple):
            return type(value)(map(self._plain, value))
        return value

    def _tensor(self, stored: _Stored) -> Tensor:
        key, dtype = stored.storage.key, stored.storage.dtype
        if key not in self._storages:
            whole = self._bytes(f"data/{key}")
            if not isinstance(whole, Tensor) or len(whole) != stored.storage.count * dtype.itemsize:
                raise ArchiveError("a tensor's bytes are more or fewer than it describes")
            self._storages[key] = whole
        flat = self._storages[key].view(dtype)
        if dtype is torch.bool and (self._storages[key] > 1).any():
            raise ArchiveError("a truth value is neither 0 nor 1")
        return flat.as_strided(stored.size, stored.stride, stored.offset)


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

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, count = pid
        if kind != "storage":
            raise ArchiveError("it refers to something other than tensors")
        return _Storage(dtype, key, count)


def _rebuilt(*described: Any) -> _Stored:
    """In the place of torch's function: storage, offset, size, stride, whether it requires a gradient, and hooks."""
    *place, requires_grad, hooks = described
    if len(place) != 4 or requires_grad is not False or hooks:
        raise ArchiveError("a tensor in it has more than values")
    return _Stored(*place)


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


def _check_stored(stored: _Stored) -> int:
    """The number of elements of a tensor that lies within its storage."""
    storage, offset, size, stride = stored
    if not (isinstance(storage, _Storage) and isinstance(storage.dtype, torch.dtype) and type(storage.key) is str):
        raise ArchiveError("a tensor in it has no storage")
    whole = [storage.count, offset, *(size if type(size) is tuple else [None]), *(stride if type(stride) is tuple else [None])]
    if any(type(number) is not int or not 0 <= number < 2**62 for number in whole) or len(size) != len(stride) or len(size) > 64:
        raise ArchiveError("a tensor in it has no shape")
    count: int = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if count else -1
    if last >= storage.count or offset > storage.count:
        raise ArchiveError("a tensor in it reaches beyond its bytes")
    return count


def _check_overlap(claimed: int, stored: int) -> None:
    if claimed > MOST_OVERLAP * stored:
        raise ArchiveError(f"its tensors claim more than {MOST_OVERLAP} times the bytes that are there")


def _metadata(value: dict[Any, Any]) -> Any:
    return vars(value).get("_metadata") if isinstance(value, OrderedDict) else None


def _walked(value: Any) -> Iterator[Any]:
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
            raise ArchiveError(f"it holds more than {MOST_VALUES} values, or more than {MOST_DEPTH} in one another")
        waiting += [(inner, depth + 1) for inner in parts]


_LEAVES = (str, int, float, bool, type(None), _Stored)
