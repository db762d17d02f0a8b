"""Whether the tasks of a batch run in one vectorised call or one after the other: the same numbers, another speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metaplug.contract.task_batch import TaskBatch
from metaplug.core.inner_loop import InnerLoop
from metaplug.errors import RequestError
from metaplug.random_streams import stream

Batching = Literal["auto", "vectorized", "sequential"]

CPU_TASK_BYTES = 2**20
"""On a CPU, the most that one task's support pass may keep for its backward pass if tasks are to be vectorised (docs/performance.md)."""


@dataclass(frozen=True)
class BatchingChoice:
    """How tasks are batched, and why."""

    batching: Literal["vectorized", "sequential"]
    reason: str


def choose_batching(requested: Batching, inner: InnerLoop, batch: TaskBatch) -> BatchingChoice:
    """Decide by rule, never by timing, so that the same seed is the same run.

    "auto" is vectorised, except where vmap refuses the model, or where on a CPU one task keeps more than CPU_TASK_BYTES for its backward
    pass: then the tasks' activations together fall out of the cache, and one after the other is faster.

    Raises:
        RequestError: "vectorized" was asked for, and vmap refuses the model.
    """
    if requested == "sequential":
        return BatchingChoice("sequential", "as configured")
    refusal = _refusal(inner, batch)
    if requested == "vectorized":
        if refusal:
            raise RequestError(
                f"task batching 'vectorized' cannot be had, as torch.vmap refuses the model ({refusal}): use 'auto' or 'sequential'"
            )
        return BatchingChoice("vectorized", "as configured")
    if refusal:
        return BatchingChoice("sequential", f"torch.vmap refuses the model: {refusal}")
    if batch.device.type != "cpu":
        return BatchingChoice("vectorized", f"tasks are stacked on {batch.device.type}")
    kept = kept_bytes(inner, batch)
    small = kept <= CPU_TASK_BYTES
    bound = f"{'at most' if small else 'more than'} {CPU_TASK_BYTES / 2**20:g} MiB"
    return BatchingChoice(
        "vectorized" if small else "sequential",
        f"a task keeps {kept / 2**20:.2f} MiB for its backward pass, {bound} on a CPU",
    )


def _refusal(inner: InnerLoop, batch: TaskBatch) -> str | None:
    """vmap's own reason for refusing two tasks of this batch, in one line, with the operation; None where it takes them."""
    parameters = [
        parameter.detach().expand(2, *parameter.shape) for parameter in inner.model.parameters()
    ]
    x, y = (
        tensor[:1].expand(2, *tensor.shape[1:]) for tensor in (batch.support_x, batch.support_y)
    )
    watch = _Watch()

    def task(*arguments: Any) -> tuple[Tensor, Tensor]:
        with watch:
            return inner.task(*arguments)

    try:
        with torch.no_grad(), stream(0, x.device):
            torch.vmap(task, in_dims=(0, 0, 0), randomness="different")(parameters, x, y)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"{reason} (in {watch.failed})" if watch.failed else reason
    return None


class _Watch(TorchFunctionMode):
    """Remembers the first operation that fails while it is active."""

    failed: str | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            self.failed = self.failed or getattr(func, "__name__", None)
            raise


def kept_bytes(inner: InnerLoop, batch: TaskBatch) -> int:
    """The bytes that autograd keeps for one task's support pass, the model's own parameters left out."""
    parameters = [parameter.detach().requires_grad_() for parameter in inner.model.parameters()]
    own = {parameter.data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor.detach()  # the tensor itself would hold the graph that holds it, for good

    with (
        stream(0, batch.device),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        _loss, _ = inner.task(parameters, batch.support_x[0], batch.support_y[0])
    return sum(kept.values())
