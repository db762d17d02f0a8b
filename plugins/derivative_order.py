"""Derivative order: first order for good, or until an iteration (MAML++'s annealing)."""

from __future__ import annotations

from pydantic import Field

from metaplug import InnerStep, Plugin, PluginConfig, hookimpl


class DerivativeOrder(Plugin):
    """Leave second derivatives out: meta-gradients do not flow through the inner gradients, which saves their graph and its time.

        order(i) = 1 where i < switch, 2 from there on

    Source: Finn et al. 2017 (arXiv 1703.03400), section 5.2, for first order; Antoniou et al. 2019 (arXiv 1810.09502), section 4, for
    annealing.
    """

    class Config(PluginConfig):
        """When second order begins."""

        switch: int | None = Field(None, ge=0, description="The meta-iteration from which on second order is used; null: never.")

    config: Config

    @hookimpl
    def derivative_order(self, step: InnerStep) -> int:
        return 2 if self.config.switch is not None and step.meta_iteration >= self.config.switch else 1
