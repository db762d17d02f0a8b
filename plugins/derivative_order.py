"""Derivative order: first order or none for good, or until an epoch (MAML++'s annealing)."""

from __future__ import annotations

from pydantic import Field

from metaplug import InnerStep, Plugin, PluginConfig, epoch_of, hookimpl


class DerivativeOrder(Plugin):
    """Leave second derivatives out: inner gradients are constants, which saves their graph.

        order(e) = order where e < switch, 2 from there on    e the epoch of the meta-iteration

    Order 0 also cuts the way from step to step, so no step keeps a graph. It needs a plugin that
    makes the meta-gradients of what tasks start from without that way, such as `reptile`.
    Evaluation needs no second derivatives and asks for no order.

    Source: Finn et al. 2017 (arXiv 1703.03400), section 5.2, for first order;
    Antoniou et al. 2019 (arXiv 1810.09502), section 4, for annealing.
    """

    class Config(PluginConfig):
        """The order at first, and when second order begins."""

        switch: int | None = Field(
            None, ge=0, description="The epoch from which on second order is used; null: never."
        )
        iterations_per_epoch: int | None = Field(
            1,
            ge=1,
            description="Meta-iterations in an epoch; null makes an epoch a hundredth of the run.",
        )
        order: int = Field(1, ge=0, le=1, description="Before that; 0 keeps no graph of the steps.")

    config: Config

    @hookimpl
    def derivative_order(self, step: InnerStep) -> int:
        return self._order(step.meta_iteration, step.meta_iterations)

    @hookimpl
    def end_meta_step(self, iteration: int, total: int) -> dict[str, float]:
        return {"order": self._order(iteration, total)}

    def _order(self, iteration: int, total: int) -> int:
        switch, length = self.config.switch, self.config.iterations_per_epoch
        begun = switch is not None and epoch_of(iteration, total, length) >= switch
        return 2 if begun else self.config.order
