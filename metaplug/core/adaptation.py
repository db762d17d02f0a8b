"""The differentiable inner loop, with all tasks of a batch stacked.

    θ[t,0] = θ, expanded                               then the fold of initialize_parameters
    g[t,k] = ∂ ℓ(f(x_t; θ[t,k]), y_t) / ∂θ[t,k]        then the fold of transform_gradients
    θ[t,k+1] = update(θ[t,k], g[t,k], α[k])            the inner optimizer; for SGD θ − α g

Tasks' losses do not depend on each other's weights, so the gradient of their sum with respect to
the stacked weights is every task's own. It is taken outside vmap: inside, second-order gradients
through batch and layer norm are wrong without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from metaplug.contract.inner_step import InnerStep, TaskShare
from metaplug.contract.outcome import Outcome
from metaplug.contract.return_checks import form
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_groups import Alike
from metaplug.contract.task_sizes import Part
from metaplug.core.inner_loop import InnerLoop
from metaplug.core.losses import output_axis
from metaplug.core.recording import recording
from metaplug.core.rematerialize import rematerialize
from metaplug.errors import RequestError, RunError, did_you_mean, quoted
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
            support_targets=_without_padding(batch),
        )
        try:
            shared = {**loop.parameters, **loop.variables, **(parameters or {})}
            known = tuple(orders), seeds, shared
            return _Adaptation(loop, batch, first, query_after, *known).outcome()
        finally:
            loop.optimizer.reset()


@dataclass(frozen=True)
class _Adaptation:
    """One run of an inner loop: what stays the same in all its steps, and the passes of its model.

    Attributes:
        first: the step before the first update.
        query_after, orders, seeds: as `adapt` takes them.
        shared: what every task has before it is initialized, by name, without a task axis.
        groups: the examples as the model takes them, made at the first pass on each part.
        under_way: the extra passes that a plugin has asked for and that are not done.
    """

    loop: InnerLoop
    batch: TaskBatch
    first: InnerStep
    query_after: Collection[int]
    orders: tuple[int, ...]
    seeds: Sequence[int] | None
    shared: _Weights
    groups: dict[Part, list[Alike]] = field(default_factory=dict)
    under_way: set[str] = field(default_factory=set)

    def outcome(self) -> Outcome:
        """Take all steps, and the query losses on the way."""
        loop, first = self.loop, self.first
        fast = initial = self.initialized()
        support_losses: list[Tensor] = []
        queries: dict[int, _Query] = {}
        if 0 in self.query_after:
            queries[0] = self.query(fast, self.step(0, fast, initial))
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
            fast, state, losses, found = walked
            support_losses += losses
            queries |= found
        # Outside the parts that are made again: this loss is one of the weights in the outcome.
        if first.count in self.query_after and first.count:
            queries[first.count] = self.query(fast, self.step(first.count - 1, fast, initial))
        _, predictions, values = queries[max(queries)]
        # What is computed of an outcome may be differentiated, whatever the order of the last step.
        last = replace(self.step(max(first.count - 1, 0), fast, initial), second_order=True)
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
            model_parameters=MappingProxyType(self.shared),
            derivative_orders=self.orders,
            last=last,
        )

    def initialized(self) -> _Weights:
        """Return the fast weights that every task starts from."""
        loop, tasks, training = self.loop, self.batch.num_tasks, self.first.training
        start: _Weights = {
            name: value.expand(tasks, *value.shape) for name, value in self.shared.items()
        }
        if not training:
            start = _leaves(start, loop.adapted)
        self.under_way.add("initialize")
        step = self.step(0, start, start)
        found: _Weights = loop.chain.fold("initialize_parameters", start, step=step)
        self.under_way.discard("initialize")
        if not training:
            return found if found is start else _leaves(found, loop.adapted)
        changed = [name for name in loop.adapted if _made(found[name], start[name])]
        return {**found, **_differentiable({name: found[name] for name in changed})}

    def step(
        self, index: int, fast: _Weights, initial: _Weights, *, graph: bool = True, **more: Any
    ) -> InnerStep:
        """The step that plugins see before update `index`."""
        return replace(
            self.first,
            index=index,
            parameters=MappingProxyType(fast),
            initial_parameters=MappingProxyType(initial),
            second_order=self.first.training and graph and 2 in (*self.orders[index:], 2)[:1],
            passes=self,
            **more,
        )

    def steps(
        self,
        inputs: tuple[_Weights, _Weights, Any],
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
            losses, outputs, _ = self.pass_on(fast, step, "support")
            known = self.knowing(step, losses, outputs)
            objective = loop.chain.fold("transform_inner_losses", losses, step=known)
            # A NaN that a plugin adds has no gradient, and would show nowhere else.
            told = losses if objective is losses else losses + 0 * objective.detach()
            support_losses.append(told if linked else told.detach())
            fast = self.update(fast, objective, known, linked=linked)
            if index + 1 in self.query_after and index + 1 < self.first.count:
                after = replace(step, parameters=MappingProxyType(fast))
                queries[index + 1] = self.query(fast, after)
        state = loop.optimizer.snapshot()
        # The backward pass may take these steps again, when nobody else is there to forget them.
        loop.optimizer.reset()
        return fast, state, support_losses, queries

    def update(
        self, fast: _Weights, objective: Tensor, step: InnerStep, *, linked: bool
    ) -> _Weights:
        """Return the fast weights after one update, with a graph to those before if `linked`."""
        loop, names, watch = self.loop, self.loop.adapted, self.loop.chain.watch
        gradients = self.own_gradients(fast, objective, step)
        self.look("the gradient of the support loss", gradients, step, _NO_GRADIENT)
        folded = loop.chain.fold("transform_gradients", gradients, step=step)
        # Made anew for each step, and for each name: what a plugin writes in place stays there.
        full = torch.full((len(names),), loop.inner_lr, dtype=loop.dtype, device=loop.device)
        rates = dict(zip(names, full.unbind(), strict=True))
        rates = loop.chain.fold("transform_learning_rates", rates, step=step)
        if not linked:
            folded = {name: value.detach() for name, value in folded.items()}
            rates = {name: value.detach() for name, value in rates.items()}
        before = {name: fast[name] for name in names}
        changed = self.updated(before, folded, rates, step)
        if watch is not None:
            watch.update(rates, changed)
        advice = "gradients and rates were finite: lower inner_lr"
        self.look("what the update made of the weights", changed, step, advice)
        if linked:
            return {**fast, **changed}
        loop.optimizer.detach()
        return {**fast, **_leaves(changed, names)}

    def updated(
        self, before: _Weights, gradients: _Weights, rates: _Weights, step: InnerStep
    ) -> _Weights:
        """Return the adapted weights after a plugin's update, or that of the inner optimizer."""
        loop = self.loop
        answer: _Weights | None = loop.chain.choose(
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
            by = quoted(link.plugin.name for link in loop.chain.links("update_parameters"))
            raise RequestError(
                f"plugin {by} makes the inner update itself, so the inner optimizer "
                f"'{loop.optimizer.name}' and its settings would do nothing: leave them out"
            )
        return _differentiable({name: answer[name] for name in before})

    def own_gradients(self, fast: _Weights, objective: Tensor, step: InnerStep) -> _Weights:
        """Return every task's own gradient of its objective, (T, *shape) by name."""
        loop = self.loop
        if loop.first_order_only and step.training and step.second_order:
            raise RunError(
                "second-order meta-gradients cannot be had of this model (one of its operations is "
                "marked once_differentiable): add the plugin derivative-order"
            )
        adapted = {name: fast[name] for name in loop.adapted}
        gradients = self._gradients(objective, adapted, step, retain=False)
        if not gradients:
            raise RunError(
                f"no gradient reaches the adapted parameters {quoted(loop.adapted[:3])}: "
                "the loss does not depend on them; adapt others"
            )
        return gradients

    def query(self, fast: _Weights, step: InnerStep) -> _Query:
        """Take the query loss of every task."""
        with torch.set_grad_enabled(step.training or self.loop.query_graph):
            losses, predictions, values = self.pass_on(fast, step, "query")
        return (losses if step.training else losses.detach()), predictions, values

    def pass_on(
        self, weights: _Weights, step: InnerStep, part: Part, *, watched: bool = True
    ) -> _Query:
        """Run the model for every task on its "support" or "query" examples.

        Args:
            watched: whether a search for the first non-finite value looks at it.
        """
        loop, seeds = self.loop, self.seeds
        values = loop.chain.fold("transform_parameters", weights, step=step)
        keep: Part | None = part
        if loop.features is not None:
            # Before and while tasks get weights of their own, those below are not yet the loop's.
            fits = "initialize" not in self.under_way
            fits = fits and loop.features.fit(values, step.initial_parameters)
            keep = part if fits else None
        if seeds is not None:
            seeds = [mix(seed, 2 * step.index + (part == "query")) for seed in seeds]
        if part not in self.groups:
            self.groups[part] = loop.groups(self.batch, part)
        stacked = [values[name] for name in loop.parameters]
        losses, predictions = loop.all_tasks(stacked, self.groups[part], seeds, keep=keep)
        if watched:
            if part == "support" and loop.chain.watch is not None:
                loop.chain.watch.step(losses)
            what = f"the model's output for {part} examples"
            self.look(what, {"prediction": predictions}, step, _NO_VALUE)
            advice = "the model's output was finite: see what the loss function computes"
            self.look(f"the {part} loss", {"loss": losses}, step, advice)
        return losses, predictions, values

    def knowing(self, step: InnerStep, losses: Tensor, predictions: Tensor) -> InnerStep:
        """The step after its support pass."""
        targets = step.targets
        axis = output_axis(predictions, targets, leading=2, last=self.loop.classes_last)
        return replace(
            step, support_losses=losses, support_predictions=predictions, class_axis=axis
        )

    # What plugins ask for, by InnerStep and Outcome.

    def forward(self, step: InnerStep, parameters: _Weights, part: Part) -> tuple[Tensor, Tensor]:
        """Run the model once more, with other values."""
        weights = self._completed(step, parameters)
        with self._once("forward", "transform_parameters", step):
            losses, predictions, _ = self.pass_on(
                weights, replace(step, parameters=weights), part, watched=False
            )
        return losses, predictions

    def objective(self, step: InnerStep, parameters: _Weights) -> Tensor:
        """Take the losses that the inner loop descends, at other values."""
        weights = self._completed(step, parameters)
        there = replace(step, parameters=weights)
        losses, predictions = self.forward(there, {}, "support")
        with self._once("objective", "transform_inner_losses", step):
            known = self.knowing(there, losses, predictions)
            found: Tensor = self.loop.chain.fold("transform_inner_losses", losses, step=known)
        return found

    def gradients(self, step: InnerStep, losses: Tensor, parameters: _Weights) -> _Weights:
        """Return every task's gradient of its loss, of what a plugin names."""
        shared = [
            name
            for name, value in parameters.items()
            if len(value) > 1 and value.stride(0) == 0 and name not in self.loop.adapted
        ]
        if shared:
            raise RequestError(
                f"plugin '{_owner(step)}' asks for every task's gradient of {quoted(shared[:3])}, "
                "which is one tensor for all tasks: make losses with a copy for each task, as by "
                "parameters[name].clone()"
            )
        try:
            return self._gradients(losses, parameters, step, retain=True)
        except RuntimeError as error:
            if "a second time" not in str(error):
                raise
            raise RequestError(
                f"plugin '{_owner(step)}' differentiates losses whose graph is gone, as that of "
                "step.losses is in a step of first order once gradients are taken: make new ones "
                "by step.forward(step.parameters)"
            ) from error

    def _gradients(
        self, losses: Tensor, parameters: _Weights, step: InnerStep, *, retain: bool
    ) -> dict[str, Tensor]:
        share, second = step.share, step.training and step.second_order
        wanted = {name: value for name, value in parameters.items() if value.requires_grad}
        if not losses.requires_grad or not wanted:
            return {}
        # Across ranks autograd differentiates Σ_r s[r] · (...), but this sum over tasks has no
        # factor s: divide it out before, and multiply it in after.
        total = losses.sum() if share is None else losses.sum() / share.weight
        taken = torch.autograd.grad(
            total,
            list(wanted.values()),
            create_graph=second,
            retain_graph=retain or second,
            allow_unused=True,
        )
        return {
            name: gradient if share is None else share.weight * gradient
            for name, gradient in zip(wanted, taken, strict=True)
            if gradient is not None
        }

    def _completed(self, step: InnerStep, parameters: _Weights) -> _Weights:
        """Return a plugin's values, completed by those of the step."""
        known = step.parameters
        for name, value in parameters.items():
            if name not in known:
                raise RequestError(
                    f"plugin '{_owner(step)}' gives a forward pass '{name}', which is no parameter "
                    f"of it: {did_you_mean(name, known)}"
                )
            if value.shape[1:] != known[name].shape[1:] or len(value) != len(known[name]):
                raise RequestError(
                    f"plugin '{_owner(step)}' gives a forward pass '{name}' of {form(value)}, not "
                    f"of {form(known[name])}: keep (tasks, *shape)"
                )
        return MappingProxyType({**known, **parameters})

    @contextmanager
    def _once(self, what: str, hook: str, step: InnerStep) -> Iterator[None]:
        """Inside, a pass runs that is not to be asked for by the hook that it calls."""
        if what in self.under_way:
            raise RequestError(
                f"plugin '{_owner(step)}' calls {what} in {hook}, which {what} itself calls: call "
                "it in another hook"
            )
        self.under_way.add(what)
        try:
            yield
        finally:
            self.under_way.discard(what)

    def look(self, what: str, values: _Weights, step: InnerStep, advice: str) -> None:
        """In a replay that looks for the first non-finite value, look at what the core makes."""
        if (watch := self.loop.chain.watch) is not None:
            where = f"in iteration {step.meta_iteration}, inner step {step.index}"
            watch.look(values, lambda fault: f"{what} holds {fault} {where}", advice, by_task=True)


def _owner(step: InnerStep) -> str:
    return "" if step.owner is None else step.owner.name


def _without_padding(batch: TaskBatch) -> Tensor:
    """The support targets, of which the last places may be of no task of this batch."""
    if batch.sizes is None:
        return batch.support_y
    return batch.support_y[:, : max(size.support for size in batch.sizes)]


def _made(value: Tensor, start: Tensor) -> bool:
    return value is not start or not value.requires_grad


def _differentiable(values: _Weights) -> dict[str, Tensor]:
    """The same values, made by a plugin, as variables of their own.

    Where it made one of another, the gradient of the other would include the way through the first:
    a view is a node that only what is computed of it reaches. A graph begins at those without one.
    """
    return {
        name: value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        for name, value in values.items()
    }


def _leaves(values: _Weights, adapted: Collection[str]) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_(name in adapted) for name, value in values.items()}
