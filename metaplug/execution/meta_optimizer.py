"""The optimizers of the outer loop, stepped in one kernel where that is exact."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

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
    fuses = [_fuses(optimizer, group) for group in optimizer.param_groups]
    for group, fused in zip(optimizer.param_groups, fuses, strict=True):
        for parameter in group["params"] if fused else ():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.contiguous()
    if isinstance(optimizer, torch.optim.Adam) and all(fuses) and _has_begun(optimizer):
        for group in optimizer.param_groups:
            _step_adam(optimizer, group)
        return
    for group, fused in zip(optimizer.param_groups, fuses, strict=True):
        group["fused"] = True if fused else None
    optimizer.step()
    if torch.get_default_dtype() is torch.float64:  # in which Adam counts steps that are not fused
        for kept in optimizer.state.values():
            if "step" in kept:
                kept["step"] = kept["step"].float()
    for group in optimizer.param_groups:  # what a checkpoint has does not depend on it
        group["fused"] = None


def _fuses(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    parameters: list[Tensor] = group["params"]
    kept = chain.from_iterable(optimizer.state.get(each, {}).values() for each in parameters)
    return all(map(_is_fusible, parameters)) and all(map(_is_contiguous, kept))


def _has_begun(optimizer: torch.optim.Adam) -> bool:
    """Whether it has a state of every parameter that is to step; its first step makes one."""
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return all(each in optimizer.state for each in parameters if each.grad is not None)


@torch.no_grad()
def _step_adam(optimizer: torch.optim.Adam, group: dict[str, Any]) -> None:
    """Step one group by torch's function, which `Adam.step` calls after much else."""
    parameters = [each for each in group["params"] if each.grad is not None]
    states = [optimizer.state[each] for each in parameters]
    averages, squares, steps = (
        [state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")
    )
    given = {name: group[name] for name in ("lr", "weight_decay", "eps", "maximize")}
    given |= {"amsgrad": False, "beta1": group["betas"][0], "beta2": group["betas"][1]}
    gradients = [each.grad for each in parameters if each.grad is not None]
    adam(parameters, gradients, averages, squares, [], steps, fused=True, **given)


def _is_fusible(parameter: Tensor) -> bool:
    on_cpu = parameter.device.type == "cpu" and parameter.is_floating_point()
    return on_cpu and parameter.is_contiguous()


def _is_contiguous(kept: Any) -> bool:
    return not isinstance(kept, Tensor) or kept.is_contiguous()
