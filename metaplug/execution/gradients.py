"""The meta-gradients of a batch as a whole: over all ranks, and whether everything is finite."""

from __future__ import annotations

import cmath
from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor

from metaplug.contract.inner_step import LOGGED
from metaplug.core.outer_loop import MetaGradients, ends
from metaplug.execution.ranks import Share


def over_ranks(
    found: MetaGradients, share: Share, meta_parameters: Mapping[str, Tensor]
) -> MetaGradients:
    """Return the same over the tasks of all ranks. A gradient missing on a rank counts as zero."""
    kept = {
        (plugin, name): tensor
        for plugin, tensors in found.statistics.items()
        for name, tensor in tensors.items()
    }
    named = {f"{plugin}.{name}": tensor for (plugin, name), tensor in kept.items()}
    form = ", ".join(
        f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in named.items()
    )
    present = share.agree(*(name in found.gradients for name in meta_parameters), form=form)
    names = [name for name, somewhere in zip(meta_parameters, present, strict=True) if somewhere]
    own = [
        found.gradients[name]
        if name in found.gradients
        else torch.zeros_like(meta_parameters[name])
        for name in names
    ]
    outer_loss, losses, *means = share.means([found.outer_loss, found.losses, *own, *kept.values()])
    statistics: dict[str, dict[str, Tensor]] = {}
    for (plugin, name), mean in zip(kept, means[len(names) :], strict=True):
        statistics.setdefault(plugin, {})[name] = mean
    gradients = dict(zip(names, means, strict=False))
    return MetaGradients(gradients, outer_loss, losses, statistics, found.outcome)


def summed_up(found: MetaGradients, device: torch.device) -> Tensor:
    """Return (3,): outer loss, norm of the meta-gradient, and 1 where everything is finite."""
    # Not get_total_norm: the compiler has no code of its own for it.
    norms = [torch.linalg.vector_norm(each) for each in found.gradients.values()]
    norms = [found.outer_loss.new_zeros(()), *(norm.to(device) for norm in norms)]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    kept = [
        tensor
        for tensors in found.statistics.values()
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.numel() and not name.startswith(LOGGED)
    ]
    single = [norm.square(), found.outer_loss, *chain.from_iterable(map(ends, kept))]
    values = torch.stack([value.to(norm) for value in single])
    finite = torch.isfinite(torch.cat([values, found.losses.to(norm)])).all()
    return torch.stack([found.outer_loss.to(norm), norm, finite.to(norm.dtype)])


def first_nonfinite(parameters: Mapping[str, Tensor], device: torch.device) -> str | None:
    """Return the first parameter that is NaN or Inf; None for none."""
    values = {name: each.detach() for name, each in parameters.items()}
    total = torch.stack([value.sum().to(device) for value in values.values()]).sum()
    if cmath.isfinite(total.item()):  # of complex parameters, too
        return None
    found = (name for name, value in values.items() if not torch.isfinite(value).all())
    return next(found, None)  # a sum may overflow where no entry does
