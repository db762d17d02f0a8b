"""Options of gradient sharing that its paper does not settle, and what they change in a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from metaplug import Context, Gradients, InnerStep, LearnedPluginConfig, RequestError, checkpoint

from .gradient_sharing_fused import EPSILON
from .gradient_sharing_numbers import Weight

SQUASH: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], float]]] = {
    "sigmoid": (torch.sigmoid, lambda weight: math.log(weight / (1 - weight))),
    "hard-sigmoid": (nn.functional.hardsigmoid, lambda weight: 6 * weight - 3),
    "clamp": (lambda x: x.clamp(0, 1), lambda weight: weight),
}
"""By name, σ and its inverse on (0, 1)."""


ACCUMULATING = ("momentum", "learn_momentum", "streaming", "through_mean", "share_at_evaluation")
"""Fields that only a running mean has a use for."""


class SharingOptions(LearnedPluginConfig):
    """Choices that the paper leaves open, and extensions of it."""

    gate_function: Literal["sigmoid", "hard-sigmoid", "clamp"] = Field(
        "sigmoid", description="σ, from a meta-parameter to a weight."
    )
    granularity: Literal["step", "tensor", "step-and-tensor", "one"] = Field(
        "step", description="What has a gate and a momentum of its own."
    )
    conditioning: Literal["none", "task"] = Field(
        "none", description="task: λ and m depend on each task's ‖g‖ and its cosine with r too."
    )
    normalisation: Literal["unit", "none", "mean-unit"] = Field(
        "unit",
        description="unit: each task's gradient, then the mean; mean-unit: the mean, then its "
        "length; none: the plain mean, unscaled.",
    )
    scope: Literal["all", "tensor"] = Field(
        "all", description="Whether a norm runs over all adapted parameters or each tensor alone."
    )
    statistics: Literal["accumulated", "learned", "frozen"] = Field(
        "accumulated",
        description="r: the running mean; learned: a meta-parameter, from 0; frozen: as in start.",
    )
    start: Path | None = Field(
        None, description="A checkpoint whose running mean this learner begins with; null: none."
    )
    streaming: bool = Field(
        False, description="Whether the tasks of a batch arrive one at a time, in their order."
    )
    through_mean: bool = Field(
        True, description="Whether meta-gradients flow through the mean into all tasks."
    )
    share_at_evaluation: bool = Field(
        False, description="Share within a batch of test tasks too, as transductive results."
    )

    @model_validator(mode="after")
    def _statistics_have_a_use(self) -> SharingOptions:
        if self.statistics == "frozen" and self.start is None:
            raise ValueError(
                "statistics = 'frozen' needs a running mean to freeze: "
                "give start, a checkpoint that has one"
            )
        usual = {name: field.default for name, field in type(self).model_fields.items()}
        for option in ACCUMULATING:
            if self.statistics != "accumulated" and getattr(self, option) != usual[option]:
                raise ValueError(
                    f"{option} changes how statistics accumulate, and statistics = "
                    f"'{self.statistics}': choose one"
                )
        return self

    @property
    def is_plain(self) -> bool:
        """Whether a step is as the paper has it."""
        return (
            self.granularity in ("step", "one")
            and self.gate_function == "sigmoid"
            and self.conditioning == "none"
            and self.normalisation == "unit"
            and self.scope == "all"
            and self.statistics == "accumulated"
            and self.through_mean
            and not self.streaming
        )


class SharingParts(nn.Module):
    """State and parts of a step of gradient sharing that depend on its options."""

    name: str
    config: Any
    running: Tensor
    started: Tensor
    tensor_of: Tensor
    is_plain: bool

    def create(self, context: Context) -> None:
        """Make r (K, P), whether each of its rows has begun (K,), and the logits of λ and m."""
        config = self.config
        if config.streaming and context.ranks > 1:
            raise RequestError(
                f"plugin '{self.name}': streaming = true on {context.ranks} ranks: each task must "
                "find what those before it have left, and these are on other ranks; use one rank, "
                "or leave streaming out"
            )
        self._sizes = {name: context.shapes[name].numel() for name in context.adapted}
        # Counted in Python: a checkpoint is first tried with tensors that have no values.
        total, slots = sum(self._sizes.values()), max(context.inner_steps, 1)
        running = torch.zeros(slots, total, dtype=context.dtype, device=context.device)
        learned = config.statistics == "learned"
        if learned:
            self.running = nn.Parameter(running)
        else:
            self.register_buffer("running", running)
        self.register_buffer("started", torch.full((slots,), learned, device=context.device))
        sizes = torch.tensor([*self._sizes.values()])
        tensor_of = torch.arange(len(sizes)).repeat_interleave(sizes, output_size=total)
        tensor_of = tensor_of.to(context.device)
        self.register_buffer("tensor_of", tensor_of, persistent=False)
        by_step, by_tensor = "step" in config.granularity, "tensor" in config.granularity
        shape = (slots if by_step else 1, len(sizes) if by_tensor else 1)
        learn_momentum = config.learn_momentum and config.statistics == "accumulated"
        for name, learn in (("gate", config.learn_gate), ("momentum", learn_momentum)):
            if 0 < (weight := getattr(config, name)) < 1:
                starts = {name: running.new_full(shape, SQUASH[config.gate_function][1](weight))}
                if config.conditioning == "task":
                    starts[f"{name}_by_task"] = running.new_zeros(*shape, 2)
                for key, start in starts.items():
                    self.register_parameter(key, nn.Parameter(start, requires_grad=learn))
        if config.start is not None:
            self._begin_with(config.start)
        self.is_plain = config.is_plain

    def logit(self, name: str, k: Any) -> Tensor:
        """λ or m of step k, (1,) or by tensor; infinite where the weight is exactly 0 or 1."""
        logits = self._parameters.get(name)
        if logits is None:
            return self.running.new_tensor(math.inf if getattr(self.config, name) else -math.inf)
        return logits[k if len(logits) > 1 else 0]

    def number(self, name: str, k: int) -> Weight:
        """The weight of step k as a number, where one gate and one momentum are all there is."""
        logits = self._parameters.get(name)
        if logits is None:
            return Weight(float(getattr(self.config, name)))
        row = k if logits.shape[0] > 1 else 0
        return Weight(_sigmoid(logits.tolist()[row][0]), logits, row)

    def numbers(self, name: str) -> list[float]:
        """The weight of every step, or the one of all: of tensors, their mean."""
        logits = self._parameters.get(name)
        if logits is not None and self.is_plain:  # in a call instead of six
            return [_sigmoid(logit) for [logit] in logits.tolist()]
        with torch.no_grad():
            weights = self.weight(name, slice(None))
        found = weights.mean(-1) if "tensor" in self.config.granularity else weights
        values: list[float] = found.flatten().tolist()
        return values

    def weight(self, name: str, k: Any, traits: Tensor | None = None) -> Tensor:
        """σ(λ) or σ(m) in step k: () or (1,), (P,) by tensor, (T, 1) or (T, P) given traits."""
        if name not in self._parameters:  # exactly 0 or 1, which σ does not reach
            return self.running.new_tensor(getattr(self.config, name))
        logit, by_task = self.logit(name, k), self._parameters.get(f"{name}_by_task")
        if traits is not None and by_task is not None:
            logit = logit + traits @ by_task[k if len(by_task) > 1 else 0].T
        weight = SQUASH[self.config.gate_function][0](logit)
        return weight[..., self.tensor_of] if "tensor" in self.config.granularity else weight

    def traits(self, g: Tensor, r_old: Tensor) -> Tensor | None:
        """s (T, 2) = (log ‖g‖, cosine of g and r_old, 0 at first); None where not conditioned."""
        if self.config.conditioning == "none":
            return None
        length = _norm(g)
        cosine = (g @ r_old).unsqueeze(1) / length / _norm(r_old.unsqueeze(0))
        return torch.cat([length.log(), cosine], 1)

    def length(self, g: Tensor) -> Tensor:
        """(rows, 1) or, by tensor, (rows, P): the norm that belongs to each column of g."""
        if self.config.scope == "all":
            return _norm(g)
        parts = g.split(list(self._sizes.values()), 1)
        squares = [torch.linalg.vecdot(part, part) for part in parts]
        return _root(torch.stack(squares, 1)).index_select(1, self.tensor_of)

    def streamed(
        self, g: Tensor, length: Tensor, step: InnerStep
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Let tasks arrive one at a time: r_t = σ(m) r_{t−1} + (1 − σ(m)) u[t], r_{t−1} a constant.

        Returns each task's r (T, P), the tasks' traits, and the last r (P,), which is stored.
        """
        old, started = self.running[step.slot], self.started[step.slot]
        u = g if self.config.normalisation == "none" else g / length
        u = u if self.config.through_mean else u.detach()
        shared, traits = [], []
        for gradient, unit in zip(g.split(1), u.split(1), strict=True):
            own = self.traits(gradient, old)
            shared.append(torch.lerp(unit, old, started * self.weight("momentum", step.slot, own)))
            old, started = shared[-1].detach()[0], torch.ones_like(started)
            traits += [] if own is None else [own]
        return torch.cat(shared), torch.cat(traits) if traits else None, old

    def flatten(self, gradients: Gradients) -> Tensor:
        """(T, P) over all adapted parameters, zero where one received no gradient."""
        tasks = len(next(iter(gradients.values())))
        parts = [
            gradients[name].reshape(tasks, -1)
            if name in gradients
            else self.running.new_zeros(tasks, size)
            for name, size in self._sizes.items()
        ]
        return torch.cat(parts, 1)

    def unflatten(self, flat: Tensor, like: Gradients) -> dict[str, Tensor]:
        """Undo `flatten`, for the names of `like`."""
        parts = dict(zip(self._sizes, flat.split(list(self._sizes.values()), 1), strict=True))
        return {name: parts[name].reshape(gradient.shape) for name, gradient in like.items()}

    def _begin_with(self, path: Path) -> None:
        """Take over the running mean of a checkpoint."""
        states = checkpoint.read(path)["plugin_states"].values()
        found = next((state for state in states if {"running", "started"} <= state.keys()), None)
        if found is None:
            raise RequestError(
                f"plugin '{self.name}': start = {path} has no running mean: "
                "give a checkpoint of a run with gradient-sharing"
            )
        ours, theirs = tuple(self.running.shape), tuple(found["running"].shape)
        if ours != theirs:
            raise RequestError(
                f"plugin '{self.name}': the running mean of start = {path} has (inner steps, "
                f"adapted weights) = {theirs}, and this run {ours}: "
                "use the same model and inner_steps"
            )
        with torch.no_grad():
            self.running.copy_(found["running"])
            self.started.copy_(found["started"])


def plus_outer(own: Tensor, scale: Tensor, shared: Tensor) -> Tensor:
    """own + scale · shared."""
    if scale.dim() == 2 and scale.shape[1] == 1 and shared.dim() == 1:
        # One matrix product is cheaper than a broadcast product in both derivatives.
        return torch.addmm(own, scale, shared.unsqueeze(0))
    return own + scale * shared


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def _norm(rows: Tensor) -> Tensor:
    """(rows, 1): the norm of every row, at least EPSILON."""
    return _root(torch.linalg.vecdot(rows, rows)).unsqueeze(1)


def _root(squares: Tensor) -> Tensor:
    """√ with a finite derivative at zero: the bound comes before the root."""
    return squares.clamp_min(EPSILON**2).sqrt()
