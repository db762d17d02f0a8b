"""Every contestant on every workload, in turn: its time, its share of the limit, the error of its meta-gradient, its memory."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
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
    """One contestant on one workload.

    Attributes:
        milliseconds: median over the repeats; None where it cannot do the work.
        spread: half the distance of the quartiles, in milliseconds.
        gradient_error: the largest difference of its meta-gradient from the plain loop's, in float64, over the largest entry of the latter;
            None where it is another algorithm.
        graph_mib: what torch's allocator holds for the graph of all tasks, MiB; None where it was not measured, or there is none.
        peak_mib: the most that it holds in the course of a step, MiB; None where it was not measured.
        limit: what the workload costs at least.
        share: the limit's milliseconds over its own; None where it is another algorithm, whose arithmetic is another.
        reason: why it cannot do the work.
        busy: the share of its time in which a CUDA device computes or copies, at most 1; None on a CPU, and for others than metaplug.
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
    """Measure every contestant on every workload, interleaved, `repeats` times each; one more contestant for each plugin.

    Args:
        only: names of contestants; the others are left out. Empty for all.
        compiled: the contestants that take half a minute or more to compile too; without it, those of them that `only` names.
        meter: measures on its device, where all models and tasks are; a CUDA device adds metaplug's captured steps.

    Raises:
        RequestError: an unknown workload or contestant; the nearest is offered.
    """
    made = contestants(
        plugins, compiled=compiled or any("compiled" in name for name in only), captured=meter.cuda
    )
    for kind, names, known in (
        ("workload", workloads, list(WORKLOADS)),
        ("contestant", only, list(made)),
    ):
        for name in names:
            if name not in known:
                raise unknown(kind, name, known)
    chosen = {each: make for each, make in made.items() if not only or each in only}
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
    """By name, what makes a step and a meta-gradient from a model, a batch and a workload."""
    others = {
        name: contestant for name, contestant in peers().items() if compiled or name != COMPILED
    }
    return {**own_contestants(plugins, compiled=compiled, captured=captured), **others}


def as_json_values(rows: Sequence[Row], repeats: int, meter: Meter = ON_CPU) -> dict[str, Any]:
    """The rows with what they were measured on."""
    values = [{**asdict(row), "meta_steps_per_minute": row.meta_steps_per_minute} for row in rows]
    return {**surroundings(repeats, meter), "rows": values}


def surroundings(repeats: int, meter: Meter = ON_CPU) -> dict[str, Any]:
    """What a measurement depends on beside its subject."""
    versions = {
        distribution.name: distribution.version
        for distribution in importlib.metadata.distributions()
    }
    return {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "packages": {name: versions[name] for name in PACKAGES if name in versions},
        "threads": torch.get_num_threads(),
        "device": meter.name,
        "cuda": torch.version.cuda if meter.cuda else None,
        "precision": meter.precision,
        "repeats": repeats,
    }


def spread(taken: Sequence[float]) -> float:
    """Half the distance of the quartiles."""
    quartiles = statistics.quantiles(taken) if len(taken) > 1 else [*taken] * 3
    return (quartiles[2] - quartiles[0]) / 2


def _measure(
    workload: Workload,
    made: dict[str, Contestant],
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
    for name, contestant in made.items():
        try:
            with _hushed(contestant):
                _check_installed(contestant)
                own = contestant.prepare(copy.deepcopy(exact[0]), *exact[1:])
                errors[name] = (
                    _error(own.gradient(), reference) if contestant.same_algorithm else None
                )
                ready[name] = contestant.prepare(copy.deepcopy(model), batch, workload)
                for _ in range(meter.warm_ups):
                    ready[name].step()
        except Exception as error:
            full = isinstance(error, torch.OutOfMemoryError) or isinstance(
                error.__cause__, torch.OutOfMemoryError
            )
            if contestant.module is None and not isinstance(error, RequestError) and not full:
                raise
            ready.pop(name, None)
            reasons[name] = _in_a_line(error)
    times: dict[str, list[float]] = {name: [] for name in ready}
    for repeat in range(repeats):
        for name in list(ready) if repeat % 2 else reversed(ready):
            with _hushed(made[name]):
                times[name].append(meter.timed(ready[name].step))
    least = limit(workload, speed.or_better(measure_speed(meter)), meter.device)
    rows = []
    for name, contestant in made.items():
        if name in reasons:
            rows.append(
                Row(workload.name, name, None, None, None, None, None, least, reason=reasons[name])
            )
            continue
        median, one = statistics.median(times[name]), ready[name]
        with _hushed(contestant):
            graph = meter.memory(one.graph)[1] if memory and one.graph else None
            peak = meter.memory(one.step)[0] if memory and one.torch_memory else None
            working = meter.busy_milliseconds(one.step) if name.startswith("metaplug") else None
        busy = (
            None if working is None else min(working / median, 1.0)
        )  # the clock beside the profiler's may run a little faster
        share = least.milliseconds / median if contestant.same_algorithm else None
        rows.append(
            Row(
                workload.name,
                name,
                median,
                spread(times[name]),
                errors[name],
                graph,
                peak,
                least,
                share,
                busy=busy,
            )
        )
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
    tensors = (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
    return TaskBatch(
        *(tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors)
    )


def _error(gradients: MetaGradient, reference: MetaGradient) -> float:
    scale = max(float(gradient.abs().max()) for gradient in reference.values())
    return (
        max(float((gradients[key].detach() - reference[key]).abs().max()) for key in reference)
        / scale
    )
