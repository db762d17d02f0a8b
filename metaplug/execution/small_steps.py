"""The memory of large meta-steps, from that of a few small ones.

The peak of a step grows almost in a straight line with the tasks that are computed together, and from the second inner step on with the
inner steps. So steps of one and two tasks, with two and three inner steps, say what many of both take, with everything that a plugin adds:

    peak(T, K) = line through T = 1, 2 of the line through K = 2, 3
    with c inner steps recomputed together: peak₁(T, ⌈K/c⌉) + peak(T, c) − peak(T, 1)        peak₁(T, K): the same with c = 1
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from metaplug.contract.task_batch import TaskBatch
from metaplug.core.inner_loop import usable
from metaplug.errors import RunError
from metaplug.execution.batching import kept_bytes
from metaplug.execution.engine import Engine
from metaplug.execution.free_memory import ran_out
from metaplug.execution.ranks import ALONE


class SmallSteps:
    """Measures small steps, each once, and draws the lines through them."""

    def __init__(
        self, engine: Engine, batch: TaskBatch, total: int, free: int | None, in_a_row: int
    ) -> None:
        self.engine, self.batch, self.free, self.in_a_row = (
            engine,
            batch,
            math.inf if free is None else free,
            in_a_row,
        )
        self._measured: dict[tuple[int, int, int | None, int], float] = {}
        self.total = max(total, engine.iteration + 1)
        steps, checkpoint = min(engine.inner.inner_steps, 2), engine.inner.checkpoint_steps and 1
        moments = dict.fromkeys((engine.iteration, self.total - 1))
        self.moment = (
            max(moments, key=lambda moment: self._peak(moment, 1, checkpoint, steps))
            if len(moments) > 1
            else engine.iteration
        )

    def whole(self, tasks: int, checkpoint: int | None, chunk: int | None) -> int:
        """Bytes of a whole step."""
        together = tasks if chunk is None else min(tasks, chunk)
        steps = self.engine.inner.inner_steps
        if checkpoint is None or steps == 0:
            taken = self._lines(together, None, steps)
        else:
            kept = min(checkpoint, steps)
            pieces = math.ceil(steps / kept)
            last = steps - kept * (pieces - 1)
            taken = self._recomputed(together, pieces, last)
            if last < kept:
                taken = max(taken, self._longer(together, pieces, kept))
        learned = sum(parameter.nbytes for parameter in self.engine.meta_parameters.values())
        if (
            together < tasks
        ):  # sums of the meta-gradients, and beside them those of the last chunk, with its adapted weights
            taken += (2 + together) * learned
        state = 2 * learned if isinstance(self.engine.optimizer, torch.optim.Adam) else 0
        if not self.engine.optimizer.state:
            taken += state
        if self.in_a_row > 1:
            taken += learned + state
        fields = (
            self.batch.support_x,
            self.batch.support_y,
            self.batch.query_x,
            self.batch.query_y,
        )
        return round(taken + self.in_a_row * tasks * sum(field[0].nbytes for field in fields))

    def _recomputed(self, tasks: int, pieces: int, kept: int) -> float:
        """The peak where the last of the pieces, which the query pass follows, has `kept` steps."""
        taken = self._lines(tasks, 1, pieces)
        return (
            taken + self._lines(tasks, None, kept) - self._lines(tasks, None, 1)
            if kept > 1
            else taken
        )

    def _longer(self, tasks: int, pieces: int, kept: int) -> float:
        """The peak in the other pieces, of `kept` steps each, 2 or more, where they are longer than the last."""
        found = _line(
            lambda count: self._peak(self.moment, count, 2, 3), 1, 2, tasks
        )  # a piece of two steps before one of a single step
        last = self._lines(tasks, 1, 2)
        more = (
            self._lines(tasks, 1, pieces)
            - last
            + self._lines(tasks, None, kept)
            - self._lines(tasks, None, 2)
        )
        if found > 1.01 * last:
            return found + more
        # There the last piece took most, so that this one was not seen: it takes less, without the query pass.
        return min(found + more, self._recomputed(tasks, pieces, kept) - tasks * self._query())

    def _query(self) -> float:
        """Bytes that one task's query pass keeps for its backward pass."""
        x, y = self.batch.query_x, self.batch.query_y
        return kept_bytes(self.engine.inner, usable(TaskBatch(x, y, x, y)))

    def _lines(self, tasks: int, checkpoint: int | None, steps: int) -> float:
        return _line(
            lambda count: _line(
                lambda k: self._peak(self.moment, count, checkpoint, k), 2, 3, steps
            ),
            1,
            2,
            tasks,
        )

    def _peak(self, moment: int, tasks: int, checkpoint: int | None, steps: int) -> float:
        """The peak of a small step, in bytes; reckoned from a smaller one where that says that it would not fit."""
        key = (moment, tasks, checkpoint, steps)
        if key not in self._measured:
            reckoned = 0.0
            if tasks > 1:
                reckoned = tasks * self._peak(moment, 1, checkpoint, steps)
            elif steps > 1:
                reckoned = (1 + steps) / 2 * self._peak(moment, 1, checkpoint, 1)
            self._measured[key] = reckoned if reckoned > self.free else self._measure(*key)
        return self._measured[key]

    def _measure(self, moment: int, tasks: int, checkpoint: int | None, steps: int) -> float:
        engine, inner, given = self.engine, self.engine.inner, self.batch
        rows = [min(row, given.num_tasks - 1) for row in range(tasks)]
        batch = TaskBatch(
            given.support_x[rows], given.support_y[rows], given.query_x[rows], given.query_y[rows]
        )
        before = engine.derivation, engine.world, inner.inner_steps, inner.checkpoint_steps
        engine.derivation, engine.world, inner.inner_steps, inner.checkpoint_steps = (
            None,
            ALONE,
            steps,
            checkpoint,
        )
        try:
            return _peak_of(lambda: engine.meta_gradients(batch, moment, self.total), engine.device)
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            raise RunError(
                f"memory ran out on {engine.device} in a small step, with {work_text(tasks, steps)}, before a whole one could be "
                "estimated: use a smaller model, or fewer examples in a task"
            ) from error
        finally:
            engine.derivation, engine.world, inner.inner_steps, inner.checkpoint_steps = before


def _line(at: Callable[[int], float], low: int, high: int, where: int) -> float:
    """The value at `where`: its own up to `high`, beyond on the line through `low` and `high`, if that rises."""
    if where <= high:
        return at(where)
    return at(high) + max(at(high) - at(low), 0.0) * (where - high) / (high - low)


def _peak_of(work: Callable[[], object], device: torch.device) -> float:
    """The most bytes that are held for a work while it runs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    held = _Held()
    with held:
        work()
    return held.most


class _Held(TorchDispatchMode):
    """Adds up what the tensors hold that operations make while it is active, as long as anything refers to them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = {
            tensor.untyped_storage()._cdata
            for tensor in tree_iter((args, kwargs))
            if isinstance(tensor, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._add(storage)
        self.most = max(self.most, self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, count = storage._cdata, storage.nbytes()

        def gone(_: Any) -> None:
            self.now -= count
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += count


def work_text(tasks: int, steps: int) -> str:
    return (
        f"{tasks} task{'s' if tasks != 1 else ''} of {steps} inner step{'s' if steps != 1 else ''}"
    )
