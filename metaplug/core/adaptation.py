"""The differentiable inner loop, with all tasks of a batch stacked.

    θ[t,0] = θ, expanded                               then the fold of initialize_parameters
    g[t,k] = ∂ ℓ(f(x_t; θ[t,k]), y_t) / ∂θ[t,k]        then the fold of transform_gradients
    θ[t,k+1] = update(θ[t,k], g[t,k], α[k])            the inner optimizer; for SGD θ − α g

Tasks' losses do not depend on each other's weights, so the gradient of their sum with respect to
the stacked weights is every task's own. It is taken outside vmap: inside, second-order gradients
through batch and layer norm are wrong without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from metaplug.contract.inner_step import InnerStep, TaskShare
from metaplug.contract.outcome import Outcome
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_groups import targets_of
from metaplug.core.inner_loop import InnerLoop
from metaplug.core.inner_update import InnerUpdate, StepObserver, differentiable, leaves
from metaplug.core.model_passes import ModelPasses, Pass, Weights
from metaplug.core.recording import recording
from metaplug.core.rematerialize import rematerialize
from metaplug.random_streams import mix, stream

_Walked = tuple[Weights, Any, list[Tensor], dict[int, Pass]]
"""Fast weights and optimizer state after some steps, their support losses, and query passes by the
number of updates before them."""


def adapt(
    loop: InnerLoop,
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
    parameters: Mapping[str, Tensor] | None = None,
    observe: StepObserver | None = None,
) -> Outcome:
    """Adapt the tasks of a batch in lock-step, and take query losses on the way.

    In training the result carries the graph for meta-gradients. At evaluation it carries none, and
    a surrounding `no_grad` or `inference_mode` does not reach in.

    Args:
        steps: inner steps of each task; in training, the loop's own.
        iteration, total: the meta-iteration and the run's length, as plugins see them.
        query_after: numbers of updates after which to take the query loss.
        share: the part that these tasks are of those of all ranks; None for one rank.
        orders: derivative orders of the steps, where they are known already.
        seeds: one for each task, where each draws random numbers of its own: a task's numbers then
            do not depend on its batch.
        parameters: what takes the place of the model's own, by name, without a task axis.
        observe: called at every step of an evaluation. Then query passes before the last draw
            random numbers of their own, and the others draw what they draw without it.

    Example:
        >>> from metaplug.contract.chain import Chain
        >>> loop = InnerLoop(torch.nn.Linear(2, 2), Chain([]), torch.nn.functional.cross_entropy,
        ...     adapted=("weight",), inner_steps=1, inner_lr=0.1, optimizer="sgd",
        ...     optimizer_settings={}, batch_norm="batch")
        >>> x, y = torch.ones(3, 4, 2), torch.zeros(3, 4, dtype=torch.int64)
        >>> given = {"steps": 1, "training": True, "iteration": 0, "query_after": {1}}
        >>> adapt(loop, TaskBatch(x, y, x, y), **given).adapted_parameters["weight"].shape
        torch.Size([3, 2, 2])
    """
    loop.functional.begin(training)
    loop.chain.begin(training=training)
    # Meta-gradients are taken outside: who asks for them records, from before the loop on.
    kept = nullcontext() if loop.features is None else loop.features.batch()
    with nullcontext() if training else recording(), loop.functional.unwritten(), kept:
        batch = batch.recordable()
        if not training:
            orders = ()
        elif orders is None:
            orders = loop.orders_of(iteration, total)
        first = InnerStep(
            0,
            steps,
            loop.inner_steps,
            iteration,
            total,
            training,
            share=share,
            sizes=batch.sizes,
            support_inputs=batch.support_x,
            support_targets=targets_of(batch, "support"),
        )
        try:
            shared = {**loop.parameters, **loop.variables, **(parameters or {})}
            passes = ModelPasses(loop, batch, seeds)
            known = first, query_after, tuple(orders), shared
            return _Adaptation(loop, passes, *known, InnerUpdate(loop, passes, observe)).outcome()
        finally:
            loop.optimizer.reset()


@dataclass(frozen=True)
class _Adaptation:
    """One run of an inner loop: what stays the same in all its steps.

    Attributes:
        first: the step before the first update.
        query_after, orders: as `adapt` takes them.
        shared: what every task has before it is initialized, by name, without a task axis.
        update: what each step ends with.
    """

    loop: InnerLoop
    passes: ModelPasses
    first: InnerStep
    query_after: Collection[int]
    orders: tuple[int, ...]
    shared: Weights
    update: InnerUpdate

    def outcome(self) -> Outcome:
        """Take all steps, and the query losses on the way."""
        loop, first = self.loop, self.first
        fast = initial = self.initialized()
        support_losses: list[Tensor] = []
        queries: dict[int, Pass] = {}
        if 0 in self.query_after:
            queries[0] = self.query_between(fast, self.step(0, fast, initial))
        if (watch := loop.chain.watch) is not None:
            watch.begin({name: initial[name] for name in loop.adapted})
        loop.optimizer.reset()  # a backward pass that failed may have left something
        state = loop.optimizer.snapshot()
        size = (loop.checkpoint_steps if first.training else None) or first.count or 1
        for begin in range(0, first.count, size):
            indices = range(begin, min(begin + size, first.count))
            # Steps of order 0 leave no graph, so there is nothing to make again.
            again = loop.checkpoint_steps is not None and any(self.orders[begin : indices.stop])
            part = partial(self.steps, indices=indices, again=again)
            if again:
                meta_parameters = list(loop.chain.named_parameters().values())
                walked = rematerialize(part, (fast, initial, state), meta_parameters)
            else:
                walked = part((fast, initial, state))
            changed, state, losses, found = walked
            # What does not adapt stays the one tensor that it is, also where steps are made again.
            fast = {**fast, **{name: changed[name] for name in loop.adapted}}
            support_losses += losses
            queries |= found
        # Outside the parts that are made again: this loss is one of the weights in the outcome.
        if first.count in self.query_after and first.count:
            queries[first.count] = self.query(fast, self.step(first.count - 1, fast, initial))
        _, predictions, values = queries[max(queries)]
        # What is computed of an outcome may be differentiated, whatever the order of the last step.
        axis = self.passes.class_axis(predictions, self.passes.targets("query"))
        known: dict[str, Any] = {"second_order": True, "class_axis": axis}
        last = replace(self.step(max(first.count - 1, 0), fast, initial), **known)
        return Outcome(
            self.passes.batch,
            initial_parameters=MappingProxyType(initial),
            adapted_parameters=MappingProxyType(fast),
            support_losses=tuple(support_losses),
            query_losses=MappingProxyType({after: each[0] for after, each in queries.items()}),
            query_predictions=predictions.detach(),
            query_parameters=MappingProxyType(dict(values)),
            statistics=MappingProxyType(first.statistics),
            adapted=loop.adapted,
            model_parameters=MappingProxyType(self.shared),
            derivative_orders=self.orders,
            last=last,
        )

    def initialized(self) -> Weights:
        """Return the fast weights that every task starts from."""
        loop, tasks, training = self.loop, self.passes.batch.num_tasks, self.first.training
        start: Weights = {
            name: value.expand(tasks, *value.shape) for name, value in self.shared.items()
        }
        # At evaluation nothing has a graph; in training a constant start has a gradient too.
        lone = [n for n in loop.adapted if not start[n].requires_grad] if training else list(start)
        start = {**start, **leaves({name: start[name] for name in lone}, loop.adapted)}
        self.passes.under_way.add("initialize")
        step = self.step(0, start, start)
        found: Weights = loop.chain.fold("initialize_parameters", start, step=step)
        self.passes.under_way.discard("initialize")
        if found is start:
            return start
        if not training:
            return leaves(found, loop.adapted)
        # Those left as they were too: others may be made of them, also such as are not adapted.
        return {**found, **differentiable({name: found[name] for name in loop.adapted})}

    def step(
        self, index: int, fast: Weights, initial: Weights, *, graph: bool = True, **more: Any
    ) -> InnerStep:
        """The step that plugins see before update `index`."""
        return replace(
            self.first,
            index=index,
            parameters=MappingProxyType(fast),
            initial_parameters=MappingProxyType(initial),
            second_order=graph
            and self.first.training
            and self.orders[index : index + 1] in ((2,), ()),
            passes=self.passes,
            **more,
        )

    def steps(
        self,
        inputs: tuple[Weights, Weights, Any],
        *,
        indices: range,
        again: bool = False,
        graph: bool = True,
    ) -> _Walked:
        """Take some inner steps from fast weights, first weights and the optimizer's state.

        Args:
            again: whether these steps are taken twice: first without `graph`, for values alone, and
                again where their graph is needed.
        """
        loop, (fast, initial, state) = self.loop, inputs
        loop.optimizer.restore(state)
        # Of two runs, the first keeps statistics; the second must not keep them again.
        more: dict[str, Any] = {"statistics": {}} if graph and again else {}
        support_losses, queries = [], {}
        for index in indices:
            linked = self.first.training and graph and self.orders[index] > 0
            step = self.step(index, fast, initial, graph=graph, **more)
            losses, outputs, _ = self.passes.run(fast, step, "support")
            known = self.passes.knowing(step, losses, outputs)
            objective = self.passes.regularized(losses, known)
            # A NaN that a plugin adds has no gradient, and would show nowhere else.
            told = losses if objective is losses else losses + 0 * objective.detach()
            support_losses.append(told if linked else told.detach())
            fast = self.update.take(fast, objective, known, linked=linked)
            if index + 1 in self.query_after and index + 1 < self.first.count:
                after = replace(step, parameters=MappingProxyType(fast))
                queries[index + 1] = self.query_between(fast, after)
        state = loop.optimizer.snapshot()
        # The backward pass may take these steps again, when nobody else is there to forget them.
        loop.optimizer.reset()
        return fast, state, support_losses, queries

    def query_between(self, fast: Weights, step: InnerStep) -> Pass:
        """Take the query loss of every task where more may follow."""
        if self.update.observe is None or not step.count:
            return self.query(fast, step)
        with stream(mix(step.index), self.loop.device):
            return self.query(fast, step)

    def query(self, fast: Weights, step: InnerStep) -> Pass:
        """Take the query loss of every task."""
        with torch.set_grad_enabled(step.training or self.loop.query_graph):
            losses, predictions, values = self.passes.run(fast, step, "query")
        return (losses if step.training else losses.detach()), predictions, values
