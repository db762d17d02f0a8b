"""MeTAL: a learned inner loss that adapts to each task and step."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from metaplug import (
    Context,
    InnerStep,
    LearnedPluginConfig,
    Plugin,
    RequestError,
    hookimpl,
    tensor_means,
)


class Metal(Plugin):
    """Add a learned loss, whose network a second network transforms by the state of the task.

        τ[t,k] = (ℓ[t,k], means of θ[t,k,p] over its entries for all adapted tensors p)
        x[t,k,i] = (τ[t,k], prediction of example i, its target; one-hot for a class)
        L[t,k] = mean over i of φ[t,k](norm(x[t,k]))[i]
        φ[t,k] = (1 + γ) · φ[k] + δ,   (γ, δ) = scale[k] · A[k](norm(τ[t,k]))
        ℓ[t,k] ← ℓ[t,k] + strength · (L[t,k] + Lq[t,k])

    φ[k] and A[k] are W₂ relu(W₁ · + b₁) + b₂, as wide as their input; γ and δ have a number for
    each of their tensors; norm gives all entries mean 0 and variance 1; scale starts at 0. Lq, with
    `query`, is the same of x = (means of θ, prediction, −entropy) of the query examples, where A
    reads the mean of norm(x) over them.

    Source: Baik et al. 2021 (arXiv 2110.03909), section 3; widths, norm, scale and entropy are
    those of the authors' code.
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

    @property
    def transductive(self) -> bool:
        """Whether query examples are seen in the inner loop."""
        return self.config.query and self.config.strength > 0

    @hookimpl
    def setup(self, context: Context) -> None:
        shapes = [shape for name, shape in context.shapes.items() if name in context.layers]
        self._names, self._outputs = context.adapted, self.config.outputs or (*shapes[-1], 1)[0]
        self._classifies = context.kind == "classification"
        steps, means = max(context.inner_steps, 1), len(self._names)
        if self.config.strength > 0:
            width = means + 1 + 2 * self._outputs
            self.support = _Loss(steps, means + 1, width, context.factory_kwargs)
        if self.transductive:
            width = means + self._outputs + self._classifies
            self.query = _Loss(steps, width, width, context.factory_kwargs)

    @hookimpl
    def transform_inner_losses(self, losses: Tensor, step: InnerStep) -> Tensor | None:
        if self.config.strength == 0:
            return None
        if (shape := tuple(step.predictions.shape[2:])) != (self._outputs,):
            raise RequestError(
                f"plugin '{self.name}' reads {self._outputs} numbers in every prediction, but the "
                f"model's have the shape {shape}: set outputs to their length, or leave it out"
            )
        # Where examples would be, an axis of length 1 is left whole, whatever their number.
        means = tensor_means(step.parameters[name] for name in self._names).unsqueeze(1)
        state = torch.cat([step.losses.view(-1, 1, 1), means], 2)

        def of_support(predictions: Tensor, targets: Tensor, state: Tensor) -> Tensor:
            if not targets.is_floating_point():
                classes = torch.arange(self._outputs, device=targets.device)
                targets = (targets.unsqueeze(-1) == classes).to(predictions.dtype)
            rows = self._rows(state, predictions, targets)
            return self.support.mean(step.slot, _normalized(state), rows)

        def of_query(predictions: Tensor, means: Tensor) -> Tensor:
            log_p = predictions.log_softmax(-1)
            entropy = [(log_p.exp() * log_p).sum(-1, keepdim=True)] * self._classifies
            rows = self._rows(means, predictions, *entropy)
            return self.query.mean(step.slot, rows.mean(1, keepdim=True), rows)

        learned = step.by_task(of_support, step.targets, state)
        if self.transductive:
            predictions = step.forward(step.parameters, "query")
            learned = learned + step.by_task(of_query, means, predictions=predictions, part="query")
        step.log("learned", learned)
        return losses + self.config.strength * learned

    def _rows(self, state: Tensor, predictions: Tensor, *others: Tensor) -> Tensor:
        """Join (tasks, 1, ·), (tasks, n, ways) and (tasks, n, ·) to normalised rows of examples."""
        padded = F.pad(predictions, (0, self._outputs - predictions.shape[2]))
        return _normalized(torch.cat([state.expand(-1, padded.shape[1], -1), padded, *others], 2))


class _Loss(nn.Module):
    """φ and A of all inner steps: each of their tensors has an axis of steps in front."""

    def __init__(self, steps: int, state: int, width: int, form: dict[str, Any]) -> None:
        super().__init__()
        self.loss = _two_layers(steps, width, 1, form)
        self.adapter = _two_layers(steps, state, 8, form)
        self.scale = nn.Parameter(torch.zeros(steps, 8, **form))

    def mean(self, slot: int, state: Tensor, rows: Tensor) -> Tensor:
        """(tasks, 1, state), (tasks, n, width) → (tasks,): the mean over rows."""
        changes = self.scale[slot] * _output(state, *(tensor[slot] for tensor in self.adapter))
        gammas, deltas = changes.view(-1, 2, 4, 1, 1).transpose(0, 2).unbind(1)
        own = zip(gammas, self.loss, deltas, strict=True)
        return _output(rows, *((1 + g) * tensor[slot] + d for g, tensor, d in own)).mean((1, 2))


def _two_layers(steps: int, width: int, outputs: int, form: dict[str, Any]) -> nn.ParameterList:
    """W₁, b₁, W₂, b₂ of all steps, as torch's linear layers start."""
    drawn = []
    for _ in range(steps):
        layers = [nn.Linear(width, units, **form) for units in (width, outputs)]
        drawn.append([tensor for layer in layers for tensor in layer.parameters()])
    return nn.ParameterList(torch.stack(each).detach() for each in zip(*drawn, strict=True))


def _output(x: Tensor, weight: Tensor, bias: Tensor, last: Tensor, shift: Tensor) -> Tensor:
    return (x @ weight.mT + bias).relu() @ last.mT + shift


def _normalized(x: Tensor) -> Tensor:
    """Give the entries of every task, (tasks, n, ·), mean 0 and variance 1."""
    variance = x.var((1, 2), keepdim=True).clamp_min(1e-12)
    return (x - x.mean((1, 2), keepdim=True)) / variance.sqrt()
