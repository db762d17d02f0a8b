"""Gradient sharing: regularise early inner steps with what other tasks agree on (arXiv 2312.08398)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from metaplug import Context, Gradients, InnerStep, Plugin, PluginConfig, hookimpl

TINY = 1e-24  # ε² with ε = 1e-12

SQUASH: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hard-sigmoid": nn.functional.hardsigmoid,
    "clamp": lambda x: x.clamp(0, 1),
}
UNSQUASH: dict[str, Callable[[float], float]] = {
    "sigmoid": lambda weight: math.log(weight / (1 - weight)),
    "hard-sigmoid": lambda weight: 6 * weight - 3,
    "clamp": lambda weight: weight,
}


class GradientSharing(Plugin):
    """Blend every task's gradient with a running mean of the tasks' normalised gradients.

        u[t,k] = g[t,k] / max(‖g[t,k]‖, ε)                   unit gradient, ε = 1e-12
        ū[k]   = mean over t of u[t,k]
        r[k]   = σ(m[k]) r_old[k] + (1 − σ(m[k])) ū[k]       running mean; at first r[k] = ū[k]
        d[t,k] = (1 − σ(λ[k])) g[t,k] + σ(λ[k]) ‖g[t,k]‖ r[k]

    The momentum m and the gate λ are meta-parameters; r is a statistic, stored after the meta-update. At evaluation r is used as stored,
    and test tasks never see each other; before anything was stored, gradients pass unchanged.

    Source: arXiv 2312.08398, section 3. Where the paper is silent, the choice is an option.
    """

    class Config(PluginConfig):
        """Options of gradient sharing."""

        gate: float = Field(0.5, ge=0, le=1, description="Initial weight σ(λ) of the shared direction. Exactly 0 or 1 stays so for good.")
        momentum: float = Field(0.5, ge=0, le=1, description="Initial weight σ(m) of earlier batches. Exactly 0 or 1 stays so for good.")
        learn_gate: bool = Field(True, description="Whether the gate is meta-learned.")
        learn_momentum: bool = Field(True, description="Whether the momentum is meta-learned.")
        gate_function: Literal["sigmoid", "hard-sigmoid", "clamp"] = Field("sigmoid", description="σ, from a meta-parameter to a weight.")
        granularity: Literal["step", "step-and-tensor", "one"] = Field("step", description="What has a gate and a momentum of its own.")
        normalisation: Literal["unit", "none", "mean-unit"] = Field(
            "unit",
            description="unit: each task's gradient, then the mean; mean-unit: the mean, then its length; none: the plain mean, unscaled.",
        )
        scope: Literal["all", "tensor"] = Field(
            "all", description="Whether a norm runs over all adapted parameters together or each tensor alone."
        )
        through_mean: bool = Field(True, description="Whether meta-gradients flow through the mean into all tasks.")
        share_at_evaluation: bool = Field(
            False, description="Share within a batch of test tasks too; results are then labelled transductive."
        )
        meta_lr: float = Field(1e-2, gt=0, le=10, description="Meta learning rate of gates and momenta.")

    config: Config
    couples_tasks = True
    running: Tensor
    started: Tensor
    tensor_of: Tensor

    @property
    def meta_lr(self) -> float | None:
        return self.config.meta_lr

    @property
    def transductive(self) -> bool:
        return self.config.share_at_evaluation and self.config.gate > 0

    @hookimpl
    def setup(self, context: Context) -> None:
        sizes = [context.shapes[name].numel() for name in context.adapted]
        slots = max(context.inner_steps, 1)
        self._sizes = dict(zip(context.adapted, sizes, strict=True))
        self.register_buffer("running", torch.zeros(slots, sum(sizes), dtype=context.dtype, device=context.device))
        self.register_buffer("started", torch.zeros(slots, dtype=torch.bool, device=context.device))
        self.register_buffer(
            "tensor_of", torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(context.device), persistent=False
        )
        shape = {"step": (slots, 1), "step-and-tensor": (slots, len(sizes)), "one": (1, 1)}[self.config.granularity]
        for name, value, learn in (
            ("gate", self.config.gate, self.config.learn_gate),
            ("momentum", self.config.momentum, self.config.learn_momentum),
        ):
            if 0 < value < 1:
                start = UNSQUASH[self.config.gate_function](value)
                initial = torch.full(shape, start, dtype=context.dtype, device=context.device)
                self.register_parameter(name, nn.Parameter(initial, requires_grad=learn))

    @hookimpl
    def transform_gradients(self, gradients: Gradients, step: InnerStep) -> Gradients | None:
        if self.config.gate == 0:
            return None
        slot, flat = step.slot, self._flatten(gradients)
        length, gate = self._length(flat), self._weight("gate", slot)
        if step.training or self.config.share_at_evaluation:
            momentum = torch.where(self.started[slot], self._weight("momentum", slot), 0.0)
            shared = torch.lerp(self._mean(flat, length, step), self.running[slot], momentum)
            step.keep(f"{slot}", shared)
        else:
            shared, gate = self.running[slot], torch.where(self.started[slot], gate, 0.0)
        scale = gate if self.config.normalisation == "none" else gate * length
        return self._unflatten((1 - gate) * flat + _outer(scale, shared), gradients)

    @hookimpl
    def commit(self, kept: Mapping[str, Tensor]) -> None:
        for slot, shared in kept.items():
            self.running[int(slot)] = shared
            self.started[int(slot)] = True

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        slots = len(self.started)
        return {f"{name}/{slot}": float(self._weight(name, slot).detach().mean()) for name in ("gate", "momentum") for slot in range(slots)}

    def _mean(self, flat: Tensor, length: Tensor, step: InnerStep) -> Tensor:
        """ū (P,), by the chosen normalisation."""
        if self.config.normalisation == "unit" and self.config.scope == "all":
            mean = step.task_mean(flat, weights=length.squeeze(1).reciprocal())
        else:
            mean = step.task_mean(flat / length if self.config.normalisation == "unit" else flat)
        if self.config.normalisation == "mean-unit":
            mean = mean / self._length(mean.unsqueeze(0)).squeeze(0)
        return mean if self.config.through_mean else mean.detach()

    def _length(self, flat: Tensor) -> Tensor:
        """(rows, 1) or, by tensor, (rows, P): the norm that belongs to each column of `flat` (rows, P)."""
        if self.config.scope == "all":
            return _root(torch.linalg.vecdot(flat, flat)).unsqueeze(1)
        squares = [torch.linalg.vecdot(part, part) for part in flat.split(list(self._sizes.values()), 1)]
        return _root(torch.stack(squares, 1)).index_select(1, self.tensor_of)

    def _weight(self, name: str, slot: int) -> Tensor:
        """σ of the gate or momentum of a slot: () or, by tensor, (P,)."""
        value = self._parameters.get(name)
        if value is None:
            return self.running.new_tensor(self.config.gate if name == "gate" else self.config.momentum)
        weight = SQUASH[self.config.gate_function](value[slot if len(value) > 1 else 0])
        return weight[self.tensor_of] if self.config.granularity == "step-and-tensor" else weight[0]

    def _flatten(self, gradients: Gradients) -> Tensor:
        """(T, P) over all adapted parameters, zero where one received no gradient."""
        tasks = len(next(iter(gradients.values())))
        parts = [
            gradients[name].flatten(1) if name in gradients else self.running.new_zeros(tasks, size) for name, size in self._sizes.items()
        ]
        return torch.cat(parts, 1)

    def _unflatten(self, flat: Tensor, like: Gradients) -> dict[str, Tensor]:
        parts = dict(zip(self._sizes, flat.split(list(self._sizes.values()), 1), strict=True))
        return {name: parts[name].reshape(gradient.shape) for name, gradient in like.items()}


def _outer(scale: Tensor, shared: Tensor) -> Tensor:
    """scale · shared, as a matrix product where `scale` is one number a task: cheaper in both derivatives."""
    return scale @ shared.unsqueeze(0) if scale.dim() == 2 and scale.shape[1] == 1 else scale * shared


def _root(squares: Tensor) -> Tensor:
    """√ with a finite derivative at zero."""
    return squares.clamp_min(TINY).sqrt()
