"""What a meta-step costs at least on this device: its arithmetic at the rate of a large matrix product, and the calls that ask for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from metaplug.bench.contestants import by_loss, stacked, torch_loop
from metaplug.bench.workloads import Workload

SIDE = 512
"""Of the square matrices whose product is timed: large enough for the full rate, and done before the system runs another process."""


@dataclass(frozen=True)
class Speed:
    """What this device does at best, in single precision and with the threads as they are set.

    Attributes:
        flops_per_second: of a large matrix product.
        seconds_per_call: of the smallest operation that autograd records.
    """

    flops_per_second: float
    seconds_per_call: float

    def or_better(self, other: Speed) -> Speed:
        """The best of both, as whatever else runs can only slow a device."""
        return Speed(max(self.flops_per_second, other.flops_per_second), min(self.seconds_per_call, other.seconds_per_call))


@dataclass(frozen=True)
class Limit:
    """The least that one meta-step costs, whoever makes it.

    Attributes:
        flops: floating-point operations of its matrix products and convolutions, backward passes included.
        milliseconds: what they take at the rate of a large matrix product.
        calls: operators that torch calls in a step with all tasks stacked.
        calls_milliseconds: what as many of the smallest operation take.
        overhead_bound: the calls take longer than the arithmetic, so that the limit says nothing of a library that calls one by one.
        speed: what all this is measured against.
    """

    flops: int
    milliseconds: float
    calls: int
    calls_milliseconds: float
    overhead_bound: bool
    speed: Speed


def measure_speed() -> Speed:
    """The best of some repeats; about half a second."""
    matrix, small = torch.rand(SIDE, SIDE), torch.rand(4, requires_grad=True)
    product = _best(lambda: matrix @ matrix, 200)
    calls = _best(lambda: [small + small for _ in range(100)], 50)
    return Speed(2 * SIDE**3 / product, calls / 100)


def limit(workload: Workload, speed: Speed) -> Limit:
    """Count one step of a workload.

    The arithmetic is counted in the plain loop, as the counter takes the grouped convolutions of stacked tasks for dense ones; the calls in
    the stacked loop, which makes the fewest.
    """
    model, batch = workload.build()
    with FlopCounterMode(display=False) as counted:
        by_loss(torch_loop, model, batch, workload).gradient()
    with _Calls() as calls:  # type: ignore[no-untyped-call]
        by_loss(stacked, model, batch, workload).gradient()
    flops = counted.get_total_flops()
    arithmetic, overhead = 1e3 * flops / speed.flops_per_second, 1e3 * calls.count * speed.seconds_per_call
    return Limit(flops, arithmetic, calls.count, overhead, overhead > arithmetic, speed)


class _Calls(TorchDispatchMode):
    """Counts the operators that are called while it is active."""

    count = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _best(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some repeats."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)
