"""WarpGrad: layers that tasks do not adapt learn to warp the inner gradients of those they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    gradients_of,
    hookimpl,
    task_vectors,
)


class WarpGrad(Plugin):
    """Adapt all but the warp layers φ, and let these learn from every step by itself.

        J(φ) = mean over t and k of L[t](θ[t,k] − α[k] ∇ℓ[t](θ[t,k]; φ); φ)    θ[t,k] constant
        direction of θ = mean over t of θ − θ[t,K] = mean over t of Σ_k (θ[t,k] − θ[t,k+1])

    Without `through_step` ∇ℓ is constant too. In the authors' code θ learns by Leap, of segments
    divided by their lengths, and φ by points of all trajectories in small batches; "through-loop"
    only leaves φ out of the inner loop, and the meta-gradient is MAML's.

    Source: Flennerhag et al. 2020 (arXiv 1909.00025), section 2.
    """

    class Config(PluginConfig):
        """Which layers warp, and how they learn."""

        warp: tuple[str, ...] | None = Field(
            None, min_length=1, description="Patterns of parameters; null: every second module's."
        )
        objective: Literal["trajectory", "through-loop"] = Field(
            "trajectory", description="trajectory: each step by itself; through-loop: as MAML."
        )
        through_step: bool = Field(
            True, description="Whether a trajectory's step is differentiated by the warp layers."
        )

    config: Config

    @property
    def conflicts_with(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those that answer the same hooks."""
        same = ("alfa", "derivative-order", "imaml", "multi-step-loss", "reptile", "sharp-maml")
        return same if self.config.objective == "trajectory" else ()

    @hookimpl
    def select_adapted(
        self, names: tuple[str, ...], layers: Mapping[str, type[nn.Module]]
    ) -> tuple[str, ...]:
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        warp = tuple(name for name in names if modules.index(name.rpartition(".")[0]) % 2)
        if self.config.warp is not None:
            warp = self.matching("warp", names, "parameters that may adapt")
        # By themselves, layers that another plugin has left out before are warp layers enough.
        enough = warp or (self.config.warp is None and len(layers) > len(names))
        if not enough or (names and len(warp) == len(names)):
            raise RequestError(
                f"plugin '{self.name}' needs layers that warp beside layers that adapt, but of "
                f"{len(names)} parameters {len(warp)} would warp: correct warp"
            )
        return tuple(name for name in names if name not in warp)

    @hookimpl
    def derivative_order(self) -> int | None:
        return 1 if self.config.objective == "trajectory" else None

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
        return [1 / inner_steps] * inner_steps if self.config.objective == "trajectory" else None

    @hookimpl
    def compute_meta_gradients(
        self, outcome: Outcome, outer_loss: Tensor, meta_parameters: Mapping[str, nn.Parameter]
    ) -> Mapping[str, Tensor] | None:
        if self.config.objective == "through-loop" or not outcome.support_losses:
            return None
        start, end = outcome.initial_parameters, outcome.adapted_parameters
        ways = {name: (start[name] - end[name]).detach() for name in outcome.adapted}
        outcome.log("distance", task_vectors(ways.values()).norm(dim=1))
        moved = {name: way.mean(0) for name, way in ways.items() if name in meta_parameters}
        others = {name: each for name, each in meta_parameters.items() if name not in moved}
        return {**moved, **gradients_of(outer_loss, others)}
