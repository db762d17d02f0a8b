"""Cosine annealing of the meta learning rate over the whole run."""

from __future__ import annotations

import math

from pydantic import Field

from metaplug import Plugin, PluginConfig, epoch_of, hookimpl


class CosineMetaLr(Plugin):
    """Lower the meta learning rate of everything that is meta-learned along half a cosine.

        factor(e) = f + (1 − f) · (1 + cos(π e / E)) / 2        e the epoch of E, f the final factor

    The published schedule of MAML++, Adam's 1e-3 down to 1e-5, is f = 0.01.

    Source: Loshchilov and Hutter 2017 (arXiv 1608.03983), equation 5, without restarts;
    Antoniou et al. 2019 (arXiv 1810.09502), section 4.
    """

    class Config(PluginConfig):
        """Where it ends, and how finely it steps."""

        final_factor: float = Field(
            0.01, ge=0, le=1, description="f, the factor at the end of the run."
        )
        iterations_per_epoch: int = Field(
            1,
            ge=1,
            description="Meta-iterations between two changes; 1 anneals in every iteration.",
        )

    config: Config

    @hookimpl
    def scale_meta_learning_rate(self, factor: float, iteration: int, total: int) -> float:
        return factor * self._factor(iteration, total)

    @hookimpl
    def end_meta_step(self, iteration: int, total: int) -> dict[str, float]:
        return {"factor": self._factor(iteration, total)}

    def _factor(self, iteration: int, total: int) -> float:
        final, length = self.config.final_factor, self.config.iterations_per_epoch
        begun = epoch_of(iteration, total, length) * length
        return final + (1 - final) * (1 + math.cos(math.pi * begun / max(total, 1))) / 2
