"""The optimizers of the outer loop, stepped in one kernel where that is exact."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

META_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
"""By name."""


def step_fused(optimizer: torch.optim.Optimizer) -> None:
    """Step by torch's fused kernel on a CPU, a third of the calls' time; else as torch chooses.

    What the optimizer keeps does not depend on the default dtype.

    The kernel walks through memory, whatever the strides of a parameter, its gradient and its
    state (torch 2.14): where these differ it would update the wrong entries, and say nothing.
    """
    for group in optimizer.param_groups:
        parameters: list[Tensor] = group["params"]
        kept = chain.from_iterable(optimizer.state.get(each, {}).values() for each in parameters)
        fuses = all(map(_is_fusible, parameters)) and all(map(_is_contiguous, kept))
        group["fused"] = True if fuses else None
        for parameter in parameters if fuses else ():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.contiguous()
    optimizer.step()
    if torch.get_default_dtype() is torch.float64:  # in which Adam counts steps that are not fused
        for kept in optimizer.state.values():
            if "step" in kept:
                kept["step"] = kept["step"].float()
    for group in optimizer.param_groups:  # what a checkpoint has does not depend on it
        group["fused"] = None


def _is_fusible(parameter: Tensor) -> bool:
    on_cpu = parameter.device.type == "cpu" and parameter.is_floating_point()
    return on_cpu and parameter.is_contiguous()


def _is_contiguous(kept: Any) -> bool:
    return not isinstance(kept, Tensor) or kept.is_contiguous()
