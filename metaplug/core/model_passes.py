"""The passes of a model over the tasks of a batch: the loop's own, and those of plugins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from metaplug.contract.inner_step import InnerStep
from metaplug.contract.return_checks import form
from metaplug.contract.schedule import step_text
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_groups import Alike, targets_of
from metaplug.contract.task_sizes import Part
from metaplug.core.autograd_graph import graph_nodes
from metaplug.core.inner_loop import InnerLoop
from metaplug.core.losses import output_axis
from metaplug.errors import RequestError, did_you_mean, quoted
from metaplug.random_streams import mix

Weights = Mapping[str, Tensor]
"""Of all tasks by name, (T, *shape) each."""

Pass = tuple[Tensor, Tensor, Weights]
"""Losses (T,), predictions (T, n, *output), and the parameter values that made them."""

_NO_VALUE = (
    "weights and inputs were finite: see whether the model divides by 0 or takes a root or "
    "logarithm of what is not positive, or lower meta_lr or inner_lr if its weights have grown"
)


@dataclass(frozen=True)
class ModelPasses:
    """Runs the model of an inner loop on the tasks of a batch; implements `contract`'s Passes.

    Attributes:
        seeds: one for each task, where each draws random numbers of its own.
        groups: the examples as the model takes them, made at the first pass on each part.
        under_way: what is being made and is not to be asked for meanwhile.
    """

    loop: InnerLoop
    batch: TaskBatch
    seeds: Sequence[int] | None = None
    groups: dict[Part, list[Alike]] = field(default_factory=dict)
    under_way: set[str] = field(default_factory=set)

    def run(self, weights: Weights, step: InnerStep, part: Part, *, watched: bool = True) -> Pass:
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
        stacked = self._stacked(values, step)
        losses, predictions = loop.all_tasks(stacked, self.groups[part], seeds, keep=keep)
        if watched:
            if part == "support" and loop.chain.watch is not None:
                loop.chain.watch.step(losses)
            what = f"the model's output for {part} examples"
            self.look(what, {"prediction": predictions}, step, _NO_VALUE)
            advice = "the model's output was finite: see what the loss function computes"
            self.look(f"the {part} loss", {"loss": losses}, step, advice)
        return losses, predictions, values

    def _stacked(self, values: Weights, step: InnerStep) -> list[Tensor]:
        """Return the values of the model's parameters, of every task's own what a plugin put there.

        What no task adapts goes into the model as one tensor, expanded. Of a value that a plugin
        made, such as a task parameter that no step has moved yet, it may be that tasks adapt it:
        its gradient would be the first task's alone.
        """
        known, loop = step.initial_parameters, self.loop
        return [
            values[name]
            if adapted or values[name] is known.get(name)
            else values[name].contiguous()
            for adapted, name in zip(loop.is_adapted, loop.parameters, strict=True)
        ]

    def knowing(self, step: InnerStep, losses: Tensor, predictions: Tensor) -> InnerStep:
        """The step after its support pass."""
        axis = self.class_axis(predictions, step.targets)
        return replace(
            step, support_losses=losses, support_predictions=predictions, class_axis=axis
        )

    def targets(self, part: Part) -> Tensor:
        """The targets of a part, as many as the largest task of this batch has."""
        return targets_of(self.batch, part)

    def class_axis(self, predictions: Tensor, targets: Tensor) -> int | None:
        """The axis of classes in the predictions of stacked tasks."""
        return output_axis(predictions, targets, leading=2, last=self.loop.classes_last)

    def regularized(self, losses: Tensor, step: InnerStep) -> Tensor:
        """The losses that the inner loop descends, of those of the model."""
        self.under_way.add("transform_inner_losses")
        try:
            found: Tensor = self.loop.chain.fold("transform_inner_losses", losses, step=step)
        finally:
            self.under_way.discard("transform_inner_losses")
        return found

    def look(self, what: str, values: Weights, step: InnerStep, advice: str) -> None:
        """In a replay that looks for the first non-finite value, look at what the core makes."""
        if (watch := self.loop.chain.watch) is not None:
            where = "in " + step_text(step.meta_iteration, step.index, training=step.training)
            watch.look(values, lambda fault: f"{what} holds {fault} {where}", advice, by_task=True)

    # What plugins ask for, by InnerStep and Outcome.

    def forward(self, step: InnerStep, parameters: Weights, part: Part) -> tuple[Tensor, Tensor]:
        """Run the model once more, with other values."""
        weights = self._completed(step, parameters)
        with self._once("forward", "transform_parameters", step):
            losses, predictions, _ = self.run(
                weights, replace(step, parameters=weights), part, watched=False
            )
        return losses, predictions

    def objective(self, step: InnerStep, parameters: Weights) -> Tensor:
        """Take the losses that the inner loop descends, at other values."""
        weights = self._completed(step, parameters)
        there = replace(step, parameters=weights)
        losses, predictions = self.forward(there, {}, "support")
        with self._once("objective", "transform_inner_losses", step):
            return self.regularized(losses, self.knowing(there, losses, predictions))

    def gradients(self, step: InnerStep, losses: Tensor, parameters: Weights) -> Weights:
        """Return every task's gradient of its loss, of what a plugin names."""
        # What is not adapted has no gradient at evaluation, and in training one of all tasks.
        shared = [
            name
            for name, value in parameters.items()
            if not value.requires_grad
            or (len(value) > 1 and value.stride(0) == 0 and name not in self.loop.adapted)
        ]
        if shared:
            raise RequestError(
                f"plugin '{_owner(step)}' asks for every task's gradient of {quoted(shared[:3])}, "
                "which is one tensor for all tasks, or takes no gradient: make losses with a copy "
                "for each task, as by parameters[name].clone().requires_grad_()"
            )
        if step.second_order and "transform_inner_losses" in self.under_way:
            _refuse_third_order(losses, parameters, step)
        try:
            return self.differentiate(losses, parameters, step, retain=True)
        except RuntimeError as error:
            if "a second time" not in str(error):
                raise
            raise RequestError(
                f"plugin '{_owner(step)}' differentiates losses whose graph is gone, as that of "
                "step.losses is in a step of first order once gradients are taken: make new ones "
                "by step.forward(step.parameters)"
            ) from error

    def differentiate(
        self, losses: Tensor, parameters: Weights, step: InnerStep, *, retain: bool
    ) -> dict[str, Tensor]:
        """Return every task's gradient of its loss, of the parameters that it reaches.

        Args:
            retain: whether the graph of the losses stays, also in first order.
        """
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

    def _completed(self, step: InnerStep, parameters: Weights) -> Weights:
        """Return a plugin's values, completed by those of the step."""
        known = step.parameters
        for name, value in parameters.items():
            if name not in known:
                raise RequestError(
                    f"plugin '{_owner(step)}' gives a forward pass '{name}', which is no parameter "
                    f"of it: {did_you_mean(name, known)}"
                )
            if form(value) != form(known[name]):
                raise RequestError(
                    f"plugin '{_owner(step)}' gives a forward pass '{name}' of {form(value)}, not "
                    f"of {form(known[name])}: keep (tasks, *shape), dtype and device"
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


def _refuse_third_order(losses: Tensor, parameters: Weights, step: InnerStep) -> None:
    """Refuse a gradient in the inner loss of a model whose third derivative torch gets wrong."""
    names = {node.name() for node in graph_nodes(losses, parameters.values())}
    if any(name.startswith("NativeLayerNormBackward") for name in names):
        raise RequestError(
            f"plugin '{_owner(step)}' takes a gradient in transform_inner_losses, so that the "
            "meta-gradient is of third order, which torch gets wrong for layer norm: add the "
            "gradient of the term in transform_gradients, or use the plugin derivative-order"
        )


def _owner(step: InnerStep) -> str:
    return "" if step.owner is None else step.owner.name
