"""Per-step batch norm: meta-learned scales and shifts for each inner step (MAML++'s BNWB)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from metaplug import (
    Context,
    InnerStep,
    LearnedPluginConfig,
    Parameters,
    Plugin,
    RequestError,
    hookimpl,
    key_of,
)


class PerStepBatchNorm(Plugin):
    """Give batch norm layers a scale γ and a shift β for each inner step k, which do not adapt.

        y = γ[k] · (x − mean) / √(variance + ε) + β[k]
        γ, β of shape (K, channels)

    The support pass of step k and the query pass after its update both use γ[k] and β[k]. They are
    meta-learned from the model's own values, which are then no longer used. Statistics are those of
    the batch, as in the reference code, or stored ones, as the learner's `batch_norm` says.

    Source: Antoniou et al. 2019 (arXiv 1810.09502), section 4, "Per-Step Batch Normalization
    Weights and Biases".
    """

    class Config(LearnedPluginConfig):
        """How fast the scales and shifts are learned."""

    config: Config

    @hookimpl
    def select_adapted(
        self, names: tuple[str, ...], layers: Mapping[str, type[nn.Module]]
    ) -> tuple[str, ...]:
        return tuple(name for name in names if not _of_batch_norm(layers[name]))

    @hookimpl
    def setup(self, context: Context) -> None:
        names = [name for name, layer in context.layers.items() if _of_batch_norm(layer)]
        if not names:
            raise RequestError(
                f"plugin '{self.name}' needs batch norm layers with trainable scales and shifts, "
                "and the model has none: leave it out, or use a model that has them, such as conv4"
            )
        slots = max(context.inner_steps, 1)
        self.values = nn.ParameterDict(
            {key_of(name): context.parameters[name].expand(slots, -1).clone() for name in names}
        )
        self._names = names

    @hookimpl
    def transform_parameters(self, parameters: Parameters, step: InnerStep) -> Parameters:
        slot, tasks = step.slot, len(next(iter(parameters.values())))
        own = {name: self.values[key_of(name)][slot].expand(tasks, -1) for name in self._names}
        return {**parameters, **own}

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for kind in ("weight", "bias"):
            names = [name for name in self._names if name.endswith(kind)]
            rows = [self.values[key_of(name)].detach().mean(1) for name in names]
            for slot, value in enumerate(sum(rows) / len(rows) if rows else ()):
                figures[f"{kind}/{slot}"] = float(value)
        return figures


def _of_batch_norm(layer: type[nn.Module]) -> bool:
    return issubclass(layer, nn.modules.batchnorm._BatchNorm)
