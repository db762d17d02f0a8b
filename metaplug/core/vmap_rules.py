"""Layers that take all tasks of a batch in one call, where vmap's own rule is slow or wrong.

Stacked convolutions keep their activations as (n, tasks · channels, height, width). Batch norm and
max-pooling treat channels one by one, so they work on that layout as it is; a linear layer with
weights of each task is one batched matrix product, with the derivatives of `linear`: the same
numbers as vmap's rules, with less memory and time (docs/performance.md). An embedding's padding row
gets no gradient in any task, where vmap's rule protects it in the first task alone. Differentiation
is outside vmap; on a CPU large batch norms, activations and poolings have derivatives of
`batch_norm` and `max_pool`, and weight norm has those of `weight_norm`, as torch's second one is
wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

# There is no public way into vmap but by walking through trees of arguments.
from torch._C._functorch import (  # type: ignore[attr-defined]
    _add_batch_dim,
    _remove_batch_dim,
    _set_vmap_fallback_warning_enabled,
    _vmap_decrement_nesting,
    _vmap_increment_nesting,
    current_level,
    get_unwrapped,
    maybe_current_level,
    maybe_get_bdim,
)
from torch.nn import functional as F

from metaplug.contract.inputs import Inputs, map_inputs
from metaplug.core.autograd_graph import is_seen_through
from metaplug.core.batch_norm import batch_norm, takes
from metaplug.core.function_mode import FunctionMode
from metaplug.core.linear import linear
from metaplug.core.linear import takes as takes_products
from metaplug.core.max_pool import LARGE, activate, pool
from metaplug.core.stacked_tensors import (
    fold,
    from_stacked,
    is_stacked,
    outside_vmap,
    stack_of,
    unfold,
)
from metaplug.core.weight_norm import weight_norm

TaskFunction = Callable[[list[Tensor], Inputs, Tensor], tuple[Tensor, Tensor]]
"""(parameters, x, y) of one task → two tensors."""


def for_all_tasks(
    task: TaskFunction, parameters: Sequence[Tensor], shared: Sequence[bool], x: Inputs, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `task` gives for every task, stacked.

    It is `torch.vmap(task)`, without its walks through arguments that are flat already.

    Args:
        task: of one task; random numbers differ from task to task.
        parameters: (T, *shape) each.
        shared: for each parameter whether its T rows are the same, so vmap need not stack it.
        x, y: (T, n, ...); x also as a mapping or tuple of such tensors.

    Example:
        >>> double = lambda weights, x, y: (weights[0] * x, y)
        >>> w, x = torch.tensor([[2.0], [3.0]]), torch.ones(2, 1)
        >>> for_all_tasks(double, [w], [False], x, x)[0]
        tensor([[2.],
                [3.]])
    """
    _load_decompositions()
    tasks = len(y)
    level = _vmap_increment_nesting(tasks, "different")
    try:
        values = [
            value[0] if same else _add_batch_dim(value, 0, level)
            for value, same in zip(parameters, shared, strict=True)
        ]
        with TaskRules():
            own = map_inputs(lambda each: _add_batch_dim(each, 0, level), x)
            one, other = task(values, own, _add_batch_dim(y, 0, level))
        return _remove_batch_dim(one, level, tasks, 0), _remove_batch_dim(other, level, tasks, 0)
    finally:
        _vmap_decrement_nesting()


@cache
def _load_decompositions() -> None:
    """Let torch load the decompositions that vmap uses, as its first call does.

    Its advice on slow operations is for torch's authors, and would be an error under -W error.
    """
    torch.vmap(torch.clone)(torch.zeros(1))
    _set_vmap_fallback_warning_enabled(False)


class TaskRules(FunctionMode):
    """While it is active, these layers follow the rules of this module."""

    _activation: _Activated | None = None

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.multi_head_attention_forward:
            with self:
                return _attention(*args, **kwargs)
        # Of the very call before: others in between might write to these tensors.
        before, self._activation = self._activation, None
        rule = _RULES.get(func)
        known = {"before": before} if rule is _max_pool2d else {}
        result = rule(*args, **kwargs, **known) if rule else NotImplemented
        if isinstance(result, _Activated):
            self._activation, result = result, result.result
        return func(*args, **kwargs) if result is NotImplemented else result


_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
"""torch's own, which hands itself over as a whole where a mode is active: no rule would then see
the layers within."""


class _Activated(NamedTuple):
    """What an activation made of its input, and its slope below zero."""

    result: Tensor
    source: Tensor
    slope: float


# The rules below take torch's arguments by torch's names, as callers may give them by name.


