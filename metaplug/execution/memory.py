"""What a meta-step takes of memory, estimated before the run; and what to do where that is too much, or was."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from metaplug.contract.task_batch import TaskBatch
from metaplug.core.inner_loop import recording
from metaplug.errors import MetaplugError, RunError
from metaplug.execution.chunks import ChunkedDerivation
from metaplug.execution.engine import Engine
from metaplug.execution.free_memory import available, ran_out, size_text
from metaplug.execution.small_steps import SmallSteps, work_text

ROOM = 0.8
"""The share of the free memory that a setting may take, by estimate, to be offered as a mend."""


@dataclass(frozen=True)
class MemoryEstimate:
    """What one meta-step takes beside what is held already.

    Attributes:
        bytes: the peak: graphs, gradients, the tasks themselves, and before the first step the state that the meta-optimizer will keep.
        free: what there is for it, in bytes; None where that cannot be known.
        mend: where the estimate is above that, the settings to use instead; else None.
    """

    bytes: int
    free: int | None
    mend: str | None

    @property
    def text(self) -> str:
        """One line: "memory: about 1.3 GiB a step of 21 GiB free"."""
        return f"memory: about {size_text(self.bytes)} a step" + (
            "" if self.free is None else f" of {size_text(self.free)} free"
        )

    @property
    def warning(self) -> str | None:
        """One line that says what to do instead; None where the step fits, or where what is free is not known."""
        if self.mend is None or self.free is None:
            return None
        return (
            f"a step will take about {size_text(self.bytes)} of memory, but {size_text(self.free)} are free, so that it may fail or be "
            f"killed: {self.mend}"
        )


def estimate_step(
    engine: Engine, batch: TaskBatch, tasks: int, total: int, in_a_row: int = 1
) -> MemoryEstimate:
    """Estimate the peak of a meta-step from smaller ones, which change nothing.

    Args:
        engine: whose steps they are.
        batch: on the engine's device; its first two tasks are tried, or its one task twice.
        tasks: how many of this size a meta-batch has here, on this rank; at least 1.
        total: the iterations of the run, on which schedules depend; of the next iteration and the last, the one that takes more counts.
        in_a_row: steps that are made before the device is waited for; their tasks, and a copy of what is learned, are held till then.

    Raises:
        RunError: memory has run out in one of the small steps already, or a plugin fails in it.
    """
    free = available(engine.device)
    with recording():
        small = SmallSteps(engine, batch, total, free, in_a_row)
        taken = small.whole(tasks, engine.inner.checkpoint_steps, chunk_of(engine))
        return MemoryEstimate(
            taken, free, None if free is None or taken <= free else _mend(small, tasks, ROOM * free)
        )


@contextmanager
def memory_explained(
    engine: Engine, tasks: int, *, evaluated_steps: int | None = None
) -> Iterator[None]:
    """Inside a meta-step or, where `evaluated_steps` says how many inner steps it has, an evaluation, memory that runs out has a mend.

    Raises:
        RunError: from torch's error; it says where memory ran out, for how much work, and which settings to use instead.
    """
    try:
        yield
    except (MemoryError, RuntimeError, MetaplugError) as error:
        # A check before the first step refuses a model that fails on a task, whatever the reason was.
        reason = error.__cause__ if isinstance(error, MetaplugError) else error
        if reason is None or not ran_out(reason):
            raise
        engine.inner.release()
        asked = re.search(r"tried to allocate ([\d.]+) ?(\w+)", str(reason), re.IGNORECASE)
        where = f"out of memory on {engine.device}" + (
            f", asking for {_in_words(*asked.groups())} more," if asked else ""
        )
        if evaluated_steps is not None:
            work, mend = work_text(tasks, evaluated_steps), _halved_evaluation(engine, tasks)
            raise RunError(f"evaluation ran {where} with {work} at a time: {mend}") from error
        updating = any(
            frame.f_code is Engine.update.__code__
            for frame, _ in traceback.walk_tb(error.__traceback__)
        )
        state = (
            "its meta-update may be half done, so load a checkpoint"
            if updating
            else "it updated nothing"
        )
        work, mend = work_text(tasks, engine.inner.inner_steps), _halved(engine, tasks)
        raise RunError(
            f"iteration {engine.iteration} ran {where} with {work}; {state}: {mend}"
        ) from error


def _mend(small: SmallSteps, tasks: int, room: float) -> str:
    """The settings with which a step takes at most `room` bytes."""
    engine, checkpoint = small.engine, small.engine.inner.checkpoint_steps
    recomputes, options = _recomputable(engine, small.total), []
    if recomputes and (taken := small.whole(tasks, 1, chunk_of(engine))) <= room:
        options.append(f"runtime.checkpoint_steps=1 (about {size_text(taken)})")
    options += _fewer_together(small, tasks, checkpoint, room)
    if recomputes and not options:
        options = [
            f"runtime.checkpoint_steps=1 with {option}"
            for option in _fewer_together(small, tasks, 1, room)
        ]
    return _advice(engine, options)


def _fewer_together(
    small: SmallSteps, tasks: int, checkpoint: int | None, room: float
) -> list[str]:
    """Fewer tasks at a time, or where that cannot be, or is not enough, fewer in all; nothing where one is too much."""
    engine, chunk = small.engine, chunk_of(small.engine)
    if not _coupled(engine):
        fitting = _most(
            lambda count: small.whole(tasks, checkpoint, count) <= room,
            min(chunk or tasks, tasks) - 1,
        )
        if fitting:
            return [
                f"runtime.chunk_size={fitting} (about {size_text(small.whole(tasks, checkpoint, fitting))})"
            ]
    fitting = _most(lambda count: small.whole(count, checkpoint, chunk) <= room, tasks - 1)
    return (
        [f"fewer tasks, training.tasks_per_batch={fitting * engine.world.size}"] if fitting else []
    )


def _halved(engine: Engine, tasks: int) -> str:
    """Settings with which a step takes much less, where nothing says how much there is."""
    chunk, options = chunk_of(engine) or tasks, []
    if _recomputable(engine, max(engine.total, engine.iteration + 1)):
        options.append("runtime.checkpoint_steps=1")
    if tasks > 1 and _coupled(engine):
        options.append(f"fewer tasks, training.tasks_per_batch={tasks // 2 * engine.world.size}")
    elif min(chunk, tasks) > 1:
        options.append(f"runtime.chunk_size={min(chunk, tasks) // 2}")
    return _advice(engine, options)


def _halved_evaluation(engine: Engine, tasks: int) -> str:
    if tasks == 1:
        return "use a smaller model, or fewer examples in a task"
    return f"use fewer tasks at a time, MetaLearner.evaluate(tasks_per_batch={tasks // 2})" + (
        "" if _coupled(engine) else f" or runtime.chunk_size={tasks // 2}"
    )


def _advice(engine: Engine, options: list[str]) -> str:
    if not options:
        return "use a smaller model, fewer inner steps or fewer examples in a task, or the preset fomaml"
    compiled = engine.derivation is not None and not isinstance(
        engine.derivation, ChunkedDerivation
    )
    return f"use {', or '.join(options)}" + (
        ", without compiled or captured steps" if compiled else ""
    )


def chunk_of(engine: Engine) -> int | None:
    """How many tasks are computed together at most, where that is configured."""
    return (
        engine.derivation.chunk_size if isinstance(engine.derivation, ChunkedDerivation) else None
    )


def _coupled(engine: Engine) -> bool:
    return any(plugin.couples_tasks for plugin in engine.chain.plugins)


def _recomputable(engine: Engine, total: int) -> bool:
    """Whether recomputed steps would save anything: first-order steps keep no graph of each other."""
    if engine.inner.inner_steps < 2 or engine.inner.checkpoint_steps == 1:
        return False
    return any(
        2 in engine.inner.orders_of(iteration, total) for iteration in {engine.iteration, total - 1}
    )


def _most(fits: Callable[[int], bool], highest: int) -> int:
    """The greatest number from 1 to `highest` that fits, given that fewer fit where more do; 0 where none does."""
    low, high = 0, max(highest, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _in_words(number: str, unit: str) -> str:
    return size_text(float(number)) if unit == "bytes" else f"{number} {unit}"
