"""What memory is free, how much that is in words, and which errors mean that there was none."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import torch

from metaplug.errors import MetaplugError

_SIGNS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "ALLOC_FAILED",
)
"""In the texts of torch's errors that mean that memory has run out."""


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory has run out, on a CPU or a CUDA device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return (
        isinstance(error, RuntimeError)
        and not isinstance(error, MetaplugError)
        and any(sign in str(error) for sign in _SIGNS)
    )


def available(device: torch.device) -> int | None:
    """The bytes that a step can still take on a device; None where they cannot be known.

    On CUDA what the driver has free and what torch holds unused; on a CPU, of Linux, MemAvailable of /proc/meminfo or what is left of the
    control group's limit, whichever is less. Ranks on one machine share that evenly.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    known = [free for free in (_of_machine(), *_of_groups()) if free is not None]
    return min(known) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if known else None


def size_text(count: float) -> str:
    """Bytes in words: "640 KiB", "1.3 GiB"."""
    power = min(int(math.log2(max(count, 1))) // 10, 4)
    scaled = count / 1024**power
    return (
        f"{scaled:.1f} {_UNITS[power]}"
        if scaled < 10 and power
        else f"{scaled:.0f} {_UNITS[power]}"
    )


_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def _of_machine(file: Path = Path("/proc/meminfo")) -> int | None:
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _read(file), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _of_groups(
    mount: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """What is left of the limit of this process's control group and of each above it; what the page cache can give back counts as left."""
    found = re.search(r"^0::/(.*)$", _read(own), re.MULTILINE)
    group = mount / found[1] if found else mount
    left = []
    for folder in (group, *group.parents):
        limit, used = _read(folder / "memory.max").strip(), _read(folder / "memory.current").strip()
        if limit.isdigit() and used.isdigit():
            cached = re.search(
                r"^inactive_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE
            )
            left.append(max(int(limit) - int(used) + (int(cached[1]) if cached else 0), 0))
        if folder == mount:
            break
    return left


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
