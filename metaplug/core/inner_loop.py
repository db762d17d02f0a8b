"""The differentiable inner loop, with all tasks of a batch stacked.

    g[t,k] = ∂ ℓ(f(x_t; θ[t,k]), y_t) / ∂θ[t,k]        then the fold of transform_gradients
    θ[t,k+1] = update(θ[t,k], g[t,k], α[k])            the inner optimizer; for SGD θ − α g

Tasks' losses do not depend on each other's weights, so the gradient of their sum with respect to
the stacked weights is every task's own. It is taken outside vmap: inside, second-order gradients
through batch and layer norm are wrong without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from metaplug.contract.chain import Chain
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_groups import Alike
from metaplug.contract.task_sizes import Part
from metaplug.contract.values import InnerStep, Outcome, TaskShare
from metaplug.core.losses import output_axis
from metaplug.core.model_calls import Output
from metaplug.core.optimizers import DifferentiableOptimizer
from metaplug.core.recording import recording
from metaplug.core.rematerialize import rematerialize
from metaplug.core.task_model import Loss, TaskModel
from metaplug.errors import RunError, quoted
from metaplug.random_streams import mix

_Weights = Mapping[str, Tensor]

_Query = tuple[Tensor, Tensor, Mapping[str, Tensor]]
"""Losses (T,), predictions (T, n, *output), and the parameter values that made them."""

_Walked = tuple[_Weights, Any, list[Tensor], dict[int, _Query]]
"""Fast weights and optimizer state after some steps, their support losses, and query passes by the
number of updates before them."""

NO_DERIVATIVE = (
    "has no finite derivative there, such as a root or norm of 0: add a small number inside it"
)
_NO_VALUE = (
    "weights and inputs were finite: see whether the model divides by 0 or takes a root or "
    "logarithm of what is not positive, or lower meta_lr or inner_lr if its weights have grown"
)
_NO_GRADIENT = (
    f"the loss was finite: an operation of the model, or of a plugin's loss, {NO_DERIVATIVE}"
)


class InnerLoop(TaskModel):
    """Adapts the tasks of a batch in lock-step, each from the model's own weights.

    Args:
        model: called with one task's inputs (n, *input); never changed here.
        chain: the plugins.
        loss: of one task.
        adapted: names of the parameters that the loop updates.
        inner_steps: K in training, at least 0.
        inner_lr: the inner learning rate, at least 0.
        optimizer, optimizer_settings: a name in OPTIMIZERS, and its settings.
        batch_norm: "batch" (statistics of each task's own batch, in training and evaluation) or
            "frozen" (the model's stored statistics).
        output: the part of the model's answer that is its prediction.

    Attributes:
        checkpoint_steps: keep the graph of this many inner steps; recompute the rest in the
            backward pass. None keeps all of it.

    Example:
        >>> loop = InnerLoop(nn.Linear(2, 2), Chain([]), nn.functional.cross_entropy,
        ...     adapted=("weight",), inner_steps=1, inner_lr=0.1, optimizer="sgd",
        ...     optimizer_settings={}, batch_norm="batch")
        >>> x, y = torch.ones(3, 4, 2), torch.zeros(3, 4, dtype=torch.int64)
        >>> given = {"steps": 1, "training": True, "iteration": 0, "query_after": {1}}
        >>> loop.run(TaskBatch(x, y, x, y), **given).adapted_parameters["weight"].shape
        torch.Size([3, 2, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        chain: Chain,
        loss: Loss,
        *,
        adapted: Collection[str],
        inner_steps: int,
        inner_lr: float,
        optimizer: str,
        optimizer_settings: Mapping[str, Any],
        batch_norm: str,
        output: Output = None,
    ) -> None:
        super().__init__(model, loss, adapted=adapted, batch_norm=batch_norm, output=output)
        self.chain, self.inner_steps, self.inner_lr = chain, inner_steps, inner_lr
        self.checkpoint_steps: int | None = None
        self.optimizer = DifferentiableOptimizer(
            optimizer, optimizer_settings, inner_lr, len(self.adapted)
        )

    def run(
        self,
        batch: TaskBatch,
        *,
        steps: int,
        training: bool,
        iteration: int,
        query_after: Collection[int],
        total: int = 0,
        share: TaskShare | None = None,
        orders: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Outcome:
        """Adapt every task, and take the query losses after the numbers of updates asked for.

        In training the result carries the graph for meta-gradients. At evaluation it carries none,
        and a surrounding `no_grad` or `inference_mode` does not reach in.

        Args:
            steps: inner steps of each task.
            iteration, total: the meta-iteration and the run's length, as plugins see them.
            query_after: numbers of updates after which to take the query loss.
            share: the part that these tasks are of those of all ranks; None for one rank.
            orders: derivative orders of the steps, where they are known already.
            seeds: one for each task, where each draws random numbers of its own: a task's numbers
                then do not depend on its batch.
        """
        first = InnerStep(
            0, steps, self.inner_steps, iteration, total, training, share=share, sizes=batch.sizes
        )
        self.functional.begin(training)
        # Meta-gradients are taken outside: who asks for them records, from before the loop on.
        kept = nullcontext() if self.features is None else self.features.batch()
        with nullcontext() if training else recording(), self.functional.unwritten(), kept:
            try:
                batch = batch.recordable()
                return _Walk(self, batch, first, query_after, orders, seeds).outcome()
            finally:
                self.optimizer.reset()

    def adapted_losses(self, outcome: Outcome, seeds: Sequence[int] | None = None) -> Tensor:
        """Return the (T,) support losses after the last update; asks no hook, keeps no graph."""
        values, batch = outcome.query_parameters, outcome.batch.recordable()
        stacked = [values[name] for name in self.parameters]
        with recording(), torch.set_grad_enabled(self.query_graph):
            losses, _ = self.all_tasks(stacked, self.groups(batch, "support"), seeds)
        return losses.detach()

    def orders_of(self, iteration: int, total: int) -> tuple[int, ...]:
        """Return the derivative order of every inner step of a training iteration."""
        first = InnerStep(0, self.inner_steps, self.inner_steps, iteration, total, True)
        return tuple(self.order(replace(first, index=index)) for index in range(self.inner_steps))

    def order(self, step: InnerStep) -> int:
        """Return the derivative order of one step of training."""
        order: int = self.chain.choose("derivative_order", 2, step=step)
        return order


@dataclass(frozen=True)
class _Walk:
    """One run of an inner loop: what stays the same in all its steps.

    Attributes:
        first: the step before the first update.
        query_after, orders, seeds: as `InnerLoop.run` takes them.
        groups: the examples as the model takes them, made at the first pass on each part.
    """

    loop: InnerLoop
    batch: TaskBatch
    first: InnerStep
    query_after: Collection[int]
    orders: Sequence[int] | None
    seeds: Sequence[int] | None
    groups: dict[Part, list[Alike]] = field(default_factory=dict)

    @property
    def rematerialized(self) -> bool:
        return self.first.training and self.loop.checkpoint_steps is not None

    def outcome(self) -> Outcome:
        """Take all steps, and the query losses on the way."""
        loop, first, tasks = self.loop, self.first, self.batch.num_tasks
        initial = {
            name: parameter.expand(tasks, *parameter.shape)
            for name, parameter in loop.parameters.items()
        }
        fast = initial = initial if first.training else _leaves(initial, loop.adapted)
        support_losses: list[Tensor] = []
        queries: dict[int, _Query] = {}
        if 0 in self.query_after:
            queries[0] = self.query(fast, self.step(0, fast, initial))
        if (watch := loop.chain.watch) is not None:
            watch.begin({name: initial[name] for name in loop.adapted})
        loop.optimizer.reset()  # a backward pass that failed may have left something
        state = loop.optimizer.snapshot()
        size = (loop.checkpoint_steps if self.rematerialized else first.count) or 1
        for begin in range(0, first.count, size):
            part = partial(self.steps, indices=range(begin, min(begin + size, first.count)))
            if self.rematerialized:
                meta_parameters = list(loop.chain.named_parameters().values())
                walked = rematerialize(part, (fast, initial, state), meta_parameters)
            else:
                walked = part((fast, initial, state))
            fast, state, losses, found = walked
            support_losses += losses
            queries |= found
        _, predictions, values = queries[max(queries)]
        return Outcome(
            self.batch,
            initial_parameters=MappingProxyType(initial),
            adapted_parameters=MappingProxyType(fast),
            support_losses=tuple(support_losses),
            query_losses=MappingProxyType({after: each[0] for after, each in queries.items()}),
            query_predictions=predictions.detach(),
            query_parameters=MappingProxyType(dict(values)),
            statistics=MappingProxyType(first.statistics),
            adapted=loop.adapted,
        )

    def step(self, index: int, fast: _Weights, initial: _Weights, **more: Any) -> InnerStep:
        """The step that plugins see before update `index`."""
        return replace(
            self.first,
            index=index,
            parameters=MappingProxyType(fast),
            initial_parameters=MappingProxyType(initial),
            **more,
        )

    def steps(
        self, inputs: tuple[_Weights, _Weights, Any], *, indices: range, graph: bool = True
    ) -> _Walked:
        """Take some inner steps from fast weights, first weights and the optimizer's state.

        Without `graph`, give values alone: the steps are taken again where their graph is needed.
        """
        loop, (fast, initial, state) = self.loop, inputs
        loop.optimizer.restore(state)
        # Of two runs, the first keeps statistics; the second must not keep them again.
        more: dict[str, Any] = {"statistics": {}} if graph and self.rematerialized else {}
        support_losses, queries = [], {}
        for index in indices:
            step = self.step(index, fast, initial, **more)
            losses, outputs, _ = self.forward(fast, step, "support")
            # Of some of a batch's tasks, none may have an example in its last places.
            targets = self.batch.support_y[:, : outputs.shape[1]]
            axis = output_axis(outputs, targets, leading=2, last=loop.classes_last)
            known = replace(
                step,
                support_losses=losses,
                support_predictions=outputs,
                support_targets=targets,
                class_axis=axis,
            )
            objective = loop.chain.fold("transform_inner_losses", losses, step=known)
            # A NaN that a plugin adds has no gradient, and would show nowhere else.
            told = losses if objective is losses else losses + 0 * objective.detach()
            support_losses.append(told)
            fast = self.update(fast, objective, known, graph=graph)
            if index + 1 in self.query_after:
                after = replace(step, parameters=MappingProxyType(fast))
                queries[index + 1] = self.query(fast, after)
        state = loop.optimizer.snapshot()
        # The backward pass may take these steps again, when nobody else is there to forget them.
        loop.optimizer.reset()
        return fast, state, support_losses, queries

    def update(
        self, fast: _Weights, objective: Tensor, step: InnerStep, *, graph: bool
    ) -> _Weights:
        """Return the fast weights after one update."""
        loop, names, watch = self.loop, self.loop.adapted, self.loop.chain.watch
        gradients = self.gradients(fast, objective, step, graph=graph)
        self.look("the gradient of the support loss", gradients, step, _NO_GRADIENT)
        folded = loop.chain.fold("transform_gradients", gradients, step=step)
        # Made anew for each step, and for each name: what a plugin writes in place stays there.
        full = torch.full((len(names),), loop.inner_lr, dtype=loop.dtype, device=loop.device)
        rates = dict(zip(names, full.unbind(), strict=True))
        rates = loop.chain.fold("transform_learning_rates", rates, step=step)
        if not step.training or not graph:
            folded = {name: value.detach() for name, value in folded.items()}
            rates = {name: value.detach() for name, value in rates.items()}
        updated = loop.optimizer.step(
            [fast[name] for name in names],
            [folded.get(name) for name in names],
            [rates[name] for name in names],
        )
        changed = dict(zip(names, updated, strict=True))
        after = {**fast, **changed}
        if watch is not None:
            watch.update(rates, changed)
        advice = "gradients and rates were finite: lower inner_lr"
        self.look("what the update made of the weights", after, step, advice)
        return after if step.training and graph else _leaves(after, names)

    def gradients(
        self, fast: _Weights, objective: Tensor, step: InnerStep, *, graph: bool
    ) -> _Weights:
        """Return every task's own gradient of its objective, (T, *shape) by name."""
        loop, order, share = self.loop, 1, step.share
        if step.training:
            order = loop.order(step) if self.orders is None else self.orders[step.index]
        if loop.first_order_only and order == 2 and graph:
            raise RunError(
                "second-order meta-gradients cannot be had of this model (one of its operations is "
                "marked once_differentiable): add the plugin derivative-order"
            )
        taken: Sequence[Tensor | None] = ()
        if objective.requires_grad:
            # Across ranks autograd differentiates Σ_r s[r] · (...), but this sum over tasks has no
            # factor s: divide it out before, and multiply it in after.
            total = objective.sum() if share is None else objective.sum() / share.weight
            weights = [fast[name] for name in loop.adapted]
            second = graph and order == 2
            taken = torch.autograd.grad(total, weights, create_graph=second, allow_unused=True)
        gradients = {
            name: gradient if share is None else share.weight * gradient
            for name, gradient in zip(loop.adapted, taken, strict=False)
            if gradient is not None
        }
        if not gradients:
            raise RunError(
                f"no gradient reaches the adapted parameters {quoted(loop.adapted[:3])}: "
                "the loss does not depend on them; adapt others"
            )
        return gradients

    def query(self, fast: _Weights, step: InnerStep) -> _Query:
        """Take the query loss of every task."""
        with torch.set_grad_enabled(step.training or self.loop.query_graph):
            losses, predictions, values = self.forward(fast, step, "query")
        return (losses if step.training else losses.detach()), predictions, values

    def forward(self, fast: _Weights, step: InnerStep, part: Part) -> _Query:
        """Run the model for every task on its "support" or "query" examples."""
        loop, seeds = self.loop, self.seeds
        values = loop.chain.fold("transform_parameters", fast, step=step)
        if loop.features is not None:
            loop.features.check(values, fast)
        if seeds is not None:
            seeds = [mix(seed, 2 * step.index + (part == "query")) for seed in seeds]
        if part not in self.groups:
            self.groups[part] = loop.groups(self.batch, part)
        stacked = [values[name] for name in loop.parameters]
        losses, predictions = loop.all_tasks(stacked, self.groups[part], seeds, keep=part)
        if part == "support" and loop.chain.watch is not None:
            loop.chain.watch.step(losses)
        what = f"the model's output for {part} examples"
        self.look(what, {"prediction": predictions}, step, _NO_VALUE)
        advice = "the model's output was finite: see what the loss function computes"
        self.look(f"the {part} loss", {"loss": losses}, step, advice)
        return losses, predictions, values

    def look(self, what: str, values: _Weights, step: InnerStep, advice: str) -> None:
        """In a replay that looks for the first non-finite value, look at what the core makes."""
        if (watch := self.loop.chain.watch) is not None:
            where = f"in iteration {step.meta_iteration}, inner step {step.index}"
            watch.look(values, lambda fault: f"{what} holds {fault} {where}", advice, by_task=True)


def _leaves(values: _Weights, adapted: Collection[str]) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_(name in adapted) for name, value in values.items()}
