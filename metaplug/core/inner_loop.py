"""The differentiable inner loop, with all tasks of a batch stacked.

    g[t,k] = ∂ ℓ(f(x_t; θ[t,k]), y_t) / ∂θ[t,k]        then the fold of transform_gradients
    θ[t,k+1] = update(θ[t,k], g[t,k], α[k])            the inner optimizer; for SGD θ − α g

Tasks' losses do not depend on each other's weights, so the gradient of their sum with respect to the stacked weights is every task's own.
It is taken outside vmap: inside, second-order gradients through batch and layer norm are silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from metaplug.contract.chain import Chain
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.values import InnerStep, Outcome
from metaplug.core.optimizers import MirroredOptimizer, assign, follow, patch, release, set_mode
from metaplug.core.rematerialize import recomputed
from metaplug.core.vmap_rules import Folding, for_all_tasks
from metaplug.errors import RunError, quoted
from metaplug.execution.precision import Precision, forward
from metaplug.execution.ranks import Share

Loss = Callable[[Tensor, Tensor], Tensor]
"""(prediction, target) of one task → its loss, a tensor of shape ()."""

_Query = tuple[Tensor, Tensor, Mapping[str, Tensor]]
"""Losses (T,), predictions (T, n, *output), and the values of the parameters that they were made with."""

_Walked = tuple[dict[str, Tensor], Any, list[Tensor], dict[int, _Query]]
"""Fast weights and the optimizer's state after some steps, their support losses, and query passes by the number of updates done."""


_NO_VALUE = (
    "weights and inputs were finite: see whether the model divides by 0 or takes a root or logarithm of what is not positive, "
    "or lower meta_lr or inner_lr if its weights have grown"
)
NO_DERIVATIVE = (
    "has no finite derivative there, such as a root or norm of 0: add a small number inside it"
)
_NO_DERIVATIVE = (
    f"the loss was finite: an operation of the model, or of a plugin's loss, {NO_DERIVATIVE}"
)


