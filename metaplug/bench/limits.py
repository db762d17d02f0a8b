"""What a meta-step costs at least on this device: its arithmetic at the rate of a large matrix product, and the calls that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from metaplug.bench.contestants import by_loss, stacked, torch_loop
from metaplug.bench.meters import CPU, ON_CPU, Meter
from metaplug.bench.workloads import Workload

SIDE, CUDA_SIDE = 512, 4096
"""Of the square matrices whose product is timed: large enough for the full rate; on a CPU, done before another process runs."""


@dataclass(frozen=True)
class Speed:
    """What this device does at best, in single precision and with the threads as they are set.

    Attributes:
        flops_per_second: of a large matrix product.
        seconds_per_call: of the smallest operation that autograd records.
        precision: of the product: float32 proper, or TF32.
    """

    flops_per_second: float
    seconds_per_call: float
    precision: str = "float32"

    def or_better(self, other: Speed) -> Speed:
        """The best of both, as whatever else runs can only slow a device."""
        flops, call = (
            max(self.flops_per_second, other.flops_per_second),
            min(self.seconds_per_call, other.seconds_per_call),
        )
        return Speed(flops, call, self.precision)


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


def measure_speed(meter: Meter = ON_CPU) -> Speed:
    """The best of some repeats on the meter's device; about half a second."""
    side, repeats = (CUDA_SIDE, 50) if meter.cuda else (SIDE, 200)
    matrix, small = (
        torch.rand(side, side, device=meter.device),
        torch.rand(4, device=meter.device, requires_grad=True),
    )
    product = _best(meter, lambda: matrix @ matrix, repeats)
    calls = _best(meter, lambda: [small + small for _ in range(100)], 50)
    return Speed(2 * side**3 / product, calls / 100, meter.precision)


def limit(workload: Workload, speed: Speed, device: torch.device = CPU) -> Limit:
    """Count one step of a workload, on a device.

    The arithmetic is counted in the plain loop, as the counter takes the grouped convolutions of stacked tasks for dense ones; the calls in
    the stacked loop, which makes the fewest.
    """
    model, batch = workload.build(device)
    with FlopCounterMode(display=False) as counted:
        by_loss(torch_loop, model, batch, workload).gradient()
    with _Calls() as calls:  # type: ignore[no-untyped-call]
        by_loss(stacked, model, batch, workload).gradient()
    flops = counted.get_total_flops()
    arithmetic, overhead = (
        1e3 * flops / speed.flops_per_second,
        1e3 * calls.count * speed.seconds_per_call,
    )
    return Limit(flops, arithmetic, calls.count, overhead, overhead > arithmetic, speed)


class _Calls(TorchDispatchMode):
    """Counts the operators that are called while it is active."""

    count = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _best(meter: Meter, work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some repeats."""
    return min(meter.timed(work) for _ in range(repeats)) / 1e3
