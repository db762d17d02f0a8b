"""Meta-steps as `metaplug bench` measures them: time, memory, and how they grow with tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from metaplug.bench import as_json_values, scaling
from metaplug.bench import run as bench
from metaplug.bench.meters import Meter

MOST_MIB = {"cuda": 16_384.0, "cpu": scaling.MOST_MIB}
"""A series of more and more tasks ends before a step of more."""


def run(work: dict[str, Any], device: str, emit: Callable[[str, Any], None]) -> str | None:
    """Measure the contestants of a workload, or one that grows; tell each as a row."""
    torch.set_num_threads(1)
    meter, repeats = Meter(torch.device(device)), work["repeats"]
    if "grow" in work:
        sizes = work["tasks"]
        for tasks, following in zip(sizes, [*sizes[1:], 0], strict=True):
            grid: scaling.Grid = {work["grow"]: {"tasks": (tasks,)}}
            (point,) = scaling.run(repeats=repeats, grid=grid, meter=meter)
            emit("row", asdict(point))
            if point.peak_mib * following / tasks > MOST_MIB[device]:
                break
        return None
    rows = bench(
        [work["workload"]],
        ["gradient-sharing"],
        repeats=repeats,
        memory=work.get("memory", False),
        only=work["only"],
        meter=meter,
    )
    for row in as_json_values(rows, repeats, meter)["rows"]:
        emit("row", row)
    return None
