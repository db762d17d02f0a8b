"""What measures work on a device: a clock that waits for it, its memory, and how long the device itself is busy."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from metaplug.execution.precision import arithmetic

CPU = torch.device("cpu")
PROFILED = 3
"""Steps whose kernels are added up to see how busy a device is."""


@dataclass(frozen=True)
class Meter:
    """Measures on one device.

    Attributes:
        device: the CPU or a CUDA device.
        tf32: whether float32 products and convolutions on a CUDA device may round to TF32; else they are float32 proper.
        synchronise: waits until the device has done all that it was asked for. Default: torch's way, which on a CPU is not to wait.
    """

    device: torch.device = CPU
    tf32: bool = False
    synchronise: Callable[[], object] | None = None

    @property
    def cuda(self) -> bool:
        """Whether the device works on its own, with memory of its own."""
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        """What the device calls itself."""
        return torch.cuda.get_device_name(self.device) if self.cuda else _cpu_name()

    @property
    def precision(self) -> str:
        """Of float32 products and convolutions: float32 or TF32."""
        return "TF32" if self.cuda and self.tf32 else "float32"

    @property
    def warm_ups(self) -> int:
        """Steps before the first that counts: on CUDA, kernels are loaded and chosen in the first ones."""
        return 3 if self.cuda else 1

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the device is torch's current one, and products and convolutions are of its precision."""
        with (
            arithmetic("tf32" if self.tf32 else "float32", self.device),
            torch.cuda.device(self.device) if self.cuda else nullcontext(),
        ):
            yield

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.synchronise:
            self.synchronise()
        elif self.cuda:
            torch.cuda.synchronize(self.device)

    def timed(self, work: Callable[[], object]) -> float:
        """Milliseconds from an idle device to an idle device."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return 1e3 * (time.perf_counter() - start)

    def memory(self, work: Callable[[], object]) -> tuple[float, float]:
        """(most, left): the most MiB that torch's allocator held for `work` while it ran, and what its result still holds."""
        if not self.cuda:
            return torch_memory(work)
        gc.collect()  # what is freed in the course of the work would count against it
        self.wait()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = work()
        self.wait()
        most, left = (
            torch.cuda.max_memory_allocated(self.device),
            torch.cuda.memory_allocated(self.device),
        )
        del result
        return (most - before) / 2**20, (left - before) / 2**20

    def busy_milliseconds(self, work: Callable[[], object]) -> float | None:
        """How long a CUDA device computes or copies for one `work`, without its waits; None on a CPU, and where torch's profiler sees no
        device."""
        if not self.cuda:
            return None
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(PROFILED):
                work()
            self.wait()
        assert profiled.profiler is not None
        spans = device_spans(profiled.profiler.kineto_results.events())
        return covered(spans) / 1e6 / PROFILED if spans else None


ON_CPU = Meter()


def in_tf32(device: torch.device) -> bool:
    """Whether float32 products on the device round to TF32 now, as inside `Meter.active` of a meter that allows it."""
    return device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"


def torch_memory(work: Callable[[], object]) -> tuple[float, float]:
    """(most, left): the most MiB that torch's allocator held on the CPU while `work` ran, and what its result still holds."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = work()
    assert profiled.profiler is not None
    # The public list of events leaves out what happens inside operators.
    events: list[Any] = [
        event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held = list(
        accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    )
    del result
    return max(held) / 2**20, held[-1] / 2**20


def device_spans(events: Iterable[Any]) -> list[tuple[int, int]]:
    """(start, end) in nanoseconds of every kernel and copy on a CUDA device; a range that a person named there is no work."""
    on_device = (
        event
        for event in events
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation()
    )
    return [(event.start_ns(), event.start_ns() + event.duration_ns()) for event in on_device]


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """The length that spans cover together, each place once: kernels of several streams run at the same time."""
    total, reached = 0, 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(named), "") or platform.processor() or platform.machine()
