"""Tensors and plain values in the zip that `torch.save` writes, read so that nothing is executed and every byte is verified.

`torch.load` passes over the checksums of tensors, and knows formats and constructors that no checkpoint of metaplug's needs. Here the bytes
that were checked are the bytes that are used: one reader, which takes memory for what the file holds and no more.
"""

from __future__ import annotations

import stat
import sys
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from metaplug.checkpoint.structure import MOST_STRUCTURE, PROTOCOL, check_length, describe, parse
from metaplug.checkpoint.values import (
    DTYPES,
    MOST_OVERLAP,
    ArchiveError,
    Stored,
    changed,
    check_overlap,
    walked,
)
from metaplug.execution.free_memory import available, size_text


def check(value: Any) -> Any:
    """The value as `save` writes and `load` gives it: its tensors without gradients, and apart from one another where they overlap much.

    Raises:
        ArchiveError: it holds something other than dicts, lists, tuples, strings, numbers, None and dense tensors, or too much of it.
    """
    for _ in walked(value):  # bounded before it is followed
        pass
    value = changed(value, _plain)
    lying: dict[int, list[Tensor]] = {}
    for part in walked(value):
        if isinstance(part, Tensor):
            lying.setdefault(part.untyped_storage().data_ptr(), []).append(part)
    crowded = {place for place, tensors in lying.items() if _are_crowded(tensors)}
    if crowded:
        value = changed(value, lambda part: _apart(part, crowded))
    description = parse(describe(value))  # as `load` will
    check_overlap(
        description.claimed, sum(storage.nbytes for storage in description.storages.values())
    )
    return value


def save(value: Any, file: BinaryIO) -> None:
    """Write what `check` gave."""
    torch.save(value, file, pickle_protocol=PROTOCOL)


def load(path: Path) -> Any:
    """What `save` wrote there: dicts, lists, tuples, strings, numbers, None and tensors, on the CPU.

    Raises:
        ArchiveError: the file is none of torch's, damaged, or holds something else.
        OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe or device may have no end
        raise ArchiveError("it is no regular file")
    free = available(torch.device("cpu"))
    if free is not None and status.st_size > free:
        raise ArchiveError(
            f"it has {size_text(status.st_size)}, more than the {size_text(free)} of memory that are free"
        )
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ArchiveError("it is no zip, as which torch saves")
        with zipfile.ZipFile(file) as archive:
            return _Reader(archive, status.st_size).read()


def _plain(part: Any) -> Any:
    """A part as plain values: of a parameter its tensor, on which no gradient, hook or attribute hangs."""
    if not isinstance(part, Tensor):
        return part
    if (
        part.dtype not in DTYPES.values()
        or part.layout is not torch.strided
        or part.is_quantized
        or part.is_nested
        or part.is_meta
    ):
        raise ArchiveError(
            f"it holds a tensor of {part.dtype}, {part.layout}{' without values' if part.is_meta else ''}"
        )
    plain = part.detach().resolve_conj().resolve_neg()
    if type(plain) is not Tensor:
        raise ArchiveError(f"it holds a {type(plain).__name__}")
    return plain


def _are_crowded(tensors: list[Tensor]) -> bool:
    """Whether tensors of one place use its bytes too often, or as torch.save or `load` cannot have it."""
    nbytes = min(tensor.untyped_storage().nbytes() for tensor in tensors)
    overlapping = (
        sum(tensor.numel() * tensor.element_size() for tensor in tensors) > MOST_OVERLAP * nbytes
    )
    return (
        overlapping
        or len({tensor.dtype for tensor in tensors}) > 1
        or nbytes % tensors[0].element_size() > 0
    )


def _apart(part: Any, crowded: set[int]) -> Any:
    if isinstance(part, Tensor) and part.untyped_storage().data_ptr() in crowded:
        return part.clone(memory_format=torch.contiguous_format)
    return part


class _Reader:
    """One archive of `size` bytes that is being read."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive = archive
        self._members = {member.filename: member for member in archive.infolist()}
        if len(self._members) != len(archive.infolist()):
            raise ArchiveError("a name stands twice in it")
        if packed := [
            name
            for name, member in self._members.items()
            if member.compress_type or member.flag_bits & 1
        ]:
            raise ArchiveError(f"'{packed[0]}' in it is compressed, which torch never does")
        if sum(member.file_size for member in self._members.values()) > size:
            raise ArchiveError("its members lie over each other")
        self._folder = next(
            (name.rpartition("/")[0] for name in self._members if name.endswith("/data.pkl")), ""
        )
        for name in self._members:
            if not name.startswith(f"{self._folder}/") or name.startswith(
                (f"{self._folder}/code/", f"{self._folder}/constants.pkl")
            ):
                raise ArchiveError(f"'{name}' in it is nothing that torch.save writes")
        self._storages: dict[str, Tensor] = {}

    def read(self) -> Any:
        if bytes(self._bytes("byteorder")).decode("ascii", "replace") != sys.byteorder:
            raise ArchiveError("it is from a machine of another byte order")
        for (
            name,
            member,
        ) in (
            self._members.items()
        ):  # what is not a tensor's is not read below, and would go unverified
            if "/data/" not in name and member.file_size <= MOST_STRUCTURE:
                self._bytes(name.removeprefix(f"{self._folder}/"))
        description = parse(bytes(self._bytes("data.pkl")))
        tensors = {
            name.rpartition("/")[2]
            for name in self._members
            if name.startswith(f"{self._folder}/data/")
        }
        if tensors != description.storages.keys():
            raise ArchiveError("its tensors are not those that it describes")
        check_overlap(
            description.claimed,
            sum(self._member(f"data/{key}").file_size for key in description.storages),
        )
        return changed(
            description.value, lambda part: self._tensor(part) if isinstance(part, Stored) else part
        )

    def _member(self, name: str) -> zipfile.ZipInfo:
        try:
            return self._members[f"{self._folder}/{name}"]
        except KeyError:
            raise ArchiveError(f"'{name}' is not in it") from None

    def _bytes(self, name: str) -> Tensor | bytearray:
        """A member, whose checksum zipfile verifies as the last byte is read."""
        member = self._member(name)
        if name == "data.pkl":
            check_length(member.file_size)
        whole = (
            bytearray(member.file_size)
            if "data/" not in name
            else torch.empty(member.file_size, dtype=torch.uint8)
        )
        view: Any = memoryview(whole) if isinstance(whole, bytearray) else whole.numpy().data
        place = 0
        with self._archive.open(member) as file:
            while part := file.read(2**20):
                view[place : place + len(part)] = part
                place += len(part)
        if place != member.file_size:
            raise ArchiveError(f"'{name}' in it is cut short")
        return whole

    def _tensor(self, stored: Stored) -> Tensor:
        key, dtype = stored.storage.key, stored.storage.dtype
        if key not in self._storages:
            whole = self._bytes(f"data/{key}")
            if not isinstance(whole, Tensor) or len(whole) != stored.storage.nbytes:
                raise ArchiveError("a tensor's bytes are more or fewer than it describes")
            self._storages[key] = whole
        flat = self._storages[key].view(dtype)
        if dtype is torch.bool and (self._storages[key] > 1).any():
            raise ArchiveError("a truth value is neither 0 nor 1")
        return flat.as_strided(stored.size, stored.stride, stored.offset)
