"""Other ways to use what the tasks of a batch agree on, as ideas beside gradient sharing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from metaplug import Context, Gradients, InnerStep, LearnedPluginConfig, Plugin, hookimpl

EPSILON = 1e-12


class SharingIdeas(Plugin):
    """Of u = g / l, l = ‖g‖, and a running mean r of u over tasks and batches, weights of one half.

    With s[k] = σ(λ[k]), a gate for each inner step, and r̂ = r / ‖r‖:

        signed            d = (1 − λ) g + λ l r, with λ of either sign, at first 0
        annealed          d = (1 − c s) g + c s l r; c falls from 1 to 0 in the first half of a run
        body              d = (1 − s) g + s l r, but d = g in the last two tensors, the classifier
        taken-out         d = g − s (g · r̂) r̂
        second-moments    d = (1 − s) g + s l p / ‖p‖, p = u / (√v + 0.1 rms √v), v as r, but of u²
        common-length     d = (1 − s) g + s L u, with L as r, but of l
    """

    class Config(LearnedPluginConfig):
        """Which idea, and the meta learning rate of its gates."""

        idea: Literal[
            "signed", "annealed", "body", "taken-out", "second-moments", "common-length"
        ] = Field("signed", description="What becomes of the gradients.")
        meta_lr: float = Field(1e-2, gt=0, le=10, description="Meta learning rate of λ.")

    config: Config
    couples_tasks = True

    @hookimpl
    def setup(self, context: Context) -> None:
        self._sizes = {name: context.shapes[name].numel() for name in context.adapted}
        like = {"dtype": context.dtype, "device": context.device}
        steps, total = max(context.inner_steps, 1), sum(self._sizes.values())
        self.gate = nn.Parameter(torch.zeros(steps, **like))
        self.register_buffer("mean", torch.zeros(steps, total, **like))
        self.register_buffer("started", torch.zeros(steps, dtype=torch.bool, device=like["device"]))
        shared = torch.ones(total, **like)
        if self.config.idea == "body":
            shared[-sum(list(self._sizes.values())[-2:]) :] = 0
        self.register_buffer("shared", shared, persistent=False)

    @hookimpl
    def transform_gradients(self, gradients: Gradients, step: InnerStep) -> Gradients:
        k, tasks = step.slot, len(next(iter(gradients.values())))
        none = self.mean.new_zeros(())  # where no gradient came
        parts = [
            gradients.get(name, none.expand(tasks, size)).reshape(tasks, size)
            for name, size in self._sizes.items()
        ]
        g = torch.cat(parts, 1)
        length = torch.linalg.vecdot(g, g).clamp_min(EPSILON**2).sqrt().unsqueeze(1)
        r = self.mean[k]
        if step.training:
            now = step.task_mean(self._of_tasks(g, length))
            r = torch.lerp(now, r, 0.5 * self.started[k])
            step.keep(f"{k}", r)
        elif not self.started[k]:
            return gradients
        d = self._directions(g, length, r, step).split([*self._sizes.values()], 1)
        by_name = dict(zip(self._sizes, d, strict=True))
        return {name: by_name[name].view_as(gradient) for name, gradient in gradients.items()}

    def _of_tasks(self, g: Tensor, length: Tensor) -> Tensor:
        """(T, P) of which r is a running mean."""
        if self.config.idea == "common-length":
            return length.expand_as(g)
        return (g / length).square() if self.config.idea == "second-moments" else g / length

    def _directions(self, g: Tensor, length: Tensor, r: Tensor, step: InnerStep) -> Tensor:
        """(T, P) d of the tasks' gradients g (T, P), their norms (T, 1) and r (P,)."""
        gate, idea = self.gate[step.slot], self.config.idea
        s = gate if idea == "signed" else gate.sigmoid()
        if idea == "annealed":
            s = s * max(0.0, 1 - 2 * step.meta_iteration / max(step.meta_iterations, 1))
        if idea == "taken-out":
            unit = r / torch.linalg.vector_norm(r).clamp_min(EPSILON)
            return g - s * (g @ unit).unsqueeze(1) * unit
        if idea == "second-moments":
            root = r.clamp_min(EPSILON**2).sqrt()
            p = g / (root + 0.1 * root.square().mean().sqrt())
            to = length * p / torch.linalg.vector_norm(p, dim=1, keepdim=True).clamp_min(EPSILON)
        else:
            to = r * g / length if idea == "common-length" else length * r
        return g + s * self.shared * (to - g)

    @hookimpl
    def commit(self, kept: Mapping[str, Tensor]) -> None:
        for k, r in kept.items():
            self.mean[int(k)].copy_(r)
            self.started[int(k)].fill_(True)

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        return {f"gate/{k}": gate for k, gate in enumerate(self.gate.detach().tolist())}
