"""Mutated files for a loader, in a child process of bounded memory that may execute nothing.

    report = fuzz(load, path, seeds, count)
    assert not report.failures, report

Input NUMBER is always the same bytes; `METAPLUG_FUZZ=NUMBER pytest FILE -k TEST` runs it alone, in
the open, with its traceback.
"""

import json
import mmap
import os
import random
import re
import resource
import signal
import struct
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from metaplug.errors import RequestError, RunError

_NUMBERS = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFE,
    0xFFFFFFFF,
    2**40,
    2**63 - 1,
    2**64 - 1,
)
_WORDS = (
    *(
        "nan",
        "-inf",
        "Infinity",
        "1_000",
        "1e999",
        "-0",
        "0x10",
        "0b_",
        "٣",
        "null",
        "true",
        "~",
        "2001-99-99",
        "\\u0000",
        "\\ud800",
    ),
    *(
        "!!python/object/apply:os.system [id]",
        "&a [*a]",
        "*a",
        "<<:",
        "../../x",
        "/dev/zero",
        "os:system",
        "__class__",
        '"',
        "'",
        "\r",
        "\n",
    ),
)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_STARTERS = {
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "pty.spawn",
    "subprocess.Popen",
}
_CHANGES = {
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
    "shutil.move",
}


def amount(request, few, many):
    """How many inputs a test takes: many in the long profile and with --run-slow."""
    long = os.environ.get("HYPOTHESIS_PROFILE") == "long" or request.config.getoption("--run-slow")
    return many if long else few


def mutated(seeds: Sequence[bytes], number: int, *, text: bool = False) -> bytes:
    """One of the seeds, changed in one to three ways: input `number`, the same in every process."""
    choice = random.Random(f"metaplug {number}")
    data = seeds[choice.randrange(len(seeds))]
    kinds = (*_BYTES, *_TEXTS, *_TEXTS) if text else _BYTES
    for _ in range(choice.choice((1, 1, 2, 3))):
        data = choice.choice(kinds)(data, choice, seeds)
    return data


@dataclass(repr=False)
class Report:
    """How many inputs loaded, how many were refused, and everything else, a line each."""

    loaded: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return "\n".join(
            [
                f"{self.loaded} loaded, {self.refused} refused, {len(self.failures)} neither:",
                *self.failures[:20],
            ]
        )


def fuzz(
    load: Callable[[], object],
    path: Path,
    seeds: Sequence[bytes],
    count: int,
    *,
    text: bool = False,
    says: Sequence[str] = (),
    owned: Sequence[Path] = (),
    modules: Sequence[str] = (),
    silent: bool = True,
    mib: int = 512,
    seconds: float = 10,
) -> Report:
    """Write every input to `path` and call `load`, which reads it, and may assert what it gives.

    An input fails unless `load` returns, or raises a RequestError or RunError of one line that has
    `path` or one of `says` in it. It fails too if anything is executed, unpickled, connected to,
    written outside `owned`, imported from outside the standard library and `modules`, or
    said on standard output or error. Bytes that fail are kept in a hidden
    folder beside that of `path`.

    Args:
        load: takes nothing; what it needs beside `path` is there already.
        seeds: good files.
        count: how many inputs.
        silent: whether nothing may be said, not even by libraries in C.
        text: whether lines, digits and brackets are mutated too.
        mib: memory beyond what the process has, in MiB.
        seconds: for one input; a child that does not answer for three times as long is killed.
    """
    kept = path.parent.with_name(f".{path.parent.name}-failed")
    kept.mkdir(exist_ok=True)
    if alone := os.environ.get("METAPLUG_FUZZ"):
        path.write_bytes(mutated(seeds, int(alone), text=text))
        load()
        return Report(1)
    current = mmap.mmap(-1, 8)
    current[:] = bytes(8)
    results = kept / "results.jsonl"
    results.write_text("")
    rules = {
        "says": (str(path), *says),
        "owned": tuple(map(str, (kept, *owned))),
        "modules": {*modules},
        "mib": mib,
        "seconds": seconds,
    }
    rules["silent"] = silent
    start = 0
    while start < count:
        pid = os.fork()
        if not pid:
            _child(load, path, (seeds, start, count, text), (current, results, kept), rules)
        ended = _watch(pid, current, 3 * seconds)
        if ended is None:
            break
        number = _number(current)
        _note(results, number, ended)
        start = number + 1
    report = Report()
    for line in results.read_text().splitlines():
        number, outcome = json.loads(line)
        if outcome in ("loaded", "refused"):
            setattr(report, outcome, getattr(report, outcome) + 1)
        else:
            bytes_of = kept / f"{number}{path.suffix}"
            bytes_of.write_bytes(mutated(seeds, number, text=text))
            report.failures.append(f"METAPLUG_FUZZ={number} ({bytes_of}): {outcome}")
    assert sum(Counter((report.loaded, report.refused, len(report.failures))).elements()) == count
    return report


