"""Every contestant on every workload, in turn: time, share of the limit, error, memory."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from metaplug.bench.contestants import (
    Contestant,
    MetaGradient,
    Prepared,
    by_loss,
    own_contestants,
    tensors_of,
    torch_loop,
)
from metaplug.bench.limits import Limit, Speed, limit, measure_speed
from metaplug.bench.meters import ON_CPU, Meter
from metaplug.bench.peers import COMPILED, peers
from metaplug.bench.workloads import WORKLOADS, Workload
from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import MetaplugError, RequestError, unknown

PACKAGES = ("higher", "learn2learn", "torchopt", "betty-ml", "parallel-metalearn", "jax")
"""Distributions whose versions a measurement depends on, where they are installed."""


@dataclass(frozen=True)
class Row:
    """One contestant on one workload; what is None was not measured, or has no meaning.

    Attributes:
        milliseconds: median over the repeats; None where it cannot do the work.
        spread: half the distance of the quartiles, in milliseconds.
        gradient_error: the largest difference of its meta-gradient from the plain loop's, in
            float64, over the largest entry of the latter; None for another algorithm.
        graph_mib: what torch's allocator holds for the graph of all tasks, MiB.
        peak_mib: the most that it holds in the course of a step, MiB.
        limit: the least that the workload costs.
        share: the limit's milliseconds over its own; None for another algorithm.
        reason: why it cannot do the work.
        busy: the share of the time in which a CUDA device computes or copies; metaplug's alone.
    """

    workload: str
    contestant: str
    milliseconds: float | None
    spread: float | None
    gradient_error: float | None
    graph_mib: float | None
    peak_mib: float | None
    limit: Limit
    share: float | None = None
    reason: str | None = None
    busy: float | None = None

    @property
    def meta_steps_per_minute(self) -> float | None:
        """Another way to say its time."""
        return None if self.milliseconds is None else 60_000 / self.milliseconds


def run(
    workloads: Sequence[str],
    plugins: Sequence[str],
    *,
    repeats: int,
    memory: bool,
    only: Sequence[str] = (),
    compiled: bool = False,
    meter: Meter = ON_CPU,
    on_workload: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure every contestant on every workload, interleaved, `repeats` times each.

    Before each step that is timed a contestant makes one that is not: in training, too, a step
    follows one of its own, whose memory and code are still in the processor's caches.

    Args:
        plugins: one more contestant for each.
        only: names of contestants, the others are left out; empty for all.
        compiled: add those that compile for half a minute or more; else those `only` names.
        meter: holds the device of models and tasks; CUDA adds metaplug's captured steps.

    Raises:
        RequestError: an unknown workload or contestant; the nearest is offered.
    """
    compiled = compiled or any("compiled" in name for name in only)
    made = contestants(plugins, compiled=compiled, captured=meter.cuda)
    check_names("workload", workloads, WORKLOADS)
    check_names("contestant", only, made)
    chosen = {name: each for name, each in made.items() if not only or name in only}
    with meter.active():
        speed, rows = measure_speed(meter), list[Row]()
        for name in workloads:
            on_workload(name)
            rows += _measure(WORKLOADS[name], chosen, speed, repeats, memory=memory, meter=meter)
            speed = rows[-1].limit.speed
    return rows


def contestants(
    plugins: Sequence[str], *, compiled: bool = False, captured: bool = False
) -> dict[str, Contestant]:
    """Return by name what makes a step and a meta-gradient."""
    others = {name: each for name, each in peers().items() if compiled or name != COMPILED}
    return {**own_contestants(plugins, compiled=compiled, captured=captured), **others}


def check_names(kind: str, names: Sequence[str], known: Mapping[str, object]) -> None:
    """Refuse an unknown name, with the nearest that there is."""
    for name in names:
        if name not in known:
            raise unknown(kind, name, list(known))


def as_json_values(rows: Sequence[Row], repeats: int, meter: Meter = ON_CPU) -> dict[str, Any]:
    """Return the rows with what they were measured on."""
    values = [{**asdict(row), "meta_steps_per_minute": row.meta_steps_per_minute} for row in rows]
    return {**surroundings(repeats, meter), "rows": values}