def _batch_norm(  # noqa: PLR0917
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not training or running_mean is not None:
        return NotImplemented
    if maybe_current_level() is None:
        own = _is_plain(input, weight, bias) and takes(input, weight, bias)
        return batch_norm(input, weight, bias, eps) if own else NotImplemented
    if not is_stacked(input):
        return NotImplemented
    folded, tasks = fold(input)
    scale, shift = (_by_channel(parameter, tasks) for parameter in (weight, bias))
    if _is_plain(folded, scale, shift) and takes(folded, scale, shift):
        return unfold(batch_norm(folded, scale, shift, eps), tasks)
    return unfold(F.batch_norm(folded, None, None, scale, shift, training=True, eps=eps), tasks)


def _max_pool2d(  # noqa: PLR0917
    input: Tensor,  # noqa: A002
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    before: _Activated | None = None,
) -> Any:
    if return_indices or input.dim() != 4:
        return NotImplemented
    settings = (kernel_size, [] if stride is None else stride, padding, dilation, ceil_mode)
    # Past a result whose gradient somebody waits for, there is no shorter way.
    waited_for = input.retains_grad or input._backward_hooks
    given = [input]
    if before is not None and before.result is input and not waited_for:
        given.append(before.source)
    slope = before.slope if before is not None and len(given) > 1 else None
    stacked = is_stacked(input)
    folded = [fold(each)[0] if stacked else each for each in given]
    x = folded[0]
    if _is_plain(*folded) and _is_large(x) and x.is_contiguous():
        pooled = pool(x, folded[-1], slope, settings)
    else:
        pooled = F.max_pool2d(x, *settings)
    return unfold(pooled, x.shape[1] // input.shape[1]) if stacked else pooled


def _relu(input: Tensor, inplace: bool = False) -> Any:  # noqa: A002
    return NotImplemented if inplace else _activated(input, 0.0)


def _leaky_relu(
    input: Tensor,  # noqa: A002
    negative_slope: float = 0.01,
    inplace: bool = False,
) -> Any:
    if inplace or not isinstance(negative_slope, int | float) or negative_slope <= 0:
        return NotImplemented
    return _activated(input, negative_slope)


def _activated(x: Tensor, slope: float) -> Any:
    stacked = is_stacked(x)
    values = get_unwrapped(x) if stacked else x
    if not _is_plain(values) or not _is_large(values):
        return NotImplemented
    result = activate(values, slope)
    return _Activated(from_stacked(result, maybe_get_bdim(x) if stacked else None), x, slope)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:  # noqa: A002
    if not is_stacked(weight) or not is_stacked(input) or input.dim() < 2 or weight.dim() < 2:
        return NotImplemented
    inputs, weights = stack_of(input), stack_of(weight)
    rows = inputs if input.dim() == 2 else inputs.flatten(1, -2)
    own = bias is not None and is_stacked(bias)
    shift = stack_of(bias) if bias is not None and own else None
    if _is_plain(rows, weights, shift) and takes_products(rows, weights, shift):
        with outside_vmap():
            outputs = linear(rows, weights, shift)
    else:
        outputs = torch.bmm(rows, weights.mT)
        outputs = outputs if shift is None else outputs + shift.unsqueeze(1)
    if bias is not None and not own:
        outputs = outputs + bias
    if input.dim() > 2:
        outputs = outputs.unflatten(1, inputs.shape[1:-1])
    return _add_batch_dim(outputs, 0, current_level())


def _conv2d(  # noqa: PLR0917
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """One grouped convolution with its bias, which vmap would add in passes of their own."""
    if bias is None or input.dim() != 4 or not all(map(is_stacked, (input, weight, bias))):
        return NotImplemented
    folded, tasks = fold(input)
    weights, shifts = stack_of(weight).flatten(0, 1), stack_of(bias).flatten()
    groups = groups * tasks
    return unfold(F.conv2d(folded, weights, shifts, stride, padding, dilation, groups), tasks)


def _embedding(  # noqa: PLR0917
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    stacked = is_stacked(input) or is_stacked(weight)
    if max_norm is not None or not (sparse or (stacked and padding_idx is not None)):
        return NotImplemented
    # Gradients are dense: fast weights of all tasks are, and sparse tensors have no vmap.
    rest = (None, norm_type, scale_grad_by_freq, False)
    if padding_idx is None or not stacked:
        return F.embedding(input, weight, padding_idx, *rest)
    rows = F.embedding(input, weight, None, *rest)
    return torch.where((input == padding_idx % len(weight)).unsqueeze(-1), rows.detach(), rows)


_RULES: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.conv2d: _conv2d,
    F.embedding: _embedding,
    F.leaky_relu: _leaky_relu,
    F.linear: _linear,
    F.max_pool2d: _max_pool2d,
    F.relu: _relu,
    torch._weight_norm: weight_norm,
    torch.relu: _relu,
    Tensor.relu: _relu,
}


def _is_plain(*values: Tensor | None) -> bool:
    """Whether autograd alone sees these, as the Functions of this package need it."""
    return not any(each is not None and is_seen_through(each) for each in values)


def _is_large(x: Tensor) -> bool:
    """Whether pooling and activations of this package take less time than torch's.

    Where windows overlap, torch sums gradients of fewer digits in float32.
    """
    kinds = (torch.float32, torch.float64)
    return x.device.type == "cpu" and x.numel() >= LARGE and x.dtype in kinds


def _by_channel(parameter: Tensor | None, tasks: int) -> Tensor | None:
    """(tasks · channels,) from one task's (channels,), or from all tasks'."""
    if parameter is None:
        return None
    stacked = stack_of(parameter) if is_stacked(parameter) else parameter.expand(tasks, -1)
    return stacked.flatten()