class InnerLoop:
    """Adapts the tasks of a batch, in lock-step, each from the model's own weights.

    Args:
        model: called with one task's inputs (n, *input); patched once, never changed here.
        chain: the plugins.
        loss: of one task.
        adapted: names of the parameters that the loop updates.
        inner_steps: K in training, 0 or more.
        inner_lr: the inner learning rate, above 0 or equal to it.
        optimizer, optimizer_settings: a name in OPTIMIZERS, and its settings.
        batch_norm: "batch" (statistics of each task's own batch, in training and evaluation) or "frozen" (the model's stored statistics).
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
    ) -> None:
        self.model, self.chain, self.loss, self.inner_steps, self.batch_norm = (
            model,
            chain,
            loss,
            inner_steps,
            batch_norm,
        )
        self.vectorized = True
        self.checkpoint_steps: int | None = None
        """How many inner steps keep their graph together, which is made again in the backward pass; None keeps the graph of all of them."""
        self.precision: Precision = "float32"
        """Of the model's forward passes; losses and updates keep the model's own dtype."""
        self.parameters = dict(model.named_parameters())
        self.adapted = tuple(name for name in self.parameters if name in adapted)
        reference = next(iter(self.parameters.values()))
        self.inner_lr = inner_lr
        self._rate = torch.tensor(inner_lr, dtype=reference.dtype, device=reference.device)
        self._optimizer = MirroredOptimizer(
            optimizer, optimizer_settings, inner_lr, len(self.adapted)
        )
        self.patched = patch(model, batch_norm)

    def run(
        self,
        batch: TaskBatch,
        *,
        steps: int,
        training: bool,
        iteration: int,
        query_after: Collection[int],
        total: int = 0,
        share: Share | None = None,
        orders: Sequence[int] | None = None,
    ) -> Outcome:
        """Adapt every task for `steps` steps, and take the query losses after as many updates as `query_after` says.

        `iteration` and `total` are what plugins see of the meta-training that this belongs to; `share` is what these tasks are of those of
        all ranks, None where there are no others; `orders` are the derivative orders of the steps, where they are known already.

        In training the result carries the graph for meta-gradients; otherwise no graph is taken, and no surrounding
        `no_grad` or `inference_mode` reaches in.
        """
        first = InnerStep(0, steps, self.inner_steps, iteration, total, training, share=share)
        if self.patched.training != training:
            set_mode(self.patched, training, self.batch_norm)
        with recording():
            self.follow()
            try:
                return self._run(usable(batch), first, query_after, orders)
            finally:
                self.release()

    def follow(self) -> None:
        """Take over what was written to the model's own buffers."""
        follow(self.patched)

    def predict(self, parameters: list[Tensor], x: Tensor) -> Tensor:
        """One task's prediction (n, *output), with its own parameters in the model's order."""
        assign(
            self.patched, parameters
        )  # to every module at once: a parent may read a child's weight without calling the child
        prediction: Tensor = self.patched(x)
        return prediction

    def task(self, parameters: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One task's loss () and prediction (n, *output), in the configured precision."""
        with forward(self.precision, self._rate.device):
            prediction = self.predict(parameters, x)
        if self.precision == "bfloat16":
            prediction = prediction.float()
        return self.loss(prediction, y), prediction

    def _run(
        self,
        batch: TaskBatch,
        first: InnerStep,
        query_after: Collection[int],
        orders: Sequence[int] | None,
    ) -> Outcome:
        initial = {
            name: parameter.expand(batch.num_tasks, *parameter.shape)
            for name, parameter in self.parameters.items()
        }
        fast = initial = initial if first.training else _leaves(initial, self.adapted)
        support_losses: list[Tensor] = []
        queries: dict[int, _Query] = {}
        first = replace(
            first, parameters=MappingProxyType(fast), initial_parameters=MappingProxyType(initial)
        )
        if 0 in query_after:
            queries[0] = self._query(fast, batch, first)
        if self.chain.watch is not None:
            self.chain.watch.begin({name: initial[name] for name in self.adapted})
        state, size = self._optimizer.snapshot(), max(first.count, 1)
        walk = partial(self._walk, batch=batch, first=first, query_after=query_after, orders=orders)
        if first.training and self.checkpoint_steps is not None:
            size = self.checkpoint_steps
        for begin in range(0, first.count, size):
            indices = range(begin, min(begin + size, first.count))
            if first.training and self.checkpoint_steps is not None:
                inputs = (fast, initial, state)
                fast, state, losses, found = recomputed(
                    partial(walk, indices=indices),
                    inputs,
                    list(self.chain.named_parameters().values()),
                )
            else:
                fast, state, losses, found = walk((fast, initial, state), indices=indices)
            support_losses += losses
            queries |= found
        query_losses = {after: losses for after, (losses, _, _) in queries.items()}
        _, predictions, values = queries[max(queries)]
        return Outcome(
            batch,
            initial_parameters=MappingProxyType(initial),
            adapted_parameters=MappingProxyType(fast),
            support_losses=tuple(support_losses),
            query_losses=MappingProxyType(query_losses),
            query_predictions=predictions.detach(),
            query_parameters=MappingProxyType(dict(values)),
            statistics=MappingProxyType(first.statistics),
        )

    def _walk(
        self,
        inputs: tuple[dict[str, Tensor], dict[str, Tensor], Any],
        *,
        indices: range,
        batch: TaskBatch,
        first: InnerStep,
        query_after: Collection[int],
        orders: Sequence[int] | None,
        graph: bool = True,
    ) -> _Walked:
        """Some inner steps, from fast weights, first weights and the optimizer's state.

        Without `graph` what they give has its values alone: to be taken a second time, where their graph is asked for.
        """
        fast, initial, state = inputs
        self._optimizer.restore(state)
        again = (
            graph and first.training and self.checkpoint_steps is not None
        )  # what is kept, the first time has kept
        first = replace(
            first,
            initial_parameters=MappingProxyType(initial),
            statistics={} if again else first.statistics,
        )
        support_losses, queries = [], {}
        for index in indices:
            step = replace(first, index=index, parameters=MappingProxyType(fast))
            losses, outputs, _ = self._forward(
                fast, batch.support_x, batch.support_y, step, "support"
            )
            known = replace(step, support_losses=losses, support_predictions=outputs)
            objective = self.chain.fold("transform_inner_losses", losses, step=known)
            # A NaN that a plugin adds has no gradient, and would be seen nowhere else.
            support_losses.append(
                losses if objective is losses else losses + 0 * objective.detach()
            )
            fast = self._update(fast, objective, known, orders=orders, graph=graph)
            if index + 1 in query_after:
                queries[index + 1] = self._query(
                    fast, batch, replace(step, parameters=MappingProxyType(fast))
                )
        return fast, self._optimizer.snapshot(), support_losses, queries

    def orders_of(self, iteration: int, total: int) -> tuple[int, ...]:
        """The derivative order of every inner step of a training iteration, as the plugins have it."""
        if not self.chain.links("derivative_order"):
            return (2,) * self.inner_steps
        first = InnerStep(0, self.inner_steps, self.inner_steps, iteration, total, True)
        return tuple(self._order(replace(first, index=index)) for index in range(self.inner_steps))

    def _order(self, step: InnerStep) -> int:
        order: int = self.chain.choose("derivative_order", 2, step=step)
        return order

    def _update(
        self,
        fast: Mapping[str, Tensor],
        objective: Tensor,
        step: InnerStep,
        *,
        orders: Sequence[int] | None,
        graph: bool,
    ) -> dict[str, Tensor]:
        order = (
            1 if not step.training else self._order(step) if orders is None else orders[step.index]
        )
        weights = [fast[name] for name in self.adapted]
        # Across ranks autograd is of Σ_r s[r] · (...), and this sum over tasks is without s: divided out before, multiplied in after.
        total = objective.sum() if step.share is None else objective.sum() / step.share.weight
        taken = (
            torch.autograd.grad(
                total, weights, create_graph=graph and order == 2, allow_unused=True
            )
            if objective.requires_grad
            else ()
        )
        gradients = {
            name: gradient
            for name, gradient in zip(self.adapted, taken, strict=False)
            if gradient is not None
        }
        if step.share is not None:
            gradients = {name: step.share.weight * gradient for name, gradient in gradients.items()}
        if not gradients:
            raise RunError(
                f"no gradient reaches the adapted parameters {quoted(self.adapted[:3])}: the loss does not depend on them; adapt others"
            )
        self._look("the gradient of the support loss", gradients, step, _NO_DERIVATIVE)
        folded = self.chain.fold("transform_gradients", gradients, step=step)
        rates = self.chain.fold(
            "transform_learning_rates", dict.fromkeys(self.adapted, self._rate), step=step
        )
        if not step.training or not graph:
            folded, rates = (
                {name: value.detach() for name, value in values.items()}
                for values in (folded, rates)
            )
        updated = self._optimizer.step(
            weights,
            [folded.get(name) for name in self.adapted],
            [rates[name] for name in self.adapted],
        )
        after = {**fast, **dict(zip(self.adapted, updated, strict=True))}
        if self.chain.watch is not None:
            self.chain.watch.update(rates, dict(zip(self.adapted, updated, strict=True)))
        self._look(
            "what the update made of the weights",
            after,
            step,
            "gradients and rates were finite: lower inner_lr",
        )
        return after if step.training and graph else _leaves(after, self.adapted)

    def _query(self, fast: Mapping[str, Tensor], batch: TaskBatch, step: InnerStep) -> _Query:
        with torch.set_grad_enabled(step.training):
            return self._forward(fast, batch.query_x, batch.query_y, step, "query")

    def _forward(
        self, fast: Mapping[str, Tensor], x: Tensor, y: Tensor, step: InnerStep, part: str
    ) -> _Query:
        """Every task's loss (T,) and prediction (T, n, *output), and the parameter values that they were made with."""
        values = self.chain.fold("transform_parameters", fast, step=step)
        stacked = [values[name] for name in self.parameters]
        losses, predictions = self._all_tasks(stacked, x, y)
        if part == "support" and self.chain.watch is not None:
            self.chain.watch.step(losses)
        self._look(
            f"the model's output for {part} examples", {"prediction": predictions}, step, _NO_VALUE
        )
        self._look(
            f"the {part} loss",
            {"loss": losses},
            step,
            "the model's output was finite: see what the loss function computes",
        )
        return losses, predictions, values

    def adapted_losses(self, outcome: Outcome) -> Tensor:
        """(T,) support losses after the last update, with the values that its query pass used. No graph, and no hook is asked again."""
        values, batch = outcome.query_parameters, usable(outcome.batch)
        try:
            with torch.no_grad():
                return self._all_tasks(
                    [values[name] for name in self.parameters], batch.support_x, batch.support_y
                )[0]
        finally:
            self.release()

    def _all_tasks(self, stacked: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (
            self._vectorized(stacked, x, y) if self.vectorized else self._sequential(stacked, x, y)
        )

    def _vectorized(self, stacked: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        # Weights that no task has changed are one tensor, expanded: vmap need not batch them, unless the gradient is asked for by task.
        shared = [
            name not in self.adapted and value.stride(0) == 0
            for name, value in zip(self.parameters, stacked, strict=True)
        ]
        return for_all_tasks(self.task, stacked, shared, x, y)

    def _sequential(self, stacked: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        rows = zip(*(value.unbind(0) for value in stacked), strict=True)
        with Folding():
            results = [
                self.task(list(row), *task)
                for row, *task in zip(rows, x.unbind(0), y.unbind(0), strict=True)
            ]
        return torch.stack([loss for loss, _ in results]), torch.stack(
            [prediction for _, prediction in results]
        )

    def _look(self, what: str, values: Mapping[str, Tensor], step: InnerStep, advice: str) -> None:
        """In a replay that looks for a culprit (Chain.watch): at what the core itself makes."""
        if self.chain.watch is not None:
            where = f"in iteration {step.meta_iteration}, inner step {step.index}"
            self.chain.watch.look(
                values, lambda fault: f"{what} holds {fault} {where}", advice, by_task=True
            )

    def release(self) -> None:
        """Let go of the last fast weights, which higher keeps in the patched modules and in the optimizer."""
        release(self.patched, list(self.parameters.values()))
        self._optimizer.reset()


def _leaves(values: Mapping[str, Tensor], adapted: Collection[str]) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_(name in adapted) for name, value in values.items()}


@contextmanager
def recording() -> Iterator[None]:
    """Inside, autograd records, and nothing is cast to a narrower dtype, whatever surrounds the call."""
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as without:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                without.enter_context(torch.autocast(device, enabled=False))
        yield


def without_non_finite(batch: TaskBatch) -> TaskBatch:
    """The batch with 0 for NaN, and with finite numbers for Inf."""
    tensors = (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
    return TaskBatch(
        *(tensor.nan_to_num() if tensor.is_floating_point() else tensor for tensor in tensors)
    )


def usable(batch: TaskBatch) -> TaskBatch:
    """Tensors that were made under inference_mode cannot be saved for a backward pass: copies of them can."""
    tensors = (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
    if not any(tensor.is_inference() for tensor in tensors):
        return batch
    return TaskBatch(*(tensor.clone() for tensor in tensors))
