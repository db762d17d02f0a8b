"""The parts of a report, in the order of their worth, and the units that each is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from metaplug.errors import unknown
from metaplug.gpu_report.works import (
    CAPTURED,
    COMPILED,
    EAGER,
    LARGE,
    MEMORY,
    MORE_TASKS,
    TEST_FILES,
    TRAINING,
    WORKLOADS,
)

_HERE = "metaplug.gpu_report"


@dataclass(frozen=True)
class Unit:
    """What is kept or lost together: a file of tests, a workload, a training.

    Attributes:
        work: what the module of its part is given; plain values for JSON.
    """

    name: str
    work: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One subject of the page.

    Attributes:
        module: whose function `run` does the work of a unit, in a process of its own.
        ends: the share of the budget by which it has ended, above 0, at most 1. What a part leaves,
            the next one has.
        jobs: units by the process that runs them, one after the other.
        at_once: how many of these processes at a time.
        left_out: what has no meaning here, by name, with the reason.
    """

    name: str
    module: str
    ends: float
    jobs: tuple[tuple[Unit, ...], ...] = ()
    at_once: int = 1
    left_out: dict[str, str] = field(default_factory=dict)


MACHINE = Part("machine", f"{_HERE}.machine", 0.5, ((Unit("versions and device"),),))
"""What all others need to know, and whether there is such a device at all."""


def parts_of(
    device: str, *, tests: str | None, small: bool, only: Sequence[str], processors: int
) -> list[Part]:
    """Return the parts for a device, "cpu" or "cuda", the most worth first.

    Args:
        tests: the folder of the CUDA tests; None where metaplug is installed without them.
        small: the smallest works, few repeats: to try the report itself.
        only: names of parts; empty for all.
        processors: CPU cores here.

    Raises:
        RequestError: `only` names a part that does not exist.
    """
    size = "small" if small else device
    made = [
        _tests(device, tests, at_once=max(1, min(6, processors // 2))),
        _steps(device, size),
        _memory(size),
        _training(device, size),
        _large(size),
    ]
    for name in only:
        if name not in (names := [part.name for part in made]):
            raise unknown("part", name, names)
    chosen = [part for part in made if not only or part.name in only]
    # Fewer parts have all of the budget, too.
    return [replace(part, ends=part.ends * made[-1].ends / chosen[-1].ends) for part in chosen]


def _tests(device: str, folder: str | None, at_once: int) -> Part:
    reason = None
    if device == "cpu":
        reason = "they need a CUDA device"
    elif folder is None:
        reason = "metaplug is installed without them: run it from the repository"
    if reason:
        return Part("tests", f"{_HERE}.cuda_tests", 0.38, left_out={"tests/cuda": reason})
    jobs = [
        Unit(
            f"test_{name}.py" + f" ({shard + 1} of {shards})" * (shards > 1),
            {"file": f"{folder}/test_{name}.py", "shard": shard, "shards": shards},
        )
        for name, shards in TEST_FILES.items()
        for shard in range(shards)
    ]
    return Part("tests", f"{_HERE}.cuda_tests", 0.38, tuple((unit,) for unit in jobs), at_once)


def _bench(name: str, contestants: Iterable[str], size: str, what: str = "", **more: Any) -> Unit:
    work = {"workload": name, "only": [*contestants], "repeats": 2 if size == "small" else 9}
    return Unit(f"{name}{what}", {**work, **more})


def _steps(device: str, size: str) -> Part:
    """Eager and captured steps of every workload first: compiling takes half a minute or more."""
    left_out, units = {}, []
    for name in WORKLOADS[size]:
        units.append(_bench(name, EAGER, size))
        if device == "cuda":
            units.append(_bench(name, CAPTURED, size, ", captured", traced=True))
    if device == "cpu":
        left_out["captured steps"] = "a CPU has no CUDA graphs"
    if size == "small":
        left_out["compiled steps"] = "each takes half a minute, so not with --small"
    else:
        for what, made in COMPILED.items():
            if device == "cuda" or "captured" not in what:
                # The smaller graphs first.
                for name in sorted(WORKLOADS[size], key=lambda name: "sinusoid" not in name):
                    units.append(_bench(name, made, size, what, traced=True))
    return Part("bench", f"{_HERE}.steps", 0.66, (tuple(units),), left_out=left_out)


def _memory(size: str) -> Part:
    units = [_bench(name, MEMORY, size, memory=True, repeats=2) for name in WORKLOADS[size]]
    return Part("memory", f"{_HERE}.steps", 0.75, (tuple(units),))


def _training(device: str, size: str) -> Part:
    runtime = {"device": device, "threads": 1}
    captured = {"capture": "auto", "metrics_every": 25}
    algorithms: dict[str, dict[str, Any]] = {
        "maml": {},
        "maml + gradient-sharing": {"plugins": ["gradient-sharing"]},
    }
    if device == "cuda":
        algorithms["maml, captured"] = {"runtime": captured}
    units = [
        Unit(
            name,
            {**TRAINING[size], **own, "runtime": {**runtime, **own.get("runtime", {})}},
        )
        for name, own in algorithms.items()
    ]
    left_out = {} if device == "cuda" else {"captured training": "a CPU has no CUDA graphs"}
    return Part("training", f"{_HERE}.training", 0.89, (tuple(units),), left_out=left_out)


def _large(size: str) -> Part:
    units = [_bench(name, EAGER, size) for name in LARGE[size]]
    units += [
        Unit(f"{name}, more tasks", {"grow": name, "tasks": [*tasks], "repeats": 5})
        for name, tasks in MORE_TASKS[size].items()
    ]
    left_out = {} if units else {"larger steps": "not with --small"}
    return Part(
        "large", f"{_HERE}.steps", 0.98, (tuple(units),) if units else (), left_out=left_out
    )
