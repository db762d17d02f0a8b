"""The least that a meta-step costs on a device: its arithmetic, and the calls that ask for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metaplug.bench.contestants import by_loss, stacked, torch_loop
from metaplug.bench.meters import CPU, ON_CPU, Meter
from metaplug.bench.workloads import Workload

SIDE, CUDA_SIDE = 512, 4096
"""Sides of the matrices whose product is timed: large enough for the full rate."""


@dataclass(frozen=True)
class Speed:
    """The best that this device does, with the threads as they are set.

    Attributes:
        flops_per_second: of a large matrix product in single precision.
        seconds_per_call: of the smallest operation that autograd records.
        precision: of the product: float32 or TF32.
    """

    flops_per_second: float
    seconds_per_call: float
    precision: str = "float32"

    def or_better(self, other: Speed) -> Speed:
        """Return the best of both: whatever else runs can only slow a device."""
        flops = max(self.flops_per_second, other.flops_per_second)
        return Speed(flops, min(self.seconds_per_call, other.seconds_per_call), self.precision)


@dataclass(frozen=True)
class Limit:
    """The least that one meta-step costs, whoever makes it.

    Attributes:
        flops: of its matrix products and convolutions, backward passes included; `milliseconds` is
            what they take at the rate of a large matrix product.
        calls: operators that torch calls in a step with all tasks stacked; `calls_milliseconds` is
            what as many of the smallest operation take.
        overhead_bound: whether the calls take longer than the arithmetic, so the limit says
            nothing of a library that calls one by one.
    """

    flops: int
    milliseconds: float
    calls: int
    calls_milliseconds: float
    overhead_bound: bool
    speed: Speed


def measure_speed(meter: Meter = ON_CPU) -> Speed:
    """Return the best of some repeats on the meter's device; about half a second."""

    def best(work: Callable[[], object], repeats: int) -> float:
        return min(meter.timed(work) for _ in range(repeats)) / 1e3

    side, repeats = (CUDA_SIDE, 50) if meter.cuda else (SIDE, 200)
    matrix = torch.rand(side, side, device=meter.device)
    small = torch.rand(4, device=meter.device, requires_grad=True)
    product = best(lambda: matrix @ matrix, repeats)
    calls = best(lambda: [small + small for _ in range(100)], 50)
    return Speed(2 * side**3 / product, calls / 100, meter.precision)


def limit(workload: Workload, speed: Speed, device: torch.device = CPU) -> Limit:
    """Count one step of a workload, on a device.

    The arithmetic is the plain loop's, as the counter takes the grouped convolutions of stacked
    tasks for dense ones; the calls are the stacked loop's, which makes the fewest.
    """
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415 -- imports triton

    model, batch = workload.build(device)
    with FlopCounterMode(display=False) as counted:
        by_loss(torch_loop, model, batch, workload).gradient()
    with _Calls() as calls:  # type: ignore[no-untyped-call]
        by_loss(stacked, model, batch, workload).gradient()
    flops = counted.get_total_flops()
    arithmetic = 1e3 * flops / speed.flops_per_second
    overhead = 1e3 * calls.count * speed.seconds_per_call
    return Limit(flops, arithmetic, calls.count, overhead, overhead > arithmetic, speed)


class _Calls(TorchDispatchMode):
    """Counts the operators that are called while it is active."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))
