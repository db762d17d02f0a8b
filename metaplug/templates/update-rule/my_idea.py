"""my-idea: an inner update that is pulled towards the start."""

from __future__ import annotations

from metaplug import Gradients, InnerStep, LearningRates, Parameters, Plugin, PluginConfig, hookimpl
from pydantic import Field
from torch import Tensor


class MyIdea(Plugin):
    """Replace every inner update by a proximal step towards where the task started.

        w ← (w − α · g + α · strength · w₀) / (1 + α · strength)

    It minimises ⟨g, w⟩ + ‖w − w[k]‖² / (2α) + (strength / 2) · ‖w − w₀‖². Unlike a penalty in the
    loss, it stays stable however large the strength is.

    Source: the penalty is that of Rajeswaran et al. 2019, "Meta-Learning with Implicit Gradients"
    (arXiv 1909.04630), equation 3; the step is Parikh and Boyd 2014, "Proximal Algorithms".
    """

    class Config(PluginConfig):
        """How hard it is pulled."""

        strength: float = Field(0.5, ge=0, le=1e6, description="Weight of the pull; 0 is off.")

    config: Config
    conflicts_with = ("alfa", "warp-grad")  # they update, too

    @hookimpl
    def update_parameters(
        self,
        parameters: Parameters,
        gradients: Gradients,
        learning_rates: LearningRates,
        step: InnerStep,
    ) -> Parameters | None:
        if self.config.strength == 0:
            return None
        start = step.initial_parameters
        return {
            name: self._updated(value, gradients[name], learning_rates[name], start[name])
            if name in gradients
            else value
            for name, value in parameters.items()
        }

    def _updated(self, value: Tensor, gradient: Tensor, rate: Tensor, start: Tensor) -> Tensor:
        pull = rate * self.config.strength
        return (value - rate * gradient + pull * start) / (1 + pull)
