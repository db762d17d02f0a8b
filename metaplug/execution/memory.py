"""The memory of meta-steps: its measured peak, and what to set when it runs out."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from metaplug.contract.schedule import iteration_text
from metaplug.errors import MetaplugError, RunError
from metaplug.execution.chunks import ChunkedDerivation
from metaplug.execution.engine import Engine
from metaplug.execution.free_memory import size_text

_PROCESS = Path("/proc/self")
_SIGNS = re.compile("can't allocate memory|not enough memory|out of memory|bad_alloc|ALLOC_FAILED")


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from now on; where the system cannot, it counts from the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            (_PROCESS / "clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes held since `reset_peak_memory`, or None where that is not known.

    On CUDA, what torch's allocator gave out on the device. On a CPU, the resident memory of the
    whole process, libraries and data included, as Linux counts it: what its out-of-memory killer
    looks at.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        status = (_PROCESS / "status").read_text(encoding="utf-8")
        if found := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
            return int(found[1]) * 1024
    return None


@contextmanager
def memory_explained(
    engine: Engine, tasks: int, *, evaluated_steps: int | None = None
) -> Iterator[None]:
    """Turn an out-of-memory error inside a meta-step into one that says what to set instead.

    Args:
        tasks: computed together, or the tasks of the meta-batch on this rank.
        evaluated_steps: the inner steps of an evaluation; None inside a meta-step.

    Raises:
        RunError: where memory ran out, for how much work, and the settings to use instead.
    """
    try:
        yield
    except (MemoryError, RuntimeError, MetaplugError) as error:
        # A check before the first step refuses a model that fails on a task, for any cause.
        reason = error.__cause__ if isinstance(error, MetaplugError) else error
        if reason is None or not _ran_out(reason):
            raise
        steps = engine.inner.inner_steps if evaluated_steps is None else evaluated_steps
        work = f"{tasks} task{'s' * (tasks != 1)} of {steps} inner step{'s' * (steps != 1)}"
        where = f"ran out of memory on {engine.device}{_asked(reason)} with {work}"
        if evaluated_steps is not None:
            advice = _evaluation_advice(engine, tasks)
            raise RunError(f"evaluation {where} at a time: {advice}") from error
        frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
        state = (
            "its meta-update may be half done, so load a checkpoint"
            if Engine.update.__code__ in frames
            else "it updated nothing"
        )
        advice = _training_advice(engine, tasks)
        raise RunError(f"{iteration_text(engine.iteration)} {where}; {state}: {advice}") from error


def chunk_of(engine: Engine) -> int | None:
    """Return the tasks that are computed together at most, or None where that is not configured."""
    derivation = engine.derivation
    return derivation.chunk_size if isinstance(derivation, ChunkedDerivation) else None


def _training_advice(engine: Engine, tasks: int) -> str:
    inner, together, options = engine.inner, min(chunk_of(engine) or tasks, tasks), []
    # First-order steps keep no graph of each other, so recomputing them saves nothing.
    orders = inner.orders_of(engine.iteration, max(engine.total, engine.iteration + 1))
    if inner.inner_steps > 1 and inner.checkpoint_steps != 1 and 2 in orders:
        options.append("runtime.checkpoint_steps=1")
    if _coupled(engine) and tasks > 1:
        options.append(f"fewer tasks, training.tasks_per_batch={tasks // 2 * engine.world.size}")
    elif together > 1:
        options.append(f"runtime.chunk_size={together // 2}")
    options = options or [
        "a smaller model, fewer inner steps or fewer examples in a task",
        "the preset fomaml",
    ]
    traced = engine.derivation is not None and chunk_of(engine) is None
    return f"use {', or '.join(options)}" + traced * ", without compiled or captured steps"


def _evaluation_advice(engine: Engine, tasks: int) -> str:
    if tasks == 1:
        return "use a smaller model, or fewer examples in a task"
    chunks = "" if _coupled(engine) else f" or runtime.chunk_size={tasks // 2}"
    return f"use fewer tasks at a time, MetaLearner.evaluate(tasks_per_batch={tasks // 2}){chunks}"


def _coupled(engine: Engine) -> bool:
    return any(plugin.couples_tasks for plugin in engine.chain.plugins)


def _ran_out(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    ours = isinstance(error, MetaplugError)
    return not ours and isinstance(error, RuntimeError) and bool(_SIGNS.search(str(error)))


def _asked(error: BaseException) -> str:
    asked = re.search(r"tried to allocate ([\d.]+) ?(\w+)", str(error), re.IGNORECASE)
    if asked is None:
        return ""
    number, unit = asked.groups()
    return (
        f", asking for {size_text(float(number)) if unit == 'bytes' else f'{number} {unit}'} more,"
    )