def surroundings(repeats: int, meter: Meter = ON_CPU) -> dict[str, Any]:
    """Return what a measurement depends on beside its subject."""
    installed = {each.name: each.version for each in importlib.metadata.distributions()}
    return {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "packages": {name: installed[name] for name in PACKAGES if name in installed},
        "threads": torch.get_num_threads(),
        "device": meter.name,
        "cuda": torch.version.cuda if meter.cuda else None,
        "precision": meter.precision,
        "repeats": repeats,
    }


def median_and_spread(taken: Sequence[float]) -> tuple[float, float]:
    """Return the median, and half the distance of the quartiles."""
    low, _, high = statistics.quantiles(taken) if len(taken) > 1 else [*taken] * 3
    return statistics.median(taken), (high - low) / 2


def _measure(
    workload: Workload,
    made: Mapping[str, Contestant],
    speed: Speed,
    repeats: int,
    *,
    memory: bool,
    meter: Meter,
) -> list[Row]:
    model, batch = workload.build(meter.device)
    exact = copy.deepcopy(model).double(), _double(batch), workload
    reference = by_loss(torch_loop, *exact).gradient()
    ready: dict[str, Prepared] = {}
    errors: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for name, each in made.items():
        try:
            with _hushed(each):
                _check_installed(each)
                own = each.prepare(copy.deepcopy(exact[0]), *exact[1:])
                errors[name] = _error(own.gradient(), reference) if each.same_algorithm else None
                prepared = each.prepare(copy.deepcopy(model), batch, workload)
                for _ in range(meter.warm_ups):
                    prepared.step()
                ready[name] = prepared
        except Exception as error:
            full = torch.OutOfMemoryError in (type(error), type(error.__cause__))
            if each.module is None and not isinstance(error, RequestError) and not full:
                raise
            reasons[name] = _in_a_line(error)
    times: dict[str, list[float]] = {name: [] for name in ready}
    for repeat in range(repeats):  # back and forth, so a drift of the machine meets all alike
        for name in list(ready) if repeat % 2 else reversed(ready):
            with _hushed(made[name]):
                ready[name].step()
                times[name].append(meter.timed(ready[name].step))
    least = limit(workload, speed.or_better(measure_speed(meter)), meter.device)
    rows = []
    for name, each in made.items():
        median = spread = graph = peak = share = busy = None
        if one := ready.get(name):
            median, spread = median_and_spread(times[name])
            share = least.milliseconds / median if each.same_algorithm else None
            with _hushed(each):
                graph = meter.memory(one.graph)[1] if memory and one.graph else None
                peak = meter.memory(one.step)[0] if memory and one.torch_memory else None
                working = meter.busy_milliseconds(one.step) if name.startswith("metaplug") else None
            # The clock beside the profiler's may run a little faster.
            busy = None if working is None else min(working / median, 1.0)
        measured = (median, spread, errors.get(name), graph, peak, least, share)
        rows.append(Row(workload.name, name, *measured, reasons.get(name), busy))
    return rows


def _check_installed(contestant: Contestant) -> None:
    if contestant.module and importlib.util.find_spec(contestant.module) is None:
        raise RequestError("not installed here; make bench-peers installs what can be had")


def _hushed(contestant: Contestant) -> AbstractContextManager[Any]:
    """Others' warnings are not for our users to act on."""
    return nullcontext() if contestant.module is None else warnings.catch_warnings(action="ignore")


def _in_a_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, MetaplugError) else f"{type(error).__name__}: {text}"


def _double(batch: TaskBatch) -> TaskBatch:
    return TaskBatch(*(x.double() if x.is_floating_point() else x for x in tensors_of(batch)))


def _error(gradients: MetaGradient, reference: MetaGradient) -> float:
    scale = max(float(gradient.abs().max()) for gradient in reference.values())
    differences = (gradients[name].detach() - reference[name] for name in reference)
    return max(float(difference.abs().max()) for difference in differences) / scale
