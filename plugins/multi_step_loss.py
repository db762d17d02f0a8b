"""Multi-step loss: query losses after all inner steps count at first, in the end the last alone."""

from __future__ import annotations

from pydantic import Field

from metaplug import Plugin, PluginConfig, epoch_of, hookimpl


class MultiStepLoss(Plugin):
    """Weigh the query losses after every inner step; all but the last fade over the first epochs.

        L = mean over t of Σ_i w_i · query loss of task t after update i        i = 1 … N
        w_i = max(1/N − e/(N·E), floor/N) for i < N,  w_N = 1 − Σ_{i<N} w_i      in epoch e < E
        w_N = 1, the others 0                                                   from epoch E on

    The weights are ≥ 0 and sum to 1. A query loss of weight 0 is not computed.

    Source: Antoniou et al. 2019 (arXiv 1810.09502), section 4, "Multi-Step Loss Optimization";
    the floor is the reference code's.
    """

    conflicts_with = ("reptile",)  # which does not use the outer loss for what it moves

    class Config(PluginConfig):
        """How fast the earlier steps fade."""

        annealing_epochs: int = Field(
            10,
            ge=0,
            description="E, the epoch from which only the last step counts; 0: from the start.",
        )
        floor: float = Field(
            0.03,
            ge=0,
            le=1,
            description="What is left of an earlier step's 1/N at least, before epoch E.",
        )
        iterations_per_epoch: int | None = Field(
            None,
            ge=1,
            description="Meta-iterations in an epoch, 500 in the paper; null: 1/100 of the run.",
        )

    config: Config

    @hookimpl
    def outer_step_weights(self, iteration: int, inner_steps: int, total: int) -> list[float]:
        epoch, annealing = self._epoch(iteration, total), self.config.annealing_epochs
        if epoch >= annealing:
            return [0.0] * (inner_steps - 1) + [1.0]
        faded = 1 / inner_steps - epoch / (inner_steps * annealing)
        earlier = max(faded, self.config.floor / inner_steps)
        return [earlier] * (inner_steps - 1) + [1 - earlier * (inner_steps - 1)]

    @hookimpl
    def end_meta_step(self, iteration: int, total: int) -> dict[str, float]:
        epoch, annealing = self._epoch(iteration, total), self.config.annealing_epochs
        return {"epoch": epoch, "annealed": min(1.0, epoch / annealing) if annealing else 1.0}

    def _epoch(self, iteration: int, total: int) -> int:
        return epoch_of(iteration, total, self.config.iterations_per_epoch)
