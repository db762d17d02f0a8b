"""Whether the tasks of a batch run in one vectorised call or one after the other.

Both give the same numbers, at another speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from metaplug.contract.inputs import map_inputs
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_groups import uniform
from metaplug.core.autograd_graph import graph_nodes
from metaplug.core.function_mode import FunctionMode
from metaplug.core.inner_loop import InnerLoop
from metaplug.core.vmap_rules import for_all_tasks
from metaplug.errors import RequestError, said_by
from metaplug.random_streams import stream

Batching = Literal["auto", "vectorized", "sequential"]

CPU_TASK_BYTES = 2**22
"""On a CPU, tasks are vectorised while the support pass of one saves at most this for backward
(docs/performance.md)."""

CPU_NORMALIZED_TASK_BYTES = 2**23
"""The same for models with batch norm by the statistics of the batch, which all tasks share a few
passes for (`core.batch_norm`)."""

# Frozen weights raise either bound to their own size: one task alone reads all of them, and puts
# what it keeps out of the cache, while stacked tasks share one pass over them.


@dataclass(frozen=True)
class BatchingChoice:
    """How tasks are batched, and why."""

    batching: Literal["vectorized", "sequential"]
    reason: str


def choose_batching(
    requested: Batching,
    inner: InnerLoop,
    batch: TaskBatch,
    difference: Callable[[InnerLoop, TaskBatch], str | None],
) -> BatchingChoice:
    """Decide by rule, never by timing, so the same seed is the same run.

    "auto" is vectorised, except where vmap refuses the model or gets its numbers wrong, or where on
    a CPU one task saves more than CPU_TASK_BYTES for its backward pass, or with batch norm
    CPU_NORMALIZED_TASK_BYTES: an operation on one task then outweighs its call, and stacked tasks
    only fall out of the cache. Frozen weights that the backward pass reads raise the bound to their
    own bytes.

    Args:
        difference: says how stacked tasks differ from one at a time; None where they agree.

    Raises:
        RequestError: "vectorized" was asked for and cannot be had.
    """
    batch = uniform(batch)
    if requested == "sequential":
        return BatchingChoice("sequential", "as configured")
    fault, why = "torch.vmap refuses the model", refusal(inner, batch)
    if why is None:
        fault, why = "torch.vmap gets the model wrong", difference(inner, batch)
    if requested == "vectorized":
        if why is not None:
            raise RequestError(
                f"task batching 'vectorized' cannot be had, as {fault} ({why}): "
                "use 'auto' or 'sequential'"
            )
        return BatchingChoice("vectorized", "as configured")
    if why is not None:
        return BatchingChoice("sequential", f"{fault}: {why}")
    if batch.device.type != "cpu":
        return BatchingChoice("vectorized", f"tasks are stacked on {batch.device.type}")
    try:
        kept, bound = kept_bytes(inner, batch)
    except RuntimeError as error:  # torch.func.grad in forward allows no look at what is saved
        why = f"what a task keeps for its backward pass cannot be measured: {said_by(error)}"
        return BatchingChoice("sequential", why)
    small = kept <= bound
    side = f"{'at most' if small else 'more than'} {bound / 2**20:.3g} MiB"
    reason = f"a task keeps {kept / 2**20:.2f} MiB for its backward pass, {side} on a CPU"
    return BatchingChoice("vectorized" if small else "sequential", reason)


def kept_bytes(inner: InnerLoop, batch: TaskBatch) -> tuple[int, int]:
    """Return the bytes that autograd saves for one task's support pass, and the bound on them.

    Parameters are left out. It is counted with torch's own layers.
    """
    weights = [
        parameter.detach().requires_grad_(learned)
        for parameter, learned in zip(inner.parameters.values(), _learned(inner), strict=True)
    ]
    own = {weight.data_ptr(): weight for weight in weights}
    kept: dict[int, int] = {}
    frozen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        place, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        if place not in own:
            kept[place] = size
        elif not own[place].requires_grad:
            frozen[place] = size
        return tensor.detach()  # the tensor itself would hold the graph that holds it, for good

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with stream(0, batch.device), hooks:
        x = map_inputs(
            lambda each: each.select(0, 0), inner.functional.inputs(batch.support_x, inner.dtype)
        )
        loss, _ = inner.task(weights, x, batch.support_y[0])
    normalized = any(
        node.name().startswith("NativeBatchNorm") and node._saved_training
        for node in graph_nodes(loss)
    )
    bound = CPU_NORMALIZED_TASK_BYTES if normalized else CPU_TASK_BYTES
    return sum(kept.values()), max(bound, sum(frozen.values()))


def _learned(inner: InnerLoop) -> list[bool]:
    """Of each parameter, whether a step may differentiate by it, itself or by what it came from."""
    if any(map(inner.chain.links, ("initialize_parameters", "transform_parameters"))):
        return [True] * len(inner.parameters)
    trained = (parameter.requires_grad for parameter in inner.parameters.values())
    return [one or other for one, other in zip(inner.is_adapted, trained, strict=True)]


def refusal(inner: InnerLoop, batch: TaskBatch) -> str | None:
    """Return vmap's reason for refusing two tasks of this batch, with the operation.

    Evaluation is tried too: a model may branch on its data there alone.
    """
    weights = [
        parameter.detach().expand(2, *parameter.shape) for parameter in inner.parameters.values()
    ]
    first = batch.map(lambda tensor: tensor[:1].expand(2, *tensor.shape[1:]))
    x = inner.functional.inputs(first.support_x, inner.dtype)
    watch = _FirstFailure()

    def task(*arguments: Any) -> tuple[Tensor, Tensor]:
        with watch:
            return inner.task(*arguments)

    try:
        for training in (False, True):
            inner.functional.begin(training)
            with torch.set_grad_enabled(inner.query_graph), stream(0, batch.device):
                shared = [False] * len(weights)
                for_all_tasks(task, weights, shared, x, first.support_y)
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        return f"{reason} (in {watch.failed})" if watch.failed else reason
    finally:
        inner.functional.begin(True)
    return None


class _FirstFailure(FunctionMode):
    """Remembers the first operation that fails while it is active."""

    failed: str | None = None

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return func(*args, **kwargs)
        except Exception:
            self.failed = self.failed or getattr(func, "__name__", None)
            raise
