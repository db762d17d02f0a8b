"""What a report was measured on: versions, device, processor, and what is not installed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

TEST_PACKAGES = ("pytest", "hypothesis")


def run(work: dict[str, Any], device: str, emit: Callable[[str, Any], None]) -> str | None:
    """Tell the machine as one row; return why nothing can run on this device, None if it can."""
    if device == "cuda" and not torch.cuda.is_available():
        return (
            f"--device cuda: torch {torch.__version__} of {sys.executable} finds no CUDA device "
            "here; give a Python that does (make gpu-report PYTHON=python3), or --device cpu"
        )
    row = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "processors": os.cpu_count(),
        "missing": [name for name in needed() if not _installed(name)],
    }
    emit("row", {**row, **(_cuda() if device == "cuda" else {"device": row["processor"]})})
    return None


def needed() -> Iterator[str]:
    """List the distributions that metaplug needs, and its tests."""
    with suppress(importlib.metadata.PackageNotFoundError):
        for need in importlib.metadata.requires("metaplug") or []:
            if "extra ==" not in need:
                yield re.split(r"[\s\[<>=!~;(]", need, maxsplit=1)[0]
    yield from TEST_PACKAGES


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cuda() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "devices": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_mib": round(properties.total_memory / 2**20),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
    }


def _driver() -> str | None:
    """Return the driver's version, as its own program tells it; None without that program."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
