"""Whether tasks stacked under vmap give the numbers of one task at a time, derivatives included.

vmap's batching rules have right values and may have wrong derivatives, so a model with operations
that are not known to be right is compared, on tasks of the user's own, with itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F
from torch.overrides import resolve_name

from metaplug.contract.inputs import map_inputs
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_groups import uniform
from metaplug.core.autograd_graph import graph_nodes
from metaplug.core.function_mode import FunctionMode
from metaplug.core.inner_loop import InnerLoop
from metaplug.errors import said_by
from metaplug.random_streams import random_state, stream

TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-2,
    torch.complex128: 1e-6,
    torch.complex64: 1e-2,
}
"""By dtype, the largest difference of a tensor, relative to its norm, that counts as rounding."""

_KNOWN = """
    linear conv1d conv2d relu leaky_relu elu tanh sigmoid softplus silu gelu batch_norm layer_norm
    group_norm instance_norm max_pool2d _max_pool2d avg_pool2d adaptive_avg_pool2d flatten
    view reshape permute transpose unsqueeze squeeze add sub mul div truediv rsub radd rmul neg
    matmul bmm mean sum exp log softmax log_softmax cross_entropy mse_loss size dim __get__
    contiguous float double to clone square add_ mul_ relu_ dropout __add__ __sub__ __mul__
    __truediv__ __radd__ __rmul__ __rsub__ __matmul__ __neg__ is_floating_point numel __len__
"""
KNOWN = frozenset(_KNOWN.split())
"""Operations that the property tests compare with plain loops in both derivatives."""

FEW = 4
"""Examples of a task that are compared, where the model runs on so few; all take long."""


def difference(inner: InnerLoop, batch: TaskBatch) -> str | None:
    """Say how stacked tasks differ from one task at a time; None where they agree.

    Args:
        batch: its first and last task are compared, each with weights of its own.
    """
    rows = uniform(batch).map(lambda tensor: tensor[[0, -1]])
    operations, draws = _operations(inner, rows)
    if operations <= KNOWN and not _hooked(inner.functional.module):
        return None
    if draws:  # stacked, two tasks draw in another order than one after the other
        rows = rows.tasks(slice(0, 1))
    for part in (rows.map(lambda tensor: tensor[:, :FEW]), rows):
        for dtype in dict.fromkeys((double(inner.dtype), inner.dtype)):
            # In float64 rounding hides nothing; a model with constants in float32 refuses it.
            try:
                with in_dtype(inner, dtype), _NoDropout():
                    return _compare(inner, _cast(part, dtype), dtype)
            except Exception:
                continue
    return None  # it fails one task at a time, too: the first step says how


def _compare(inner: InnerLoop, rows: TaskBatch, dtype: torch.dtype) -> str | None:
    weights = perturbed(inner, dtype, rows.num_tasks)
    single = _derivatives(inner, weights, rows, vectorized=False)
    try:
        stacked = _derivatives(inner, weights, rows, vectorized=True, of=tuple(single))
    except Exception as error:
        return f"stacked, a derivative fails: {said_by(error)}"
    for what, exact in single.items():
        ours = stacked.get(what, {})
        scale = max((float(value.norm()) for value in exact.values()), default=0.0)
        for name, value in exact.items():
            if name not in ours:
                return f"stacked, its {what} is missing ({name})"
            floor = TOLERANCE.get(dtype, 1e-1) * max(scale, 1e-12)
            apart = float((ours[name] - value).norm()) / max(float(value.norm()), floor)
            if not apart <= TOLERANCE.get(dtype, 1e-1) and not _equal_nan(ours[name], value):
                return f"its {what} differs by {100 * apart:.2g} % ({name})"
    return None


def perturbed(inner: InnerLoop, dtype: torch.dtype, tasks: int) -> dict[str, Tensor]:
    """Return weights (tasks, *shape) near the model's, others for each task; frozen ones shared."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, parameter in inner.parameters.items():
        rows = tasks if parameter.requires_grad else 1
        noise = torch.randn(rows, *parameter.shape, generator=generator).to(inner.device, dtype)
        value = parameter.detach().to(dtype) + 0.1 * noise
        value = value.expand(tasks, *parameter.shape) if rows == 1 else value
        weights[name] = value.requires_grad_(parameter.requires_grad)
    return weights


