"""Whether a long run stays as it began: its memory, open files, threads, and time of a step."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import linregress

from metaplug.bench.measuring import check_names, surroundings
from metaplug.bench.meters import ON_CPU, Meter
from metaplug.bench.process import open_files, resident_mib, threads
from metaplug.bench.soak_workloads import SOAKS
from metaplug.errors import RequestError
from metaplug.evaluation.history import Record
from metaplug.experiments.runs import train

WARM_UP = 0.1
"""The part of a run that warms up. Schedules that change the computation end within half of it."""

MOST_MEMORY = 0.02
"""The most that memory may differ from what it was after warm-up, as a part of that."""

MOST_SLOWER = 0.05
"""The most by which the last quarter may be slower than the first, where it is not noise."""

MOST_SAMPLES = 200
FEWEST_STEPS = 50
_MEMORY = {
    "resident memory": "resident_mib",
    "CUDA memory in use": "allocated_mib",
    "CUDA memory held": "reserved_mib",
}


@dataclass(frozen=True)
class Sample:
    """What the process holds after a meta-step, its log line, validation and checkpoint.

    Attributes:
        iteration: meta-steps done.
        resident_mib: the process's resident memory, MiB; None where there is no /proc.
        open_files, threads: of the process; None likewise.
        allocated_mib, reserved_mib: of torch's CUDA allocator, MiB; None on a CPU.
        milliseconds: the median step since the sample before: CPU time of the process on a CPU, so
            others on the machine do not count; the time from record to record on CUDA.
    """

    iteration: int
    resident_mib: float | None
    open_files: int | None
    threads: int | None
    allocated_mib: float | None
    reserved_mib: float | None
    milliseconds: float


@dataclass(frozen=True)
class Soaked:
    """A run that was watched. Figures are of the samples after warm-up, a tenth of the run.

    Attributes:
        left_out: the plugins that did not fit, each with the reason.
        seconds: of the whole run, by the clock.
    """

    workload: str
    steps: int
    plugins: tuple[str, ...]
    left_out: Mapping[str, str]
    seconds: float
    samples: tuple[Sample, ...]

    @property
    def warm(self) -> tuple[Sample, ...]:
        """The samples after warm-up."""
        return tuple(sample for sample in self.samples if sample.iteration > WARM_UP * self.steps)

    @property
    def quarters(self) -> tuple[float, float]:
        """The median milliseconds of a step in the first and in the last quarter."""
        times = [sample.milliseconds for sample in self.warm]
        quarter = max(len(times) // 4, 1)
        return statistics.median(times[:quarter]), statistics.median(times[-quarter:])

    @property
    def memory(self) -> dict[str, list[float]]:
        """The MiB by kind of memory, of those that are known."""
        found = {
            kind: [getattr(each, name) for each in self.warm] for kind, name in _MEMORY.items()
        }
        return {kind: values for kind, values in found.items() if None not in values}

    @property
    def memory_after_warm_up(self) -> dict[str, float]:
        """The median of the first tenth of `memory`: a sample may come just after a validation."""
        return {
            kind: statistics.median(values[: max(len(values) // 10, 1)])
            for kind, values in self.memory.items()
        }

    @property
    def memory_change(self) -> dict[str, float]:
        """The largest difference from `memory_after_warm_up`, as a part of that, with its sign."""
        begun = self.memory_after_warm_up
        return {
            kind: max(((value - begun[kind]) / (begun[kind] or 1) for value in values), key=abs)
            for kind, values in self.memory.items()
        }

    @property
    def slower(self) -> float:
        """The time of a step in the last quarter over that in the first, minus 1."""
        first, last = self.quarters
        return last / first - 1

    @property
    def drift(self) -> float:
        """The slope of a line through the times, over their whole length, as a part of the mean."""
        return self._line()[0]

    @property
    def drift_error(self) -> float:
        """The standard error of `drift` from the noise around the line."""
        return self._line()[1]

    def _line(self) -> tuple[float, float]:
        times = [sample.milliseconds for sample in self.warm]
        line = linregress(range(len(times)), times)
        whole = (len(times) - 1) / statistics.fmean(times)
        return float(line.slope * whole), float(line.stderr * whole)

    @property
    def broken(self) -> tuple[str, ...]:
        """The bounds that do not hold, in words; empty where the run stayed as it began."""
        found = [
            f"{kind} moved by {100 * change:+.1f} % after warm-up, at most "
            f"{100 * MOST_MEMORY:g} % are allowed"
            for kind, change in self.memory_change.items()
            if abs(change) > MOST_MEMORY
        ]
        for name in ("open_files", "threads"):
            counts = [count for each in self.warm if (count := getattr(each, name)) is not None]
            if len(set(counts)) > 1:
                went = f"went from {counts[0]} after warm-up to {counts[-1]}"
                kind = name.replace("_", " ")
                found.append(f"{kind} {went}, between {min(counts)} and {max(counts)}")
        if self.slower > MOST_SLOWER and self.drift > 2 * self.drift_error:
            first, last = self.quarters
            found.append(
                f"a step took {last:.2f} ms in the last quarter, {first:.2f} ms in the first: "
                f"{100 * self.slower:+.1f} %"
            )
        return tuple(found)


def run(
    name: str,
    *,
    steps: int | None = None,
    meter: Meter = ON_CPU,
    on_record: Callable[[Record], None] = lambda _: None,
) -> Soaked:
    """Meta-train a workload as `metaplug train` does, and look at the process at even distances.

    Args:
        name: in SOAKS.
        steps: meta-steps, at least 50; default: the workload's own.
        on_record: as in `metaplug.experiments.runs.train`; what it takes counts.

    Raises:
        RequestError: an unknown workload; the nearest is offered. Or too few steps.
    """
    check_names("soak workload", [name], SOAKS)
    workload = SOAKS[name]
    steps = workload.steps if steps is None else steps
    if steps < FEWEST_STEPS:
        raise RequestError(
            f"a soak of {steps} meta-steps has too few samples to tell growth from noise: give at "
            f"least {FEWEST_STEPS}"
        )
    watch = Watch(steps, meter)

    def record(record: Record) -> None:
        on_record(record)
        watch.record(record.step.iteration)

    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="metaplug-soak-") as folder, meter.active():
        config, started = workload.config(steps, meter), lambda _: watch.start()
        train(config, Path(folder) / name, on_start=started, on_record=record)
    seconds, samples = time.monotonic() - begun, tuple(watch.samples)
    return Soaked(name, steps, workload.plugins, workload.left_out, seconds, samples)


def as_json_values(runs: Sequence[Soaked], meter: Meter = ON_CPU) -> dict[str, Any]:
    """Return the runs with what they were measured on."""
    where = surroundings(1, meter)
    del where["repeats"]
    found = ("memory_change", "slower", "drift", "drift_error", "broken", "quarters")
    return {
        **where,
        "warm_up": WARM_UP,
        "most_memory": MOST_MEMORY,
        "most_slower": MOST_SLOWER,
        "runs": [{**asdict(run), **{name: getattr(run, name) for name in found}} for run in runs],
    }


class Watch:
    """Takes the samples of a run. They are few and small, so the watch itself does not count."""

    def __init__(self, steps: int, meter: Meter) -> None:
        self.samples: list[Sample] = []
        self._every, self._meter = -(-steps // MOST_SAMPLES), meter
        self._clock = time.perf_counter if meter.cuda else time.process_time
        self._times: list[float] = []
        self._last = 0.0

    def start(self) -> None:
        """Let the first step begin now."""
        self._last = self._clock()

    def record(self, iteration: int) -> None:
        """Note the time of a step, and a sample where one is due."""
        self._times.append(1e3 * (self._clock() - self._last))
        if iteration % self._every == 0:
            allocated = reserved = None
            if self._meter.cuda:
                allocated = torch.cuda.memory_allocated(self._meter.device) / 2**20
                reserved = torch.cuda.memory_reserved(self._meter.device) / 2**20
            process, median = (
                (resident_mib(), open_files(), threads()),
                statistics.median(self._times),
            )
            self.samples.append(Sample(iteration, *process, allocated, reserved, median))
            self._times.clear()
        self._last = self._clock()