def _number(current):
    return struct.unpack("q", current[:8])[0]


def _note(results, number, outcome):
    with results.open("a") as file:
        file.write(json.dumps([number, outcome]) + "\n")


def _watch(pid, current, limit):
    """How the child ended; None if it came to its end."""
    seen, since = -1, time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return None if code == 0 else f"the process ended with {code}"
        if _number(current) != seen:
            seen, since = _number(current), time.monotonic()
        elif time.monotonic() - since > limit:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return f"no answer for {limit} s, not even to an alarm"
        time.sleep(0.01)


class _Stopped(BaseException):
    """Out of time, or forbidden; passes through `except Exception`."""


def _child(load, path, inputs, places, rules):
    seeds, start, count, text = inputs
    current, results, kept = places
    try:
        quiet = kept / "said"
        said = os.open(quiet, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        notes = results.open("a", buffering=1)
        for stream in (1, 2):
            os.dup2(said, stream)
        warnings.simplefilter("ignore")
        signal.signal(signal.SIGALRM, _alarm)
        forbidden: list[str] = []
        active = [False]
        sys.addaudithook(_guard(forbidden, active, rules))
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + rules["mib"] * 2**20,) * 2)
        for number in range(start, count):
            current[:8] = struct.pack("q", number)
            path.write_bytes(mutated(seeds, number, text=text))
            forbidden.clear()
            before = os.fstat(said).st_size
            signal.setitimer(signal.ITIMER_REAL, rules["seconds"])
            try:
                active[0] = True
                outcome = _outcome(load, rules["says"])
                active[0] = False
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            sys.stdout.flush()
            sys.stderr.flush()
            if forbidden:
                outcome = f"did what is forbidden: {forbidden[0]}"
            elif rules["silent"] and os.fstat(said).st_size > before:
                outcome = f"said: {quiet.read_bytes()[before : before + 300]!r}"
            notes.write(json.dumps([number, outcome]) + "\n")
        notes.flush()
        os._exit(0)
    except BaseException:
        results.with_name("child.txt").write_text(traceback.format_exc())
    finally:
        os._exit(70)


def _outcome(load, says):
    try:
        load()
    except (RequestError, RunError) as error:
        message = str(error)
        if _UNPRINTABLE.search(message):
            return f"an error of more than one line, or with control characters: {message!r}"
        if len(message) > 10_000:
            return f"an error of {len(message)} characters: {message[:300]!r}"
        return (
            "refused"
            if any(part in message for part in says)
            else f"an error that does not name the file: {message}"
        )
    except _Stopped as error:
        return f"stopped: {error}"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({place.filename}:{place.lineno})"
    return "loaded"


def _alarm(*_):
    raise _Stopped("out of time")


def _guard(forbidden, active, rules):
    known = {
        *sys.stdlib_module_names,
        *rules["modules"],
        *(name.partition(".")[0] for name in sys.modules),
    }

    def hook(event, args):
        if not active[0]:
            return
        fault = None
        if (
            event in _STARTERS
            or event.startswith(("socket.", "ctypes.", "urllib."))
            or event == "pickle.find_class"
        ):
            fault = f"{event} {str(args)[:200]}"
        elif event == "import" and args[0].partition(".")[0] not in known:
            fault = f"import {args[0]}"
        elif (
            event == "open"
            and isinstance(args[0], str | bytes)
            and _writes(args[1], args[2])
            and not _owned(args[0], rules["owned"])
        ):
            fault = f"open {args[0]!r} to write"
        elif event in _CHANGES and not _owned(args[0], rules["owned"]):
            fault = f"{event} {args[0]!r}"
        if fault is not None:
            forbidden.append(fault)
            raise _Stopped(fault)

    return hook


def _writes(mode, flags):
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return (
        isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) != 0
    )


def _owned(name, owned):
    return os.fsdecode(name).startswith(owned)


# Mutations of bytes: (data, choice, seeds) -> data


def _span(data, choice):
    start = choice.randrange(len(data) + 1)
    return start, min(len(data), start + choice.choice((1, 2, 4, 8, 16, 64, 256, 1024)))


def _cut(data, choice, seeds):
    return data[: choice.randrange(len(data) + 1)]


def _behead(data, choice, seeds):
    return data[choice.randrange(len(data) + 1) :]


