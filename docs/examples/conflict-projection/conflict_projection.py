"""Conflict projection: remove from a task's gradient what opposes the batch."""

import torch
from metaplug import Context, Gradients, InnerStep, Plugin, PluginConfig, hookimpl
from pydantic import Field
from torch import Tensor


class ConflictProjection(Plugin):
    """Project each task's inner gradient away from conflict with the batch's mean gradient ḡ[k].

        g[t,k] ← g[t,k] − strength · min(0, ⟨g[t,k], ḡ[k]⟩) / ‖ḡ[k]‖² · ḡ[k]

    Over all adapted parameters, ‖ḡ‖² at least 1e-12. At evaluation ḡ is the last training batch's.
    """

    class Config(PluginConfig):
        """The strength of the projection."""

        strength: float = Field(1.0, ge=0, le=1, description="Share of the conflict to remove.")

    config: Config
    couples_tasks = True

    @hookimpl
    def setup(self, context: Context) -> None:
        self.sizes = {name: context.shapes[name].numel() for name in context.adapted}
        start = torch.zeros((), dtype=context.dtype, device=context.device)
        slots = max(context.inner_steps, 1)
        self.register_buffer("mean", start.repeat(slots, sum(self.sizes.values())))
        self.register_buffer("conflict", start.repeat(slots))

    @hookimpl
    def transform_gradients(self, gradients: Gradients, step: InnerStep) -> Gradients | None:
        if self.config.strength == 0:
            return None
        own = [gradients.get(name, torch.zeros_like(step.parameters[name])) for name in self.sizes]
        flat = torch.cat([tensor.reshape(len(tensor), -1) for tensor in own], 1)  # (tasks, weights)
        mean = step.task_mean(flat) if step.training else self.mean[step.slot]
        along = flat @ mean
        step.keep(f"mean/{step.slot}", mean)
        step.keep(f"conflict/{step.slot}", (along < 0).to(flat.dtype).mean())
        share = self.config.strength * along.clamp(max=0) / mean.square().sum().clamp_min(1e-12)
        parts = (flat - torch.outer(share, mean)).split([*self.sizes.values()], 1)
        found = dict(zip(self.sizes, parts, strict=True))
        return {name: found[name].reshape(tensor.shape) for name, tensor in gradients.items()}

    @hookimpl
    def commit(self, kept: dict[str, Tensor]) -> None:
        for key, value in kept.items():
            name, slot = key.split("/")
            self.get_buffer(name)[int(slot)] = value

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        return {f"conflict/{slot}": share for slot, share in enumerate(self.conflict.tolist())}
