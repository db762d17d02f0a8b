"""Layers that take all tasks of a batch in one call, where vmap's own rule would copy activations or take many small steps.

Stacked convolutions keep their activations as (n, tasks · channels, height, width). Batch norm and max-pooling treat channels one by one,
so they can work on that layout as it is; a linear layer with weights of each task is one batched matrix product: the same numbers as vmap's
rules, with less memory and time (docs/performance.md). Differentiation is torch's own, outside vmap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

# There is no public way to reach the stacked tensor that is seen through vmap, nor into vmap but by walking through trees of arguments.
from torch._C._functorch import (
    _add_batch_dim,
    _remove_batch_dim,
    _vmap_decrement_nesting,
    _vmap_increment_nesting,
    current_level,
    get_unwrapped,
    is_batchedtensor,
    maybe_get_bdim,
    maybe_get_level,
)
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LARGE = 2**16
"""Elements from which on max-pooling on a CPU is worth a change of layout."""

TaskFunction = Callable[[list[Tensor], Tensor, Tensor], tuple[Tensor, Tensor]]
"""(parameters, x, y) of one task → two tensors."""


def for_all_tasks(
    task: TaskFunction, parameters: Sequence[Tensor], shared: Sequence[bool], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """What `task` gives for every task, stacked: `torch.vmap(task)`, without its walks through arguments that are flat already.

    Args:
        task: of one task; random numbers differ from task to task.
        parameters: (T, *shape) each.
        shared: for each parameter whether all its T rows are one and the same, so that vmap need not stack it.
        x, y: (T, n, ...).
    """
    tasks = len(x)
    level = _vmap_increment_nesting(tasks, "different")
    try:
        values = [
            value[0] if same else _add_batch_dim(value, 0, level)
            for value, same in zip(parameters, shared, strict=True)
        ]
        with Folding():
            one, other = task(values, _add_batch_dim(x, 0, level), _add_batch_dim(y, 0, level))
        return _remove_batch_dim(one, level, tasks, 0), _remove_batch_dim(other, level, tasks, 0)
    finally:
        _vmap_decrement_nesting()


class Folding(TorchFunctionMode):
    """While it is active, these layers fold the tasks of stacked tensors into one call."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        fold = _FOLDS.get(func)
        result = fold(*args, **(kwargs or {})) if fold else NotImplemented
        return func(*args, **(kwargs or {})) if result is NotImplemented else result


def _batch_norm(  # noqa: PLR0917 -- the arguments are torch's, in torch's order
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not _is_stacked(x) or not training or running_mean is not None:
        return NotImplemented
    folded, tasks = _folded(x)
    scale, shift = (_by_channel(parameter, tasks) for parameter in (weight, bias))
    return _unfolded(F.batch_norm(folded, None, None, scale, shift, training=True, eps=eps), tasks)


def _max_pool2d(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if kwargs.pop("return_indices", False) or x.dim() != 4:
        return NotImplemented
    if not _is_stacked(x):
        return _pooled(x, *args, **kwargs)
    folded, tasks = _folded(x)
    return _unfolded(_pooled(folded, *args, **kwargs), tasks)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not _is_stacked(weight) or not _is_stacked(x) or x.dim() < 2:
        return NotImplemented
    inputs, weights = _stacked(x), _stacked(weight)
    outputs = torch.bmm(inputs.flatten(1, -2), weights.transpose(1, 2))
    if bias is not None:
        outputs = outputs + (_stacked(bias).unsqueeze(1) if _is_stacked(bias) else bias)
    return _add_batch_dim(
        outputs.unflatten(1, inputs.shape[1:-1]) if x.dim() > 2 else outputs, 0, current_level()
    )


_FOLDS: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.max_pool2d: _max_pool2d,
    F.linear: _linear,
}


def _pooled(  # noqa: PLR0917 -- the arguments are torch's, in torch's order
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    settings = (kernel_size, stride or [], padding, dilation, ceil_mode)
    if x.device.type != "cpu" or x.numel() < LARGE or not x.is_contiguous():
        return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    return cast("Tensor", _MaxPool2d.apply(x, settings)[0])


class _MaxPool2d(torch.autograd.Function):
    """Max-pooling through torch's kernel for channels that lie last: the same numbers, faster than that for planes.

    Its derivative is torch's own, on planes again, as mixed layouts would slow down all that follows.
    """

    @staticmethod
    def forward(x: Tensor, settings: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        channels = x.shape[1] if x.shape[1] <= 128 else math.gcd(x.shape[1], 64)
        planes = x.view(-1, channels, *x.shape[2:]).contiguous(memory_format=torch.channels_last)
        pooled, indices = torch.ops.aten.max_pool2d_with_indices(planes, *settings)
        form = (*x.shape[:2], *pooled.shape[2:])
        return pooled.contiguous().view(form), indices.contiguous().view(form)

    @staticmethod
    def vmap(
        _: Any, in_dims: Any, x: Tensor, settings: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, Tensor], tuple[None, None]]:
        return _MaxPool2d.apply(x, settings), (
            None,
            None,
        )  # what comes here is stacked and folded already

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.settings = inputs[1]
        ctx.save_for_backward(inputs[0], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Any:
        x, indices = ctx.saved_tensors
        return torch.ops.aten.max_pool2d_with_indices_backward(
            gradient.contiguous(), x, *ctx.settings, indices
        ), None


def _is_stacked(value: Any) -> bool:
    """Whether the innermost vmap sees this tensor as one task's of many."""
    return (
        isinstance(value, Tensor)
        and is_batchedtensor(value)
        and maybe_get_level(value) == current_level()
    )


def _stacked(x: Tensor) -> Tensor:
    """(tasks, ...) from one task's as vmap sees it."""
    stacked: Tensor = get_unwrapped(x)
    place = maybe_get_bdim(x)
    return stacked.movedim(place, 0) if place else stacked


def _folded(x: Tensor) -> tuple[Tensor, int]:
    """(n, tasks · channels, ...) from one task's (n, channels, ...) as vmap sees it, and the number of tasks."""
    folded: Tensor = get_unwrapped(x).movedim(maybe_get_bdim(x), 1)
    return folded.flatten(1, 2), folded.shape[1]


def _unfolded(folded: Tensor, tasks: int) -> Any:
    """One task's as vmap sees it, from (n, tasks · channels, ...)."""
    return _add_batch_dim(folded.unflatten(1, (tasks, -1)), 1, current_level())


def _by_channel(parameter: Tensor | None, tasks: int) -> Tensor | None:
    """(tasks · channels,) from one task's (channels,), or from all tasks'."""
    if parameter is None:
        return None
    return (
        _stacked(parameter) if _is_stacked(parameter) else parameter.expand(tasks, -1)
    ).flatten()
