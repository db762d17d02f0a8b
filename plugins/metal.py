"""MeTAL: a learned inner loss that adapts to each task and step."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from metaplug import Context, InnerStep, LearnedPluginConfig, Plugin, RequestError, hookimpl


class Metal(Plugin):
    """Add a learned loss, whose network a second network transforms by the state of the task.

        τ[t,k] = (ℓ[t,k], means of θ[t,k,p] over its entries for all adapted tensors p)
        x[t,k,i] = (τ[t,k], prediction of example i, its target; one-hot for a class)
        L[t,k] = mean over i of φ[t,k](norm(x[t,k]))[i]
        φ[t,k] = (1 + γ) · φ[k] + δ,   (γ, δ) = scale[k] · A[k](norm(τ[t,k]))
        ℓ[t,k] ← ℓ[t,k] + strength · (L[t,k] + Lq[t,k])

    φ[k] and A[k] are W₂ relu(W₁ · + b₁) + b₂, as wide as their input, one of each for every step;
    γ and δ have one number for each of W₁, b₁, W₂, b₂. norm subtracts the mean of all entries and
    divides by their standard deviation; scale starts at 0. With `query` there is Lq too, the same
    of the query examples, without labels: of x = (means of θ, prediction, −entropy of its classes),
    where A reads the mean of norm(x) over examples. A class index of -100 is a row of zeros.

    Source: Baik et al. 2021, "Meta-Learning with Task-Adaptive Loss Function for Few-Shot Learning"
    (arXiv 2110.03909), section 3; widths, norm, scale and entropy are those of the authors' code.
    """

    conflicts_with = ("derivative-order",)  # in first order no meta-gradient reaches the networks

    class Config(LearnedPluginConfig):
        """What the learned loss sees, and how much it counts."""

        strength: float = Field(1.0, ge=0, le=1e3, description="Weight of the learned loss.")
        query: bool = Field(
            False, description="Whether it sees the query inputs: results are transductive."
        )
        outputs: int | None = Field(
            None, ge=1, description="Numbers in a prediction; null: rows of the last parameter."
        )

    config: Config
    learned: Tensor

    @property
    def transductive(self) -> bool:
        """Whether query examples are seen in the inner loop."""
        return self.config.query and self.config.strength > 0

    @hookimpl
    def setup(self, context: Context) -> None:
        last = [(*shape, 1)[0] for name, shape in context.shapes.items() if name in context.layers]
        self._names, self._outputs = context.adapted, self.config.outputs or last[-1]
        self._classifies = context.kind == "classification"
        form: dict[str, Any] = {"dtype": context.dtype, "device": context.device}
        self.register_buffer("learned", torch.zeros((), **form), persistent=False)
        steps, state = max(context.inner_steps, 1), len(self._names) + 1
        if self.config.strength > 0:
            width = state + 2 * self._outputs
            self.support = _Loss(steps, state, width, **form)
        if self.transductive:
            width = state - 1 + self._outputs + self._classifies
            self.query = _Loss(steps, width, width, **form)

    @hookimpl
    def transform_inner_losses(self, losses: Tensor, step: InnerStep) -> Tensor | None:
        if self.config.strength == 0:
            return None
        if (shape := tuple(step.predictions.shape[2:])) != (self._outputs,):
            raise RequestError(
                f"plugin '{self.name}' reads {self._outputs} numbers in every prediction, but the "
                f"model's have the shape {shape}: set outputs to their length, or leave the plugin "
                "out where they are no rows"
            )
        weights = (step.parameters[name] for name in self._names)
        means = torch.stack([each.reshape(len(each), -1).mean(1) for each in weights], 1)
        state = torch.cat([step.losses.unsqueeze(1), means], 1)

        def of_support(predictions: Tensor, targets: Tensor, state: Tensor) -> Tensor:
            if not targets.is_floating_point():
                classes = torch.arange(self._outputs, device=targets.device)
                targets = (targets.unsqueeze(-1) == classes).to(predictions.dtype)
            seen = self._examples(state, predictions, targets)
            loss: Tensor = self.support(step.slot, _normalized(state[:, 0]), seen)
            return loss

        def of_query(predictions: Tensor, means: Tensor) -> Tensor:
            log_p = predictions.log_softmax(-1)
            entropy = [(log_p.exp() * log_p).sum(-1, keepdim=True)] * self._classifies
            seen = self._examples(means, predictions, *entropy)
            loss: Tensor = self.query(step.slot, seen.mean(1), seen)
            return loss

        # Where examples would be, an axis of length 1 is left whole, whatever their number.
        learned = step.by_task(of_support, step.targets, state.unsqueeze(1))
        if self.transductive:
            predictions = step.forward(step.parameters, "query")
            learned = learned + step.by_task(of_query, means.unsqueeze(1), query=predictions)
        step.keep("learned", learned.mean())
        return losses + self.config.strength * learned

    @hookimpl
    def commit(self, kept: dict[str, Tensor]) -> None:
        self.learned = kept["learned"]

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        return {"learned": float(self.learned)}

    def _examples(self, state: Tensor, predictions: Tensor, *others: Tensor) -> Tensor:
        """Join (tasks, 1, ·), (tasks, n, ways) and (tasks, n, ·) to normalised rows of examples."""
        padded = F.pad(predictions, (0, self._outputs - predictions.shape[2]))
        return _normalized(torch.cat([state.expand(-1, padded.shape[1], -1), padded, *others], 2))


class _Loss(nn.Module):
    """φ and A of all inner steps: each of their tensors has an axis of steps in front."""

    def __init__(self, steps: int, state: int, width: int, **form: Any) -> None:
        super().__init__()
        self.loss = _two_layers(steps, width, 1, **form)
        self.adapter = _two_layers(steps, state, 8, **form)
        self.scale = nn.Parameter(torch.zeros(steps, 8, **form))

    def forward(self, slot: int, state: Tensor, examples: Tensor) -> Tensor:
        """(tasks, state), (tasks, n, width) → (tasks,): the mean over examples."""
        changes = self.scale[slot] * _output(state, *(tensor[slot] for tensor in self.adapter))
        gamma, delta = changes.view(-1, 2, 4, 1, 1).unbind(1)
        own = [
            (1 + gamma[:, place]) * tensor[slot] + delta[:, place]
            for place, tensor in enumerate(self.loss)
        ]
        return _output(examples, *own).flatten(1).mean(1)


def _two_layers(steps: int, width: int, outputs: int, **form: Any) -> nn.ParameterList:
    """W₁, b₁, W₂, b₂ of all steps, as torch's linear layers start."""
    drawn = []
    for _ in range(steps):
        layers = nn.Linear(width, width, **form), nn.Linear(width, outputs, **form)
        drawn.append([tensor.detach() for layer in layers for tensor in layer.parameters()])
    return nn.ParameterList(torch.stack(each) for each in zip(*drawn, strict=True))


def _output(x: Tensor, weight: Tensor, bias: Tensor, last: Tensor, shift: Tensor) -> Tensor:
    return (x @ weight.mT + bias).relu() @ last.mT + shift


def _normalized(x: Tensor) -> Tensor:
    """Give the entries of every row mean 0 and variance 1."""
    flat = x.flatten(1)
    variance = flat.var(1, keepdim=True).clamp_min(1e-12)
    return ((flat - flat.mean(1, keepdim=True)) / variance.sqrt()).view_as(x)
