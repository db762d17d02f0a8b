"""A disk that loses its power: records a process's operations, and makes what a failure may leave.

POSIX promises little: what was written to a file is on the disk after an fsync of that file, and a
name (made, replaced, removed) after one of its folder. Everything else may be there or not, each on
its own. A `Disk` watches the calls of `os` and `open` in this process, without help from what is
watched, and compares its picture of the folder with the real one after each: nothing escapes it.
"""

from __future__ import annotations

import builtins
import io
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest import mock

Change = tuple[tuple[str, int | None], ...]
"""Names in a folder with the number of what they now stand for, or None; all of it or nothing."""

Tree = dict[str, bytes | None]
"""What lies in a folder: the content of files by their relative path; None for folders."""

NAMES: dict[str, Callable[[list[Change], random.Random], list[Change]]] = {
    "kept": lambda changes, _: changes,
    "lost": lambda _, __: [],
    "some": lambda changes, chance: [change for change in changes if chance.random() < 0.5],
}
"""Which of the changes since a folder's last fsync are there."""

DATA: dict[str, Callable[[bytes, bytes, random.Random], bytes]] = {
    "kept": lambda _, new, __: new,
    "lost": lambda old, _, __: old,
    "half": lambda old, new, _: _grown(old, new, lambda added: added[: len(added) // 2]),
    "zeros": lambda old, new, _: _grown(old, new, lambda added: bytes(len(added))),
    "some": lambda old, new, chance: chance.choice(
        [old, new, _grown(old, new, lambda added: added[: chance.randrange(len(added) + 1)])]
    ),
}
"""What is there of a file, from its content at its last fsync and its newest."""

LOSSES = [
    ("kept", "kept"),  # what a killed process leaves
    ("lost", "lost"),
    ("kept", "lost"),
    ("kept", "half"),
    ("kept", "zeros"),  # grown, and never filled
    ("lost", "kept"),
    *[("some", "some")] * 6,
]
"""What becomes of names and of data that no fsync has made safe."""


@dataclass(frozen=True)
class Moment:
    """The disk after one operation."""

    operation: str
    files: Mapping[int, tuple[bytes, bytes]]
    """Safe and newest content."""

    folders: Mapping[int, tuple[dict[str, int], list[Change]]]
    """Safe names, and the changes since."""

    done: int
    """What had been promised to be safe."""

    def tree(self, names: str, data: str, seed: int = 0) -> Tree:
        """What a power failure at this moment leaves, if unsafe names and data fare so."""
        chance = random.Random(seed)
        tree: Tree = {}

        def visit(number: int, prefix: str) -> None:
            safe, changes = self.folders[number]
            for name, child in sorted(_applied(safe, NAMES[names](changes, chance)).items()):
                if child in self.folders:
                    tree[prefix + name] = None
                    visit(child, f"{prefix}{name}/")
                else:
                    tree[prefix + name] = DATA[data](*self.files[child], chance)

        visit(0, "")
        return tree


class Disk:
    """Everything that this process does to what lies under `root`, from an empty, safe folder on.

    Args:
        deaf: patterns of file names whose fsync does nothing, to see that a missing one is found.
    """

    def __init__(self, root: Path, *, deaf: tuple[str, ...] = ()) -> None:
        self.root, self.deaf, self.done, self.moments = root, deaf, 0, list[Moment]()
        self._files: dict[int, tuple[bytes, bytes]] = {}
        self._folders: dict[int, tuple[dict[str, int], list[Change]]] = {0: ({}, [])}
        self._real: dict[int, int] = {root.stat().st_ino: 0}
        self._begin(root, 0)
        self._numbers = iter(range(len(self._files) + len(self._folders), 10**9))
        self._open = builtins.open

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, operations are recorded."""
        done = {
            name: getattr(os, name)
            for name in (
                "open",
                "write",
                "fsync",
                "replace",
                "rename",
                "unlink",
                "remove",
                "mkdir",
                "rmdir",
                "link",
            )
        }
        patches: dict[str, Callable[..., Any]] = {
            "open": lambda path, flags, *a, **k: self._os_open(done["open"], path, flags, *a, **k),
            "write": lambda file, data: self._after(
                done["write"](file, data), lambda: self._wrote(file)
            ),
            "fsync": lambda file: self._after(done["fsync"](file), lambda: self._synced(file)),
            "mkdir": lambda path, *a, **k: self._after(
                done["mkdir"](path, *a, **k), lambda: self._made(path)
            ),
            **{name: self._moving(done[name]) for name in ("replace", "rename")},
            **{name: self._removing(done[name]) for name in ("unlink", "remove", "rmdir")},
        }
        with (
            mock.patch.multiple(os, **patches),
            mock.patch.object(builtins, "open", self._opened),
            mock.patch.object(io, "open", self._opened),
        ):
            yield

    def promise(self, done: int) -> None:
        """From now on, whatever happens, `done` must not be lost."""
        self.done = done
        self._record(f"promise {done}")

    def _record(self, operation: str) -> None:
        folders = {number: (safe, [*changes]) for number, (safe, changes) in self._folders.items()}
        moment = Moment(operation, dict(self._files), folders, self.done)
        self.moments.append(moment)
        assert moment.tree("kept", "kept") == tree_of(self.root, self._open), (
            f"{operation} was not the only change"
        )

    def _begin(self, folder: Path, number: int) -> None:
        """What is there already is safe."""
        for path in sorted(folder.iterdir()):
            child = len(self._real)
            self._real[path.stat().st_ino] = child
            self._folders[number][0][path.name] = child
            if path.is_dir():
                self._folders[child] = ({}, [])
                self._begin(path, child)
            else:
                self._files[child] = (path.read_bytes(),) * 2

    def _inside(self, path: Any) -> Path | None:
        """The absolute path, where it is one under the root."""
        if isinstance(path, int) or not Path(os.fsdecode(path)).absolute().is_relative_to(
            self.root
        ):
            return None
        return Path(os.fsdecode(path)).absolute()

    def _after(self, result: Any, note: Callable[[], None]) -> Any:
        note()
        return result

    def _number(self, path: Path) -> int:
        return self._real[path.stat().st_ino]

    def _change(self, folder: Path, *change: tuple[str, int | None]) -> None:
        self._folders[self._number(folder)][1].append(change)

    def _made(self, given: Any) -> None:
        path = self._inside(given)
        if path is None:
            return
        number = self._real[path.stat().st_ino] = next(self._numbers)
        if path.is_dir():
            self._folders[number] = ({}, [])
        else:
            self._files[number] = (b"", b"")
        self._change(path.parent, (path.name, number))
        self._record(f"make {path.name}")

    def _opening(self, given: Any, action: Callable[[], Any]) -> Any:
        """Open, and note a file that this made or emptied."""
        path = self._inside(given)
        before = path is not None and path.exists()
        result = action()
        if path is not None and not before:
            self._made(path)
        elif (
            path is not None
            and path.is_file()
            and path.stat().st_size == 0
            and self._files[self._number(path)][1]
        ):
            self._files[self._number(path)] = (self._files[self._number(path)][0], b"")
            self._record(f"empty {path.name}")
        return result

    def _os_open(
        self, original: Callable[..., int], path: Any, flags: int, *rest: Any, **named: Any
    ) -> int:
        number: int = self._opening(path, lambda: original(path, flags, *rest, **named))
        return number

    def _opened(
        self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any
    ) -> Any:
        """As `open`, with a raw file that notes its writes."""
        if not set(mode) & set("wax+") or buffering == 0:
            return self._open(file, mode, buffering, *rest, **named)
        raw = self._opening(
            file,
            lambda: _Noting(
                self, file, mode.replace("b", "").replace("t", ""), *rest[3:], **_raw(named)
            ),
        )
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        return (
            buffered
            if "b" in mode
            else io.TextIOWrapper(
                buffered, *rest[:3], **{key: named[key] for key in named.keys() - _RAW}
            )
        )

    def _wrote(self, descriptor: int) -> None:
        number = self._real.get(os.fstat(descriptor).st_ino)
        path = self._path(number) if number in self._files else None
        if path is None:
            return
        self._files[number] = (self._files[number][0], self._read(path))
        self._record(f"write {path.name}")

    def _synced(self, descriptor: int) -> None:
        number = self._real.get(os.fstat(descriptor).st_ino)
        path = None if number is None else self._path(number)
        if path is None or any(fnmatch(path.name, pattern) for pattern in self.deaf):
            return
        if number in self._files:
            self._files[number] = (self._files[number][1],) * 2
        else:
            self._folders[number] = (_applied(*self._folders[number]), [])
        self._record(f"fsync {path.name}")

    def _moving(self, original: Callable[..., None]) -> Callable[..., None]:
        def move(source: Any, target: Any, **named: Any) -> None:
            old, new = self._inside(source), self._inside(target)
            number = self._number(old) if old is not None else None
            original(source, target, **named)
            if old is None and new is None:
                return
            assert old is not None and new is not None and old.parent == new.parent, (
                f"{source} moves between folders: tell power.py how"
            )
            self._change(old.parent, (old.name, None), (new.name, number))
            self._record(f"rename {old.name} to {new.name}")

        return move

    def _removing(self, original: Callable[..., None]) -> Callable[..., None]:
        def remove(path: Any, **named: Any) -> None:
            original(path, **named)
            inside = self._inside(path)
            if inside is not None:
                self._change(inside.parent, (inside.name, None))
                self._record(f"remove {inside.name}")

        return remove

    def _path(self, wanted: int, folder: int = 0, here: Path | None = None) -> Path | None:
        """Where a file or folder now is; None for one that has been removed."""
        here = here or self.root
        if wanted == folder:
            return here
        for name, number in _applied(*self._folders[folder]).items():
            if number == wanted:
                return here / name
            if number in self._folders and (found := self._path(wanted, number, here / name)):
                return found
        return None

    def _read(self, path: Path) -> bytes:
        with self._open(path, "rb") as file:
            content: bytes = file.read()
        return content


_RAW = {"closefd", "opener"}


def _raw(named: Mapping[str, Any]) -> dict[str, Any]:
    return {key: named[key] for key in named.keys() & _RAW}


class _Noting(io.FileIO):
    """A raw file that tells a disk of its writes."""

    def __init__(self, disk: Disk, file: Any, mode: str, *rest: Any, **named: Any) -> None:
        self._disk = disk
        super().__init__(file, mode, *rest, **named)

    def write(self, data: Any) -> int:
        """As every raw file's, and noted."""
        written = super().write(data)
        self._disk._wrote(self.fileno())
        return written

    def truncate(self, size: int | None = None) -> int:
        """As every raw file's, and noted."""
        length = super().truncate(size)
        self._disk._wrote(self.fileno())
        return length


def tree_of(folder: Path, opening: Callable[..., Any] = open) -> Tree:
    """What really lies in a folder."""
    tree: Tree = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            tree[str(path.relative_to(folder))] = None
        else:
            with opening(path, "rb") as file:
                tree[str(path.relative_to(folder))] = file.read()
    return tree


def lay_out(tree: Tree, folder: Path) -> None:
    """Make such a folder."""
    folder.mkdir()
    for name, content in sorted(tree.items()):
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)


def _grown(old: bytes, new: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The safe content with something of what was added, or something of a new content."""
    return old + change(new[len(old) :]) if new.startswith(old) else change(new)


def _applied(safe: Mapping[str, int], changes: list[Change]) -> dict[str, int]:
    names = dict(safe)
    for change in changes:
        for name, number in change:
            if number is None:
                names.pop(name, None)
            else:
                names[name] = number
    return names
