"""What measures work on a device: a clock that waits for it, its memory, and how busy it is."""

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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from metaplug.execution.precision import arithmetic

CPU = torch.device("cpu")
PROFILED = 3
"""Steps whose kernels are added up to see how busy a device is."""


@dataclass(frozen=True)
class Meter:
    """Measures on the CPU or a CUDA device, where float32 products may round to TF32."""

    device: torch.device = CPU
    tf32: bool = False

    @property
    def cuda(self) -> bool:
        """Whether the device works on its own, with memory of its own."""
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        """The device's own name."""
        return torch.cuda.get_device_name(self.device) if self.cuda else _cpu_name()

    @property
    def precision(self) -> str:
        """The precision of float32 products and convolutions: float32 or TF32."""
        return "TF32" if self.cuda and self.tf32 else "float32"

    @property
    def warm_ups(self) -> int:
        """Steps that do not count: on CUDA, kernels are loaded and chosen in the first ones."""
        return 3 if self.cuda else 1

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the device torch's current one, round as configured, and let attention be derived.

        Its fused kernels, which torch prefers, have no second derivative; metaplug itself, whatever
        is set around it, takes the one that has.
        """
        current = torch.cuda.device(self.device) if self.cuda else nullcontext()
        rounding = arithmetic("tf32" if self.tf32 else "float32", self.device)
        with rounding, current, sdpa_kernel(SDPBackend.MATH):
            yield

    def wait(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def timed(self, work: Callable[[], object]) -> float:
        """Return the milliseconds from an idle device to an idle device."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return 1e3 * (time.perf_counter() - start)

    def memory(self, work: Callable[[], object]) -> tuple[float, float]:
        """Return the most MiB that torch's allocator held for `work`, and what its result holds."""
        if not self.cuda:
            return torch_memory(work)
        gc.collect()
        self.wait()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = work()
        self.wait()
        most = torch.cuda.max_memory_allocated(self.device) - before
        left = torch.cuda.memory_allocated(self.device) - before
        del result
        return most / 2**20, left / 2**20

    def busy_milliseconds(self, work: Callable[[], object]) -> float | None:
        """Return how long a CUDA device computes or copies for one `work`, without its waits.

        None on a CPU, and where torch's profiler sees no device.
        """
        if not self.cuda:
            return None
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(PROFILED):
                work()
            self.wait()
        spans = device_spans(_events(profiled))
        return covered(spans) / 1e6 / PROFILED if spans else None


ON_CPU = Meter()


def in_tf32(device: torch.device) -> bool:
    """Whether float32 products on the device round to TF32 now."""
    return device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"


def torch_memory(work: Callable[[], object]) -> tuple[float, float]:
    """Return the most MiB that torch's CPU allocator held for `work`, and what its result holds."""
    gc.collect()  # garbage that is freed in the course of the work would count against it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = work()
    events = [event for event in _events(profiled) if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = list(accumulate(event.nbytes() for event in events))
    del result
    return max(held) / 2**20, held[-1] / 2**20


def _events(profiled: profile) -> list[Any]:
    """Return every event; torch's public list leaves out what happens inside operators."""
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    return list(profiled.profiler.kineto_results.events())


def device_spans(events: Iterable[Any]) -> list[tuple[int, int]]:
    """Return start and end, in nanoseconds, of every kernel and copy on a CUDA device."""
    return [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events  # a range that a person named on the device is no work
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation()
    ]


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """Return the length that spans cover together: kernels of several streams overlap."""
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
