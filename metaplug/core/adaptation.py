"""The differentiable inner loop, with all tasks of a batch stacked.

    θ[t,0] = θ, expanded                               then the fold of initialize_parameters
    g[t,k] = ∂ ℓ(f(x_t; θ[t,k]), y_t) / ∂θ[t,k]        then the fold of transform_gradients
    θ[t,k+1] = update(θ[t,k], g[t,k], α[k])            the inner optimizer; for SGD θ − α g

Tasks' losses do not depend on each other's weights, so the gradient of their sum with respect to
the stacked weights is every task's own. It is taken outside vmap: inside, second-order gradients
through batch and layer norm are wrong without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
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
from metaplug.core.model_passes import ModelPasses, Pass, Weights
from metaplug.core.recording import recording
from metaplug.core.rematerialize import rematerialize
from metaplug.errors import RequestError, RunError, quoted
from metaplug.random_streams import mix, stream

_Walked = tuple[Weights, Any, list[Tensor], dict[int, Pass]]
"""Fast weights and optimizer state after some steps, their support losses, and query passes by the
number of updates before them."""

StepObserver = Callable[[int, Weights, Weights], None]
"""(k, gradients before any plugin changes them, learning rates after all have), by name."""

NO_DERIVATIVE = (
    "has no finite derivative there, such as a root or norm of 0: add a small number inside it"
)
_NO_GRADIENT = (
    f"the loss was finite: an operation of the model, or of a plugin's loss, {NO_DERIVATIVE}"
)


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
            support_targets=targets_of(batch, "support"),
        )
        try:
            shared = {**loop.parameters, **loop.variables, **(parameters or {})}
            passes = ModelPasses(loop, batch, seeds)
            known = first, query_after, tuple(orders), shared
            return _Adaptation(loop, passes, *known, observe).outcome()
        finally:
            loop.optimizer.reset()


@dataclass(frozen=True)
class _Adaptation:
    """One run of an inner loop: what stays the same in all its steps.

    Attributes:
        first: the step before the first update.
        query_after, orders: as `adapt` takes them.
        shared: what every task has before it is initialized, by name, without a task axis.
        observe: as `adapt` takes it.
    """

    loop: InnerLoop
    passes: ModelPasses
    first: InnerStep
    query_after: Collection[int]
    orders: tuple[int, ...]
    shared: Weights
    observe: StepObserver | None = None

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
        start = {**start, **_leaves({name: start[name] for name in lone}, loop.adapted)}
        self.passes.under_way.add("initialize")
        step = self.step(0, start, start)
        found: Weights = loop.chain.fold("initialize_parameters", start, step=step)
        self.passes.under_way.discard("initialize")
        if found is start:
            return start
        if not training:
            return _leaves(found, loop.adapted)
        # Those left as they were too: others may be made of them, also such as are not adapted.
        return {**found, **_differentiable({name: found[name] for name in loop.adapted})}

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
            fast = self.update(fast, objective, known, linked=linked)
            if index + 1 in self.query_after and index + 1 < self.first.count:
                after = replace(step, parameters=MappingProxyType(fast))
                queries[index + 1] = self.query_between(fast, after)
        state = loop.optimizer.snapshot()
        # The backward pass may take these steps again, when nobody else is there to forget them.
        loop.optimizer.reset()
        return fast, state, support_losses, queries

    def update(self, fast: Weights, objective: Tensor, step: InnerStep, *, linked: bool) -> Weights:
        """Return the fast weights after one update, with a graph to those before if `linked`."""
        loop, names, watch = self.loop, self.loop.adapted, self.loop.chain.watch
        gradients = self.own_gradients(fast, objective, step)
        self.passes.look("the gradient of the support loss", gradients, step, _NO_GRADIENT)
        folded = loop.chain.fold("transform_gradients", gradients, step=step)
        # Made anew for each step, and for each name: what a plugin writes in place stays there.
        full = torch.full((len(names),), loop.inner_lr, dtype=loop.dtype, device=loop.device)
        rates = dict(zip(names, full.unbind(), strict=True))
        rates = loop.chain.fold("transform_learning_rates", rates, step=step)
        if self.observe is not None:
            self.observe(step.index, gradients, rates)
        if not linked:
            folded = {name: value.detach() for name, value in folded.items()}
            rates = {name: value.detach() for name, value in rates.items()}
        before = {name: fast[name] for name in names}
        changed = self.updated(before, folded, rates, step)
        if watch is not None:
            watch.update(rates, changed)
        advice = "gradients and rates were finite: lower inner_lr"
        self.passes.look("what the update made of the weights", changed, step, advice)
        if linked:
            return {**fast, **changed}
        loop.optimizer.detach()
        return {**fast, **_leaves(changed, names)}

    def updated(
        self, before: Weights, gradients: Weights, rates: Weights, step: InnerStep
    ) -> Weights:
        """Return the adapted weights after a plugin's update, or that of the inner optimizer."""
        loop, answer = self.loop, None
        if links := loop.chain.links("update_parameters"):
            answer = loop.chain.choose(
                "update_parameters",
                None,
                parameters=MappingProxyType(before),
                gradients=MappingProxyType(dict(gradients)),
                learning_rates=MappingProxyType(dict(rates)),
                step=step,
            )
        if answer is None:
            updated = loop.optimizer.step(
                list(before.values()),
                [gradients.get(name) for name in before],
                [rates[name] for name in before],
            )
            return dict(zip(before, updated, strict=True))
        if not loop.optimizer.is_plain:
            by = quoted(link.plugin.name for link in links)
            raise RequestError(
                f"plugin {by} makes the inner update itself, so the inner optimizer "
                f"'{loop.optimizer.name}' and its settings would do nothing: leave them out"
            )
        return _differentiable({name: answer[name] for name in before})

    def own_gradients(self, fast: Weights, objective: Tensor, step: InnerStep) -> Weights:
        """Return every task's own gradient of its objective, (T, *shape) by name."""
        loop = self.loop
        if loop.first_order_only and step.training and step.second_order:
            raise RunError(
                "second-order meta-gradients cannot be had of this model (one of its operations is "
                "marked once_differentiable): add the plugin derivative-order"
            )
        adapted = {name: fast[name] for name in loop.adapted}
        gradients = self.passes.differentiate(objective, adapted, step, retain=False)
        if not gradients:
            raise RunError(
                f"no gradient reaches the adapted parameters {quoted(loop.adapted[:3])}: "
                "the loss does not depend on them; adapt others"
            )
        return gradients

    def query_between(self, fast: Weights, step: InnerStep) -> Pass:
        """Take the query loss of every task where more may follow."""
        if self.observe is None or not step.count:
            return self.query(fast, step)
        with stream(mix(step.index), self.loop.device):
            return self.query(fast, step)

    def query(self, fast: Weights, step: InnerStep) -> Pass:
        """Take the query loss of every task."""
        with torch.set_grad_enabled(step.training or self.loop.query_graph):
            losses, predictions, values = self.passes.run(fast, step, "query")
        return (losses if step.training else losses.detach()), predictions, values


def _differentiable(values: Weights) -> dict[str, Tensor]:
    """The same values, made by a plugin, as variables of their own.

    Where it made one of another, the gradient of the other would include the way through the first:
    a view is a node that only what is computed of it reaches. A graph begins at those without one.
    """
    return {
        name: value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        for name, value in values.items()
    }


def _leaves(values: Weights, adapted: Collection[str]) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_(name in adapted) for name, value in values.items()}
