"""WarpGrad: layers that tasks do not adapt learn to warp the inner gradients of those they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from metaplug import (
    Gradients,
    InnerStep,
    LearningRates,
    Outcome,
    Parameters,
    Plugin,
    PluginConfig,
    RequestError,
    hookimpl,
)


class WarpGrad(Plugin):
    """Adapt all but the warp layers φ, and let these learn from every step by itself.

        J(φ) = mean over t and k of L[t](θ[t,k] − α[k] ∇ℓ[t](θ[t,k]; φ); φ)    θ[t,k] constant
        direction of θ = mean over t of θ − θ[t,K] = mean over t of Σ_k (θ[t,k] − θ[t,k+1])

    That is the paper's objective, "trajectory"; without `through_step` it is its approximation, in
    which ∇ℓ is constant too. Rates and gates learn by J; what other plugins make of a gradient
    steers the tasks, while φ sees the gradient as it was. "through-loop" only leaves φ out of the
    inner loop: the meta-gradient is MAML's.

    For θ the authors' code takes Leap without its loss terms, and each task's segments divided by
    their lengths; here they keep them, which is Reptile. It draws points of all trajectories in
    small batches, one update each; here all of them make one.

    Source: Flennerhag et al. 2020 (arXiv 1909.00025), section 2.
    """

    # They answer the same hooks.
    conflicts_with = ("derivative-order", "imaml", "multi-step-loss", "reptile", "sharp-maml")

    class Config(PluginConfig):
        """Which layers warp, and how they learn."""

        warp: tuple[str, ...] | None = Field(
            None,
            min_length=1,
            description="Patterns of the warp layers' parameter names; null: every second module.",
        )
        objective: Literal["trajectory", "through-loop"] = Field(
            "trajectory", description="trajectory: each step by itself; through-loop: as MAML."
        )
        through_step: bool = Field(
            True, description="Whether a trajectory's step is differentiated by the warp layers."
        )

    config: Config

    @hookimpl
    def select_adapted(
        self, names: tuple[str, ...], layers: Mapping[str, type[nn.Module]]
    ) -> tuple[str, ...]:
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        warp = {name for name in names if modules.index(name.rpartition(".")[0]) % 2}
        if self.config.warp is not None:
            warp = {x for x in names if any(fnmatchcase(x, each) for each in self.config.warp)}
        # By themselves, layers that another plugin has left out before are warp layers enough.
        enough = warp or (self.config.warp is None and len(layers) > len(names))
        if not enough or (names and len(warp) == len(names)):
            raise RequestError(
                f"plugin '{self.name}' finds {len(warp)} warp parameters among the {len(names)} "
                f"that may adapt ({', '.join(names[:6])}), and needs some of both: correct warp"
            )
        return tuple(name for name in names if name not in warp)

    @hookimpl
    def derivative_order(self) -> int | None:
        return None if self.config.objective == "through-loop" else 1

    @hookimpl
    def update_parameters(
        self,
        parameters: Parameters,
        gradients: Gradients,
        learning_rates: LearningRates,
        step: InnerStep,
    ) -> Parameters | None:
        if self.config.objective == "through-loop" or not step.training:
            return None
        here = {name: each.detach().requires_grad_() for name, each in parameters.items()}
        used = dict(gradients)
        if self.config.through_step:
            at = [here[name] for name in used]
            # Order 1 keeps the loop's gradients constant; this one reaches the warp layers alone.
            anew = torch.autograd.grad(step.objective(here).sum(), at, create_graph=True)
            pairs = zip(used.items(), anew, strict=True)
            used = {name: each + (slope - slope.detach()) for (name, each), slope in pairs}
        moved = {name: here[name].detach() - learning_rates[name] * used[name] for name in used}
        return {**here, **moved}

    @hookimpl
    def outer_step_weights(self, inner_steps: int) -> Sequence[float] | None:
        return None if self.config.objective == "through-loop" else [1 / inner_steps] * inner_steps

    @hookimpl
    def compute_meta_gradients(
        self, outcome: Outcome, outer_loss: Tensor, meta_parameters: Mapping[str, nn.Parameter]
    ) -> Mapping[str, Tensor] | None:
        if self.config.objective == "through-loop" or not outcome.support_losses:
            return None
        start, end = outcome.initial_parameters, outcome.adapted_parameters
        names = [name for name in outcome.adapted if name in meta_parameters]
        moved = {name: (start[name] - end[name]).detach().mean(0) for name in names}
        others = {name: each for name, each in meta_parameters.items() if name not in moved}
        if not others:  # what else does not adapt is frozen
            return moved
        taken = torch.autograd.grad(
            outer_loss, list(others.values()), allow_unused=True, materialize_grads=True
        )
        return {**moved, **dict(zip(others, taken, strict=True))}
