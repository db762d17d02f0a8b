"""Reptile: move the weights towards where the tasks' inner loops end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metaplug import Outcome, Plugin, hookimpl


class Reptile(Plugin):
    """Replace the meta-gradient of what the inner loop adapts by the way that the tasks went.

        G = mean over t of (θ − θ[t,K])
        θ ← θ + ε · mean over t of (θ[t,K] − θ)        with SGD of rate ε in the outer loop

    What the inner loop does not adapt, such as other plugins' meta-parameters, keeps the gradient
    of the outer loss. No second derivatives are needed: put `derivative-order` beside it, as the
    preset `reptile` does, to save their graph. Where all learns by the way that tasks went, its
    `order` of 0 gives the same meta-gradients and keeps no graph of the steps at all.

    Source: Nichol et al. 2018 (arXiv 1803.02999), sections 2 and 5.
    """

    conflicts_with = ("multi-step-loss",)  # which would change a loss that is not used

    @hookimpl
    def compute_meta_gradients(
        self, outcome: Outcome, outer_loss: Tensor, meta_parameters: Mapping[str, nn.Parameter]
    ) -> Mapping[str, Tensor]:
        start, end = outcome.initial_parameters, outcome.adapted_parameters
        # Not by identity: a tensor that no step touched may be another one all the same.
        adapted = outcome.adapted if outcome.support_losses else ()
        moved = {
            name: (start[name] - end[name]).detach().mean(0)
            for name in adapted
            if name in meta_parameters
        }
        others = {name: each for name, each in meta_parameters.items() if name not in moved}
        if not others:
            return moved
        # What order 0 cuts off would never learn: left out, the engine refuses it by its name.
        complete = 0 not in outcome.derivative_orders
        taken = torch.autograd.grad(
            outer_loss, list(others.values()), allow_unused=True, materialize_grads=complete
        )
        found = {name: each for name, each in zip(others, taken, strict=True) if each is not None}
        return {**moved, **found}
