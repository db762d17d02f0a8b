"""Cached files: whole or made anew, bounded, and never needed."""

import logging
import os
from pathlib import Path

import pytest

from metaplug.tasks.cache import make_room, read_cached, write_cached


def read(path: Path, most_bytes: int = 100) -> bytes | None:
    return read_cached(path, most_bytes, "letters")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_parts_are_read_as_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    write_cached(path, b"ab", memoryview(b"cd"), bytearray(b"e"), noun="letters")
    assert read(path) == b"abcde"
    write_cached(path, noun="letters")
    assert read(path) == b""
    assert names(path.parent) == ["a.bin"]


def test_a_missing_file_is_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "metaplug"):
        assert read(tmp_path / "a.bin") is None
    assert caplog.messages == []


@pytest.mark.parametrize("damage", ["cut", "emptied", "changed", "longer", "renamed"])
def test_a_damaged_file_reads_as_none(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.bin"
    write_cached(path, b"abcde", noun="letters")
    whole = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(whole[:-1])
        case "emptied":
            path.write_bytes(b"")
        case "changed":
            path.write_bytes(whole[:-1] + b"x")
        case "longer":
            path.write_bytes(whole + b"x")
        case "renamed":  # the content of another key
            path = path.rename(tmp_path / "b.bin")
    with caplog.at_level(logging.INFO, "metaplug"):
        assert read(path) is None
    assert caplog.messages == [
        f"the cached letters in {path} fail their checksum: making them anew"
    ]


def test_too_large_a_file_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.bin"
    write_cached(path, b"abcde", noun="letters")
    assert read(path, 5) == b"abcde"
    with caplog.at_level(logging.INFO, "metaplug"):
        assert read(path, 4) is None
    assert caplog.messages == [
        f"the cached letters in {path} cannot be read ([Errno 27] they have 5 bytes, more than the "
        f"4 that are read: '{path}'): making them anew"
    ]


def test_a_file_that_cannot_be_written_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.INFO, "metaplug"):
        write_cached(tmp_path / "file" / "a.bin", b"abcde", noun="letters")
    assert caplog.messages == [
        f"the letters are not cached ([Errno 17] File exists: '{tmp_path}/file'): they are made at "
        "every start"
    ]


def test_the_longest_unused_make_room(tmp_path: Path) -> None:
    make_room(tmp_path / "none", 10, 10)
    for age, name in enumerate("abc"):  # of 40 bytes each with the checksum; c is the oldest
        write_cached(tmp_path / name, bytes(8), noun="letters")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    make_room(tmp_path, 40, 160)
    assert names(tmp_path) == ["a", "b", "c"]
    assert read(tmp_path / "c") == bytes(8)  # and is the newest now
    make_room(tmp_path, 40, 159)
    assert names(tmp_path) == ["a", "c"]
    make_room(tmp_path, 40, 80)
    assert names(tmp_path) == ["c"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_two_processes_write_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, contents = tmp_path / "a.bin", [bytes([number]) * 100_000 for number in range(2)]
    children = []
    for content in contents:
        if not (child := os.fork()):
            for _ in range(20):
                write_cached(path, content, noun="letters")
            os._exit(0)
        children.append(child)
    caplog.set_level(logging.INFO, "metaplug")
    while children:
        assert read(path, 100_000) in (None, *contents)
        children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
    assert names(tmp_path) == ["a.bin"]
    assert read(path, 100_000) in contents
    assert caplog.messages == []