def _derivatives(
    inner: InnerLoop,
    weights: dict[str, Tensor],
    rows: TaskBatch,
    *,
    vectorized: bool,
    of: tuple[str, ...] = ("prediction", "first derivative", "second derivative"),
) -> dict[str, dict[str, Tensor]]:
    """Predictions, first and second derivatives in fixed directions, by weight, as far as `of`."""
    before, inner.vectorized = inner.vectorized, vectorized
    try:
        with stream(0, inner.device):
            losses, predictions = inner.all_tasks(
                list(weights.values()), inner.groups(rows, "support")
            )
    finally:
        inner.vectorized = before
    found = {"prediction": {"output": predictions.detach()}}
    wanted = {name: weight for name, weight in weights.items() if weight.requires_grad}
    value = losses.sum() + _along([predictions])
    for what in of[1:]:
        last = what == "second derivative"
        try:
            taken = torch.autograd.grad(
                value, list(wanted.values()), create_graph=not last, allow_unused=True
            )
        except RuntimeError:
            if not last or not vectorized:
                return found  # there is none one at a time either
            raise
        present = {name: one for name, one in zip(wanted, taken, strict=True) if one is not None}
        found[what] = {name: one.detach() for name, one in present.items()}
        value = _along([one for one in present.values() if one.requires_grad])
        if not value.requires_grad:
            break
    return found


def _along(values: Sequence[Tensor]) -> Tensor:
    """Σ of inner products with fixed directions, so that every element counts."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(())
    for each in values:
        value = torch.view_as_real(each) if each.is_complex() else each
        if value.is_floating_point():
            direction = torch.randn(value.shape, generator=generator).to(value)
            total = total.to(value) + (value * direction).sum()
    return total


def _equal_nan(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.isnan(), other.isnan()) and bool(other.isnan().any())


class _Noted(FunctionMode):
    """Notes the names of the operations that run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.names.add((resolve_name(func) or getattr(func, "__name__", "?")).rpartition(".")[2])
        return func(*args, **kwargs)


def _operations(inner: InnerLoop, rows: TaskBatch) -> tuple[set[str], bool]:
    """The names of one task's operations, and whether one beside dropout draws random numbers."""
    x = map_inputs(
        lambda each: each.select(0, 0), inner.functional.inputs(rows.support_x, inner.dtype)
    )
    y = rows.support_y[0]
    weights = [
        each.detach().requires_grad_(each.requires_grad) for each in inner.parameters.values()
    ]
    noted = _Noted()
    with stream(0, inner.device):
        before = random_state(inner.device)
        with _NoDropout(), noted:
            loss, _ = inner.task(weights, x, y)
        draws = not torch.equal(before, random_state(inner.device))
    return noted.names | own_functions(loss), draws


def own_functions(output: Tensor) -> set[str]:
    """Return the names of the autograd.Functions of a graph, of which no mode hears."""
    nodes = graph_nodes(output)
    return {type(each).__name__ for each in nodes if isinstance(each, BackwardCFunction)}


def _hooked(model: nn.Module) -> bool:
    """Whether a module has hooks: vmap does not call those of the backward pass."""
    return any(
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if name.endswith("_hooks") and "state_dict" not in name
    )


class _NoDropout(FunctionMode):
    """Makes dropout the identity: its draws differ from stacked tasks to single ones."""

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _DROPOUT:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            elif "dropout_p" in kwargs:
                kwargs = {**kwargs, "dropout_p": 0.0}
        if func is F.multi_head_attention_forward:  # whose own dropout no mode sees
            kwargs = {**kwargs, "training": False}
        return func(*args, **kwargs)


_DROPOUT = frozenset(
    (
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout),
        *(F.alpha_dropout, F.feature_alpha_dropout),
    )
)


@contextmanager
def in_dtype(inner: InnerLoop, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the clone's buffers are in this dtype, and the model rounds no coarser."""
    holders = [module._buffers for module in inner.functional.module.modules()]
    before = [(holder, dict(holder)) for holder in holders]
    own, inner.dtype = inner.dtype, dtype
    autocast, inner.autocast = inner.autocast, nullcontext
    try:
        for holder in holders:
            for name, buffer in holder.items():
                if buffer is not None:
                    holder[name] = as_dtype(buffer, dtype)
        yield
    finally:
        inner.dtype, inner.autocast = own, autocast
        for holder, buffers in before:
            holder.update(buffers)


def _cast(batch: TaskBatch, dtype: torch.dtype) -> TaskBatch:
    return batch.map(lambda tensor: as_dtype(tensor, dtype))


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of floating point in this dtype; complex stays complex, real real."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype.to_real()) if tensor.is_floating_point() else tensor


def double(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype with 64 bits a number, in which rounding is least; complex for complex."""
    return torch.complex128 if dtype.is_complex else torch.float64
