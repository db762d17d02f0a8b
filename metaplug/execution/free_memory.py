"""How much memory is free, and sizes in words."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch

_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, or None where that is not known.

    On CUDA, as the driver says. On a CPU, as Linux says: MemAvailable of the machine, or what the
    control groups of this process leave, whichever is least; a group's page cache counts as free.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    left = [1024 * kib for kib in _numbers(_PROC / "meminfo", r"^MemAvailable:\s*(\d+)")]
    own = re.search(r"^0::/(.*)$", _read(_PROC / "self/cgroup"), re.MULTILINE)
    group = _GROUPS / (own[1] if own else "")
    for folder in (group, *group.parents):
        limit, used = (_numbers(folder / f"memory.{name}") for name in ("max", "current"))
        cached = _numbers(folder / "memory.stat", r"^inactive_file (\d+)$")
        if limit and used:
            left.append(max(limit[0] - used[0] + sum(cached), 0))
    return min(left, default=None)


def resident(pid: int | None = None, *, peak: bool = False) -> int:
    """Return the bytes of memory that a process holds, or has held at most; 0 where not known.

    Args:
        pid: of the process; None is this one.
        peak: return the most it has held.
    """
    name = "VmHWM" if peak else "VmRSS"
    status = _PROC / ("self" if pid is None else str(pid)) / "status"
    return 1024 * sum(_numbers(status, rf"^{name}:\s*(\d+)"))


def size_text(count: float) -> str:
    """Return bytes in words: "640 KiB", "1.3 GiB"."""
    power = min(int(math.log2(max(count, 1))) // 10, 4)
    scaled, unit = count / 1024**power, ("bytes", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{scaled:.{int(scaled < 10 and power > 0)}f} {unit}"


def _numbers(file: Path, pattern: str = r"^(\d+)$") -> list[int]:
    return [int(number) for number in re.findall(pattern, _read(file), re.MULTILINE)]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
