"""Whether a long run stays as it began: its memory, its open files, its threads, the time of its steps."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from metaplug.bench.measuring import surroundings
from metaplug.bench.meters import ON_CPU, Meter
from metaplug.bench.process import open_files, resident_mib, threads
from metaplug.bench.soak_workloads import SOAKS
from metaplug.errors import RequestError, unknown
from metaplug.evaluation.history import Record
from metaplug.experiments.build import Experiment
from metaplug.experiments.runs import train

WARM_UP = 0.1
"""The part of a run that is left to warm up. Schedules that change what a step computes end within half of it."""

MOST_MEMORY = 0.02
"""The most that memory may differ from what it was after warm-up, as a part of that."""

MOST_SLOWER = 0.05
"""The most that steps may take longer in the last quarter than in the first, as a part of the latter, where noise does not explain it."""

MOST_SAMPLES = 200
FEWEST_STEPS = 50


@dataclass(frozen=True)
class Sample:
    """What the process holds after a meta-step, with its log line, validation and checkpoint.

    Attributes:
        iteration: meta-steps done.
        resident_mib: the process's resident memory, MiB; None where /proc is not, as on systems other than Linux.
        open_files, threads: of the process; None likewise.
        allocated_mib, reserved_mib: what torch's CUDA allocator has given out and holds, MiB; None on a CPU.
        milliseconds: of a step, the median since the sample before: CPU time of the process on a CPU, so that others on the machine do not
            count; the time from record to record on CUDA.
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
    """A run that was watched, and what it comes to; "after warm-up" is the first sample after a tenth of the run, and those behind it.

    Attributes:
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
        """The median milliseconds of a step in the first and the last quarter after warm-up."""
        times = [sample.milliseconds for sample in self.warm]
        quarter = max(len(times) // 4, 1)
        return statistics.median(times[:quarter]), statistics.median(times[-quarter:])

    @property
    def memory(self) -> dict[str, list[float]]:
        """By kind, the MiB after warm-up, of those that are known."""
        kinds = {
            "resident memory": "resident_mib",
            "CUDA memory in use": "allocated_mib",
            "CUDA memory held": "reserved_mib",
        }
        found = {
            what: [getattr(sample, name) for sample in self.warm] for what, name in kinds.items()
        }
        return {what: values for what, values in found.items() if None not in values}

    @property
    def memory_after_warm_up(self) -> dict[str, float]:
        """By kind, the median MiB of the first tenth of the samples after warm-up: one may lie just behind a validation."""
        return {
            what: statistics.median(values[: max(len(values) // 10, 1)])
            for what, values in self.memory.items()
        }

    @property
    def memory_change(self) -> dict[str, float]:
        """By kind, the largest difference from `memory_after_warm_up`, as a part of that, with its sign."""
        begun = self.memory_after_warm_up
        return {what: _largest_change(values, begun[what]) for what, values in self.memory.items()}

    @property
    def slower(self) -> float:
        """The median time of a step in the last quarter after warm-up over that in the first, minus 1."""
        first, last = self.quarters
        return last / first - 1

    @property
    def drift(self) -> float:
        """The slope of a straight line through the times after warm-up, over the whole of them, as a part of their mean."""
        return _drift([sample.milliseconds for sample in self.warm])[0]

    @property
    def drift_error(self) -> float:
        """The standard error of `drift` from the noise around the line."""
        return _drift([sample.milliseconds for sample in self.warm])[1]

    @property
    def broken(self) -> tuple[str, ...]:
        """The bounds that do not hold, in words; empty where the run stayed as it began."""
        found = [
            f"{what} moved by {100 * change:+.1f} % after warm-up, at most {100 * MOST_MEMORY:g} % are allowed"
            for what, change in self.memory_change.items()
            if abs(change) > MOST_MEMORY
        ]
        for what, name in (("open files", "open_files"), ("threads", "threads")):
            counts = [count for sample in self.warm if (count := getattr(sample, name)) is not None]
            if len(set(counts)) > 1:
                found.append(
                    f"{what} went from {counts[0]} after warm-up to {counts[-1]}, between {min(counts)} and {max(counts)}"
                )
        if self.slower > MOST_SLOWER and self.drift > 2 * self.drift_error:
            first, last = self.quarters
            found.append(
                f"a step took {last:.2f} ms in the last quarter, {first:.2f} ms in the first: {100 * self.slower:+.1f} %"
            )
        return tuple(found)


def run(
    name: str,
    *,
    steps: int | None = None,
    meter: Meter = ON_CPU,
    on_start: Callable[[Experiment], None] = lambda _: None,
    on_record: Callable[[Record], None] = lambda _: None,
) -> Soaked:
    """Meta-train a workload as `metaplug train` does, with its files in a temporary folder, and look at the process at even distances.

    Args:
        name: in SOAKS.
        steps: meta-steps, at least 50; default: the workload's own.
        on_start, on_record: as in `metaplug.experiments.runs.train`; what they take counts.

    Raises:
        RequestError: an unknown workload; the nearest is offered. Or too few steps.
    """
    check_workloads([name])
    workload = SOAKS[name]
    steps = workload.steps if steps is None else steps
    if steps < FEWEST_STEPS:
        raise RequestError(
            f"a soak of {steps} meta-steps has too few samples to tell growth from noise: give at least {FEWEST_STEPS}"
        )
    watch = _Watch(steps, meter)

    def record(record: Record) -> None:
        on_record(record)
        watch.record(record.step.iteration)

    def start(experiment: Experiment) -> None:
        on_start(experiment)
        watch.start()

    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="metaplug-soak-") as folder, meter.active():
        train(workload.config(steps, meter), Path(folder) / name, on_start=start, on_record=record)
    seconds = time.monotonic() - begun
    return Soaked(name, steps, workload.plugins, workload.left_out, seconds, watch.samples())


def check_workloads(names: Sequence[str]) -> None:
    """Refuse an unknown workload, with the nearest that there is."""
    for name in names:
        if name not in SOAKS:
            raise unknown("soak workload", name, SOAKS)


def as_json_values(runs: Sequence[Soaked], meter: Meter = ON_CPU) -> dict[str, Any]:
    """The runs with what they were measured on."""
    bounds = {"warm_up": WARM_UP, "most_memory": MOST_MEMORY, "most_slower": MOST_SLOWER}
    where = {name: value for name, value in surroundings(1, meter).items() if name != "repeats"}
    return {
        **where,
        **bounds,
        "runs": [
            {**asdict(each), **{name: getattr(each, name) for name in _FOUND}} for each in runs
        ],
    }


_FOUND = ("memory_change", "slower", "drift", "drift_error", "broken", "quarters")
"""What a run comes to, beside the samples that it is worked out from."""


class _Watch:
    """Takes the samples of a run. All that it fills in is there before the first step, so that it does not grow itself."""

    def __init__(self, steps: int, meter: Meter) -> None:
        self._every, self._meter = -(-steps // MOST_SAMPLES), meter
        self._clock = time.perf_counter if meter.cuda else time.process_time
        self._times = array("d", [0.0]) * steps
        self._rows = [array("d", [0.0]) * 5 for _ in range(steps // self._every)]
        self._last = 0.0

    def start(self) -> None:
        self._last = self._clock()

    def record(self, iteration: int) -> None:
        self._times[iteration - 1] = 1e3 * (self._clock() - self._last)
        if iteration % self._every == 0:
            row = self._rows[iteration // self._every - 1]
            for place, value in enumerate((resident_mib(), open_files(), threads(), *self._cuda())):
                row[place] = math.nan if value is None else value
        self._last = self._clock()

    def samples(self) -> tuple[Sample, ...]:
        found = []
        for number, row in enumerate(self._rows):
            resident, files, running, allocated, reserved = (
                None if math.isnan(value) else value for value in row
            )
            median = statistics.median(
                self._times[number * self._every : (number + 1) * self._every]
            )
            counts = (
                None if files is None else int(files),
                None if running is None else int(running),
            )
            found.append(
                Sample((number + 1) * self._every, resident, *counts, allocated, reserved, median)
            )
        return tuple(found)

    def _cuda(self) -> tuple[float | None, float | None]:
        if not self._meter.cuda:
            return None, None
        return torch.cuda.memory_allocated(self._meter.device) / 2**20, torch.cuda.memory_reserved(
            self._meter.device
        ) / 2**20


def _largest_change(values: Sequence[float], begun: float) -> float:
    return max(
        (
            (value / begun - 1) if begun else math.copysign(math.inf, value) if value else 0.0
            for value in values
        ),
        key=abs,
    )


def _drift(times: Sequence[float]) -> tuple[float, float]:
    """The slope of a straight line over the whole length and its standard error, as parts of the mean."""
    count, mean = len(times), statistics.fmean(times)
    line = statistics.linear_regression(range(count), times)
    rest = sum(
        (value - line.intercept - line.slope * place) ** 2 for place, value in enumerate(times)
    )
    spread = (count**3 - count) / 12  # Σ (place − mean place)²
    length = (count - 1) / mean
    return line.slope * length, math.sqrt(rest / (count - 2) / spread) * length
