"""Gradient sharing: regularise inner steps with what other tasks agree on (arXiv 2312.08398)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from metaplug import Context, Gradients, InnerStep, Plugin, hookimpl

from .gradient_sharing_fused import blend
from .gradient_sharing_numbers import blend_by_numbers
from .gradient_sharing_options import SharingOptions, SharingParts, plus_outer


class GradientSharing(Plugin, SharingParts):
    """Blend every task's gradient with a running mean of the tasks' normalised gradients.

        u[t,k] = g[t,k] / max(‖g[t,k]‖, ε)                   unit gradient, ε = 1e-12
        ū[k]   = mean over t of u[t,k]
        r[k]   = σ(m[k]) r_old[k] + (1 − σ(m[k])) ū[k]       running mean; at first r[k] = ū[k]
        d[t,k] = (1 − σ(λ[k])) g[t,k] + σ(λ[k]) ‖g[t,k]‖ r[k]

    The momentum m and the gate λ are meta-parameters; r is a statistic, stored after the
    meta-update. At evaluation r is used as stored, and test tasks never see each other; before
    anything was stored, gradients pass unchanged.

    Conditioned on the task, λ[t,k] = λ[k] + w[k] · s[t,k] with s = (log ‖g[t,k]‖, cosine of g[t,k]
    and r_old[k]), and m alike: w is learned from 0, and the stored r is the mean over tasks.
    Streaming, tasks arrive one at a time: each blends with the mean of the tasks up to its own.

    Source: arXiv 2312.08398, section 3. Where the paper is silent, the choice is an option.
    """

    class Config(SharingOptions):
        """The paper's two weights; what it leaves open is in the options behind them."""

        gate: float = Field(
            0.5,
            ge=0,
            le=1,
            description="Initial weight σ(λ) of the shared direction. Exactly 0 or 1 stays so for "
            "good.",
        )
        momentum: float = Field(
            0.5,
            ge=0,
            le=1,
            description="Initial weight σ(m) of earlier batches. Exactly 0 or 1 stays so for good.",
        )
        learn_gate: bool = Field(True, description="Whether the gate is meta-learned.")
        learn_momentum: bool = Field(True, description="Whether the momentum is meta-learned.")
        meta_lr: float = Field(1e-2, gt=0, le=10, description="Meta learning rate of λ, m and r.")

    config: Config
    couples_tasks = True

    @property
    def transductive(self) -> bool:
        return self.config.share_at_evaluation and self.config.gate > 0

    @hookimpl
    def setup(self, context: Context) -> None:
        self.create(context)

    @hookimpl
    def transform_gradients(self, gradients: Gradients, step: InnerStep) -> Gradients | None:
        if self.config.gate == 0:
            return None
        shares = step.training or self.config.share_at_evaluation
        if shares and self.is_plain and len(gradients) == len(self._sizes):
            return self._fused(gradients, step)
        k, g = step.slot, self.flatten(gradients)
        length = self.length(g)
        if shares and self.config.statistics == "accumulated":
            accumulate = self.streamed if self.config.streaming else self._accumulated
            r, traits, stored = accumulate(g, length, step)
            gate = self.weight("gate", k, traits)
            step.keep(f"{k}", stored)
        else:
            r = self.running[k]
            gate = self.started[k] * self.weight("gate", k, self.traits(g, r))
        scale = gate if self.config.normalisation == "none" else gate * length
        return self.unflatten(plus_outer((1 - gate) * g, scale, r), gradients)

    def _fused(self, gradients: Gradients, step: InnerStep) -> Gradients:
        """The same in one operation, where one gate and one momentum are all there is."""
        k, parts = step.slot, [gradients[name] for name in self._sizes]
        running = self.running
        if step.traced or running.device.type != "cpu":
            logits = self.logit("gate", k), self.logit("momentum", k)
            state = self.started[k], running[k]
            r, directions = blend(parts, *logits, *state, step.over_ranks)
        else:
            gate, momentum = self.number("gate", k), self.number("momentum", k)
            if not self.started.tolist()[k]:
                momentum = momentum._replace(value=0.0)
            r, directions = blend_by_numbers(parts, gate, momentum, running[k], step.over_ranks)
        step.keep(f"{k}", r)
        return dict(zip(self._sizes, directions, strict=True))

    def _accumulated(
        self, g: Tensor, length: Tensor, step: InnerStep
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """r of this step, (P,) or each task's (T, P); the traits; and the r to store (P,)."""
        r_old = self.running[step.slot]
        traits = self.traits(g, r_old)
        momentum = self.started[step.slot] * self.weight("momentum", step.slot, traits)
        r = torch.lerp(self._mean(g, length, step), r_old, momentum)
        return r, traits, r if r.dim() == 1 else step.task_mean(r)

    def _mean(self, g: Tensor, length: Tensor, step: InnerStep) -> Tensor:
        """ū (P,), by the chosen normalisation."""
        if self.config.normalisation == "unit" and self.config.scope == "all":
            mean = step.task_mean(g, weights=length.squeeze(1).reciprocal())
        else:
            mean = step.task_mean(g / length if self.config.normalisation == "unit" else g)
        if self.config.normalisation == "mean-unit":
            mean = mean / self.length(mean.unsqueeze(0)).squeeze(0)
        return mean if self.config.through_mean else mean.detach()

    @hookimpl
    def commit(self, kept: Mapping[str, Tensor]) -> None:
        if len(kept) == len(self.running):  # as always in training, in fewer calls
            torch.stack([kept[f"{k}"] for k in range(len(kept))], out=self.running)
            self.started.fill_(True)
            return
        for k, r in kept.items():
            self.running[int(k)].copy_(r)
            self.started[int(k)].fill_(True)

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        names = ("gate", "momentum") if self.config.statistics == "accumulated" else ("gate",)
        slots, figures = self.started.shape[0], dict[str, float]()
        for name in names:
            found = self.numbers(name)
            figures |= {f"{name}/{k}": found[k if len(found) > 1 else 0] for k in range(slots)}
        return figures
