"""Gradient sharing: regularise early inner steps with what other tasks agree on (arXiv 2312.08398)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from metaplug import (
    Context,
    Gradients,
    InnerStep,
    LearnedPluginConfig,
    Plugin,
    RequestError,
    checkpoint,
    hookimpl,
)

EPSILON = 1e-12

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

    Conditioned on the task, λ[t,k] = λ[k] + w[k] · s[t,k] with s = (log ‖g[t,k]‖, cosine of g[t,k] and r_old[k]), and m alike: w is learned
    from 0, and the stored r is the mean over tasks. Streaming, tasks arrive one at a time: task t blends with the mean of the tasks up to
    its own, r_t = σ(m) r_{t−1} + (1 − σ(m)) u[t,k], those before it being constants, as if every batch had one task.

    Source: arXiv 2312.08398, section 3. Where the paper is silent, the choice is an option.
    """

    class Config(LearnedPluginConfig):
        """Options of gradient sharing."""

        gate: float = Field(
            0.5,
            ge=0,
            le=1,
            description="Initial weight σ(λ) of the shared direction. Exactly 0 or 1 stays so for good.",
        )
        momentum: float = Field(
            0.5,
            ge=0,
            le=1,
            description="Initial weight σ(m) of earlier batches. Exactly 0 or 1 stays so for good.",
        )
        learn_gate: bool = Field(True, description="Whether the gate is meta-learned.")
        learn_momentum: bool = Field(True, description="Whether the momentum is meta-learned.")
        gate_function: Literal["sigmoid", "hard-sigmoid", "clamp"] = Field(
            "sigmoid", description="σ, from a meta-parameter to a weight."
        )
        granularity: Literal["step", "tensor", "step-and-tensor", "one"] = Field(
            "step", description="What has a gate and a momentum of its own."
        )
        conditioning: Literal["none", "task"] = Field(
            "none",
            description="task: gates and momenta depend on each task's own gradient too, its length and its agreement with r.",
        )
        normalisation: Literal["unit", "none", "mean-unit"] = Field(
            "unit",
            description="unit: each task's gradient, then the mean; mean-unit: the mean, then its length; none: the plain mean, unscaled.",
        )
        scope: Literal["all", "tensor"] = Field(
            "all",
            description="Whether a norm runs over all adapted parameters together or each tensor alone.",
        )
        statistics: Literal["accumulated", "learned", "frozen"] = Field(
            "accumulated",
            description="r: the running mean; learned: a meta-parameter, from 0; frozen: what `start` holds, never updated.",
        )
        start: Path | None = Field(
            None,
            description="A checkpoint whose running mean this one begins with, read whenever the learner is made; null: with none.",
        )
        streaming: bool = Field(
            False, description="Whether the tasks of a batch arrive one at a time, in their order."
        )
        through_mean: bool = Field(
            True, description="Whether meta-gradients flow through the mean into all tasks."
        )
        share_at_evaluation: bool = Field(
            False,
            description="Share within a batch of test tasks too; results are then labelled transductive.",
        )
        meta_lr: float = Field(
            1e-2,
            gt=0,
            le=10,
            description="Meta learning rate of gates, momenta and learned statistics.",
        )

        @model_validator(mode="after")
        def _statistics_have_a_use(self) -> GradientSharing.Config:
            if self.statistics == "frozen" and self.start is None:
                raise ValueError(
                    "statistics = 'frozen' needs a running mean to freeze: give start, a checkpoint that has one"
                )
            for option, set_so in (
                ("streaming", self.streaming),
                ("share_at_evaluation", self.share_at_evaluation),
            ):
                if self.statistics != "accumulated" and set_so:
                    raise ValueError(
                        f"{option} changes how statistics accumulate, and statistics = '{self.statistics}': choose one"
                    )
            return self

    config: Config
    couples_tasks = True
    running: Tensor
    started: Tensor
    tensor_of: Tensor

    @property
    def transductive(self) -> bool:
        return self.config.share_at_evaluation and self.config.gate > 0

    @hookimpl
    def setup(self, context: Context) -> None:
        if self.config.streaming and context.ranks > 1:
            raise RequestError(
                f"plugin '{self.name}': streaming = true on {context.ranks} ranks: each task must find what those before it have left, and "
                "these are on other ranks; use one rank, or leave streaming out"
            )
        zero = torch.zeros((), dtype=context.dtype, device=context.device)
        sizes = [context.shapes[name].numel() for name in context.adapted]
        slots = max(context.inner_steps, 1)
        self._sizes = dict(zip(context.adapted, sizes, strict=True))
        running = zero.new_zeros(slots, sum(sizes))
        if self.config.statistics == "learned":
            self.register_parameter("running", nn.Parameter(running))
        else:
            self.register_buffer("running", running)
        self.register_buffer(
            "started",
            torch.full((slots,), self.config.statistics == "learned", device=context.device),
        )
        tensor_of = torch.repeat_interleave(
            torch.arange(len(sizes)), torch.tensor(sizes), output_size=sum(sizes)
        )
        self.register_buffer("tensor_of", tensor_of.to(context.device), persistent=False)
        by_step, by_tensor = "step" in self.config.granularity, "tensor" in self.config.granularity
        shape = (slots if by_step else 1, len(sizes) if by_tensor else 1)
        for name, value, learn in (
            ("gate", self.config.gate, self.config.learn_gate),
            (
                "momentum",
                self.config.momentum,
                self.config.learn_momentum and self.config.statistics == "accumulated",
            ),
        ):
            if 0 < value < 1:
                start = UNSQUASH[self.config.gate_function](value)
                self.register_parameter(
                    name, nn.Parameter(zero.new_full(shape, start), requires_grad=learn)
                )
                if self.config.conditioning == "task":
                    self.register_parameter(
                        f"{name}_by_task",
                        nn.Parameter(zero.new_zeros(*shape, 2), requires_grad=learn),
                    )
        if self.config.start is not None:
            self._begin_with(self.config.start)

    @hookimpl
    def transform_gradients(self, gradients: Gradients, step: InnerStep) -> Gradients | None:
        if self.config.gate == 0:
            return None
        slot, flat = step.slot, self._flatten(gradients)
        length = self._length(flat)
        if self.config.statistics == "accumulated" and (
            step.training or self.config.share_at_evaluation
        ):
            shared, traits, kept = (self._streamed if self.config.streaming else self._accumulated)(
                flat, length, step
            )
            gate = self._weight("gate", slot, traits)
            step.keep(f"{slot}", kept)
        else:
            shared = self.running[slot]
            gate = self.started[slot] * self._weight("gate", slot, self._traits(flat, shared))
        scale = gate if self.config.normalisation == "none" else gate * length
        return self._unflatten(_plus_outer((1 - gate) * flat, scale, shared), gradients)

    @hookimpl
    def commit(self, kept: Mapping[str, Tensor]) -> None:
        for slot, shared in kept.items():
            self.running[int(slot)] = shared
            self.started[int(slot)] = True

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        names, slots = (
            ("gate", "momentum") if self.config.statistics == "accumulated" else ("gate",),
            len(self.started),
        )
        with torch.no_grad():
            weights = [
                torch.stack([self._weight(name, slot).mean() for slot in range(slots)]).tolist()
                for name in names
            ]
        return {
            f"{name}/{slot}": weight
            for name, by_slot in zip(names, weights, strict=True)
            for slot, weight in enumerate(by_slot)
        }

    def _accumulated(
        self, flat: Tensor, length: Tensor, step: InnerStep
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """r for this step, (P,), or (T, P) where each task has its own; the tasks' traits; and what of r is to be stored, (P,)."""
        old, traits = self.running[step.slot], self._traits(flat, self.running[step.slot])
        momentum = self.started[step.slot] * self._weight("momentum", step.slot, traits)
        shared = torch.lerp(self._mean(flat, length, step), old, momentum)
        return shared, traits, shared if shared.dim() == 1 else step.task_mean(shared)

    def _streamed(
        self, flat: Tensor, length: Tensor, step: InnerStep
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The same for tasks that arrive one at a time: each finds what those before it have left."""
        old, started = self.running[step.slot], self.started[step.slot]
        units = flat if self.config.normalisation == "none" else flat / length
        shared, traits = [], []
        for gradient, unit in zip(flat.split(1), units.split(1), strict=True):
            own = self._traits(gradient, old)
            momentum = started * self._weight("momentum", step.slot, own)
            shared.append(
                torch.lerp(unit if self.config.through_mean else unit.detach(), old, momentum)
            )
            old, started = shared[-1].detach()[0], torch.ones_like(started)
            traits += [] if own is None else [own]
        return torch.cat(shared), torch.cat(traits) if traits else None, old

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
            return _norm(flat)
        squares = [
            torch.linalg.vecdot(part, part) for part in flat.split(list(self._sizes.values()), 1)
        ]
        return _root(torch.stack(squares, 1)).index_select(1, self.tensor_of)

    def _traits(self, flat: Tensor, old: Tensor) -> Tensor | None:
        """(T, 2): each task's log gradient norm, and its cosine with the mean so far, 0 where there is none; None if not asked for."""
        if self.config.conditioning == "none":
            return None
        length = _norm(flat)
        return torch.cat(
            [length.log(), (flat @ old).unsqueeze(1) / length / _norm(old.unsqueeze(0))], 1
        )

    def _weight(self, name: str, slot: int, traits: Tensor | None = None) -> Tensor:
        """σ of the gate or momentum of a slot: () or (1,) or, by tensor, (P,); conditioned on the task's traits, (T, 1) or (T, P)."""
        value, by_task = self._parameters.get(name), self._parameters.get(f"{name}_by_task")
        if value is None:
            return self.started.new_tensor(
                self.config.gate if name == "gate" else self.config.momentum,
                dtype=self.running.dtype,
            )
        row = slot if len(value) > 1 else 0
        logits = value[row]
        if traits is not None and by_task is not None:
            logits = logits + traits @ by_task[row].T
        weight = SQUASH[self.config.gate_function](logits)
        if "tensor" in self.config.granularity:
            return weight[..., self.tensor_of]
        return weight

    def _begin_with(self, path: Path) -> None:
        """Take over the running mean of a checkpoint.

        Raises:
            RequestError: it has none, or one of another shape.
        """
        states = checkpoint.read(path)["plugin_states"].values()
        found = next((state for state in states if {"running", "started"} <= state.keys()), None)
        if found is None:
            raise RequestError(
                f"plugin '{self.name}': start = {path} has no running mean: give a checkpoint of a run with gradient-sharing"
            )
        if found["running"].shape != self.running.shape:
            raise RequestError(
                f"plugin '{self.name}': the running mean of start = {path} has (inner steps, adapted weights) = "
                f"{tuple(found['running'].shape)}, and this run {tuple(self.running.shape)}: use the same model and inner_steps"
            )
        with torch.no_grad():
            self.running.copy_(found["running"])
            self.started.copy_(found["started"])

    def _flatten(self, gradients: Gradients) -> Tensor:
        """(T, P) over all adapted parameters, zero where one received no gradient."""
        tasks = len(next(iter(gradients.values())))
        parts = [
            gradients[name].flatten(1) if name in gradients else self.running.new_zeros(tasks, size)
            for name, size in self._sizes.items()
        ]
        return torch.cat(parts, 1)

    def _unflatten(self, flat: Tensor, like: Gradients) -> dict[str, Tensor]:
        parts = dict(zip(self._sizes, flat.split(list(self._sizes.values()), 1), strict=True))
        return {name: parts[name].reshape(gradient.shape) for name, gradient in like.items()}


def _plus_outer(own: Tensor, scale: Tensor, shared: Tensor) -> Tensor:
    """own + scale · shared, in one matrix product where `scale` is one number a task: cheaper in both derivatives."""
    one_each = scale.dim() == 2 and scale.shape[1] == 1 and shared.dim() == 1
    return torch.addmm(own, scale, shared.unsqueeze(0)) if one_each else own + scale * shared


def _norm(rows: Tensor) -> Tensor:
    """(rows, 1): the norm of every row."""
    return _root(torch.linalg.vecdot(rows, rows)).unsqueeze(1)


def _root(squares: Tensor) -> Tensor:
    """√ with a finite derivative at zero."""
    return squares.clamp_min(EPSILON**2).sqrt()