def _flip(data, choice, seeds):
    changed = bytearray(data)
    for _ in range(choice.choice((1, 1, 1, 2, 8, 64)) if changed else 0):
        changed[choice.randrange(len(changed))] ^= 1 << choice.randrange(8)
    return bytes(changed)


def _flip_early(data, choice, seeds):
    """Where headers are."""
    return _flip(data[:64], choice, seeds) + data[64:]


def _zero(data, choice, seeds):
    start, stop = _span(data, choice)
    return data[:start] + bytes([choice.choice((0, 0, 255))]) * (stop - start) + data[stop:]


def _repeat(data, choice, seeds):
    start, stop = _span(data, choice)
    return data[:stop] + data[start:stop] * choice.choice((1, 1, 2, 100)) + data[stop:]


def _remove(data, choice, seeds):
    start, stop = _span(data, choice)
    return data[:start] + data[stop:]


def _insert(data, choice, seeds):
    start, _ = _span(data, choice)
    return data[:start] + choice.randbytes(choice.choice((1, 3, 16, 300))) + data[start:]


def _splice(data, choice, seeds):
    other = seeds[choice.randrange(len(seeds))]
    return data[: choice.randrange(len(data) + 1)] + other[choice.randrange(len(other) + 1) :]


def _exchange(data, choice, seeds):
    (one, two), (three, four) = sorted([_span(data, choice), _span(data, choice)])
    return (
        data[:one] + data[three:four] + data[two:three] + data[one:two] + data[four:]
        if two <= three
        else data
    )


def _length(data, choice, seeds):
    """A number in place of what may be a length, of any width and either order."""
    code = choice.choice("BHIQ")
    width = struct.calcsize(code)
    start = choice.randrange(max(1, choice.choice((64, len(data))) - width))
    number = choice.choice(_NUMBERS) & (256**width - 1)
    return data[:start] + struct.pack(choice.choice("<>") + code, number) + data[start + width :]


# Mutations of text


def _lines(change):
    def mutate(data, choice, seeds):
        lines = data.splitlines(keepends=True)
        if lines:
            change(lines, choice.randrange(len(lines)), choice)
        return b"".join(lines)

    return mutate


def _replaced(data, choice, found, new):
    """One of the places where a byte of `found` stands, or any place, taken by `new`."""
    places = [place for place, byte in enumerate(data) if byte in found] or [
        choice.randrange(len(data) + 1)
    ]
    place = choice.choice(places)
    return data[:place] + new + data[place + 1 :]


def _digits(data, choice, seeds):
    return _replaced(
        data,
        choice,
        b"0123456789",
        choice.choice((b"9" * 5000, b"1e999", b"-", b"." * 3, b"1" * 400, b"1" + b"0" * 40)),
    )


def _deep(data, choice, seeds):
    deep = choice.choice((50, 1000, 20_000))
    opening, closing = choice.choice(
        ((b"[", b"]"), (b'{"a":', b"}"), (b"(", b")"), (b"{", b"}"), (b"- ", b""))
    )
    place = choice.randrange(len(data) + 1)
    return data[:place] + opening * deep + closing * choice.choice((0, deep)) + data[place:]


def _control(data, choice, seeds):
    character = choice.choice(
        (
            b"\0",
            b"\x1b[2J",
            b"\x07",
            b"\x85",
            b"\xe2\x80\xa8",
            b"\xef\xbb\xbf",
            b"\x7f",
            b"\r",
            b"\t",
            b"\xe2\x80\xae",
        )
    )
    start, _ = _span(data, choice)
    return data[:start] + character + data[start:]


def _not_utf8(data, choice, seeds):
    start, _ = _span(data, choice)
    return (
        data[:start]
        + choice.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xfe\xff"))
        + data[start:]
    )


def _word(data, choice, seeds):
    return _replaced(data, choice, b'0123456789":,[]{}', choice.choice(_WORDS).encode())


def _long(data, choice, seeds):
    start, _ = _span(data, choice)
    return (
        data[:start]
        + choice.choice((b"a", b",", b'"', b" ", b"\n", b"9", b"\\")) * 200_000
        + data[start:]
    )


_BYTES = (
    _cut,
    _behead,
    _flip,
    _flip,
    _flip_early,
    _flip_early,
    _zero,
    _repeat,
    _remove,
    _insert,
    _splice,
    _exchange,
    _length,
    _length,
)
_TEXTS = (
    _lines(lambda lines, place, _: lines.insert(place, lines[place])),
    _lines(lambda lines, place, _: lines.pop(place)),
    _lines(
        lambda lines, place, choice: lines.insert(choice.randrange(len(lines)), lines.pop(place))
    ),
    *(_digits, _deep, _control, _not_utf8, _word, _word, _long),
)
