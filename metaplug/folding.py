"""Layers that take all tasks of a batch as channels of one call, where vmap's own rule would copy activations or take a slow kernel.

Stacked convolutions keep their activations as (n, tasks · channels, height, width). Batch norm and max-pooling treat channels one by one,
so they can work on that layout as it is: the same numbers as vmap's rules, with less memory and time (docs/performance.md).
Differentiation is torch's own, outside vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# There is no public way to ask whether a tensor is seen through vmap.
from torch._C._functorch import is_batchedtensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Folding(TorchFunctionMode):
    """While it is active, batch norm by batch statistics and max-pooling of stacked tensors fold the tasks into the channels."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        fold = _FOLDS.get(func)
        result = fold(*args, **(kwargs or {})) if fold and is_batchedtensor(args[0]) else NotImplemented
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
    if not training or running_mean is not None:
        return NotImplemented
    return _BatchNorm.apply(x, weight, bias, eps)


def _max_pool2d(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if kwargs.pop("return_indices", False) or x.dim() != 4:
        return NotImplemented
    return _MaxPool2d.apply(x, args, kwargs)


_FOLDS: dict[Any, Callable[..., Any]] = {F.batch_norm: _batch_norm, F.max_pool2d: _max_pool2d}


class _Folded(torch.autograd.Function):
    """A function that exists under vmap only: what `vmap` computes is differentiated by torch, so that no derivative is written here."""

    @staticmethod
    def forward(*_: Any) -> Any:
        raise AssertionError("a folded layer is called only under vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


class _BatchNorm(_Folded):
    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *parameters: Any) -> tuple[Tensor, int]:
        weight, bias, eps = parameters
        scale, shift = (_by_channel(tensor, dim, info.batch_size) for tensor, dim in ((weight, in_dims[1]), (bias, in_dims[2])))
        normalised = F.batch_norm(_folded(x, in_dims[0]), None, None, scale, shift, training=True, eps=eps)
        return normalised.unflatten(1, (info.batch_size, -1)), 1


class _MaxPool2d(_Folded):
    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int]:
        return F.max_pool2d(_folded(x, in_dims[0]), *args, **kwargs).unflatten(1, (info.batch_size, -1)), 1


def _folded(x: Tensor, dim: int) -> Tensor:
    """(n, tasks · channels, ...) from a tensor with its task axis at `dim`."""
    return x.movedim(dim, 1).flatten(1, 2)


def _by_channel(parameter: Tensor | None, dim: int | None, tasks: int) -> Tensor | None:
    """(tasks · channels,) from one task's (channels,), or from all tasks'."""
    if parameter is None:
        return None
    return (parameter.expand(tasks, -1) if dim is None else parameter.movedim(dim, 0)).flatten()
