"""One step of the inner loop, as a plugin sees it: T tasks in a batch, K inner steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, overload

import torch
from torch import Tensor

from metaplug.contract.inputs import Inputs
from metaplug.contract.plugin import Plugin
from metaplug.contract.task_groups import by_size, check_part
from metaplug.contract.task_sizes import Part, TaskSize
from metaplug.contract.values import Gradients, Parameters
from metaplug.errors import RequestError

LOGGED = "log "
"""Begins the names of statistics that are figures to log."""


class TaskShare(Protocol):
    """This rank's share of a meta-batch, and the mean over ranks."""

    @property
    def weight(self) -> float: ...
    def mean(self, x: Tensor) -> Tensor: ...


class Passes(Protocol):
    """What the inner loop computes once more for a plugin."""

    def forward(
        self, step: InnerStep, parameters: Parameters, part: Part
    ) -> tuple[Tensor, Tensor]: ...
    def objective(self, step: InnerStep, parameters: Parameters) -> Tensor: ...
    def gradients(self, step: InnerStep, losses: Tensor, parameters: Parameters) -> Gradients: ...
    def targets(self, part: Part) -> Tensor: ...
    def class_axis(self, predictions: Tensor, targets: Tensor) -> int | None: ...


@dataclass(frozen=True, slots=True)
class InnerStep:
    """One step of the inner loop, as one plugin sees it.

    Attributes:
        index: k, counted from 0.
        count: K, the number of steps of this loop.
        trained_steps: the number of steps that the model is meta-trained with.
        meta_iteration: the meta-iteration, counted from 0.
        meta_iterations: the meta-iterations of the whole run; 0 where none has begun.
        training: whether this is meta-training; False when test tasks are adapted.
        parameters: the fast weights of this forward pass, all parameters of the model and, by
            PLUGIN.NAME, the plugins' task parameters.
        initial_parameters: the weights that every task started from.
        sizes: of each task, where they differ; predictions are padded with zeros beyond them.
        class_axis: of `predictions`: that of classes, or the first of outputs that have a target
            each; None elsewhere, and before the pass that makes them, as in
            `initialize_parameters`, where `by_task` finds it in the predictions that it is given.
        second_order: whether meta-gradients flow through the gradients that are taken in this step.

    >>> InnerStep(7, 8, trained_steps=5, meta_iteration=0, meta_iterations=0, training=False).slot
    4
    """

    index: int
    count: int
    trained_steps: int
    meta_iteration: int
    meta_iterations: int
    training: bool
    parameters: Parameters = field(default_factory=dict)
    initial_parameters: Parameters = field(default_factory=dict)
    support_losses: Tensor | None = None
    support_predictions: Tensor | None = None
    statistics: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    owner: Plugin | None = None
    share: TaskShare | None = None
    sizes: tuple[TaskSize, ...] | None = None
    class_axis: int | None = None
    support_targets: Tensor | None = None
    second_order: bool = False
    passes: Passes | None = None
    support_inputs: Inputs = None

    @property
    def slot(self) -> int:
        """min(k, trained steps − 1): the place of this step's meta-parameters."""
        if self.trained_steps == 0:
            raise RequestError(
                f"plugin '{self._owner.name}' keeps a value for each inner step, but the model is "
                "trained with none: train with inner_steps of at least 1, or leave the plugin out"
            )
        return min(self.index, self.trained_steps - 1)

    @property
    def traced(self) -> bool:
        """Whether the step is recorded, to run compiled or captured: no number can be read then.

        Elsewhere `tensor.item()` gives a number, which on a CPU costs nothing, as for a Function
        that takes its derivatives by hand.
        """
        return not isinstance(self.meta_iteration, int)

    @property
    def losses(self) -> Tensor:
        """(T,) support losses, before `transform_inner_losses`."""
        return self._of_forward("losses", self.support_losses)

    @property
    def predictions(self) -> Tensor:
        """(T, n_support, *output) of the support pass; logits in classification."""
        return self._of_forward("predictions", self.support_predictions)

    @property
    def inputs(self) -> Inputs:
        """(T, n_support, *input) of the support set, or several by name or place, as tasks have it.

        Where tasks differ in size, zeros follow the examples that `sizes` counts. A start that
        `initialize_parameters` gives may depend on them, as of a task encoder.
        """
        if self.support_inputs is None:
            raise RequestError(
                f"plugin '{self._owner.name}' asks for inputs where there is no batch, as in "
                "derivative_order: ask in a hook of the inner loop that has parameters"
            )
        return self.support_inputs

    @property
    def targets(self) -> Tensor:
        """(T, n_support, *target) of the support pass; class indices of -100 count for nothing."""
        return self._of_forward("targets", self.support_targets)

    @overload
    def forward(
        self, parameters: Parameters, part: Literal["support"] = "support"
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, parameters: Parameters, part: Literal["query"]) -> Tensor: ...
    def forward(
        self, parameters: Parameters, part: Part = "support"
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Run the model once more, with other values; `transform_parameters` of all plugins apply.

        Args:
            parameters: (T, *shape) by name; those left out are this step's.
            part: the examples. Query examples come without their labels.

        Returns:
            Losses (T,), before `transform_inner_losses`, and predictions (T, n_support, *output);
            of query examples the predictions alone.

        Raises:
            RequestError: in `transform_parameters`, which this pass calls itself; query examples in
                a plugin that is not `transductive`; or other names or shapes.
        """
        if part == "query" and not self._owner.transductive:
            raise RequestError(
                f"plugin '{self._owner.name}' reads the query examples in the inner loop, but does "
                "not say that results are transductive: give its class the property transductive"
            )
        losses, predictions = self._passes.forward(self, parameters, part)
        return (losses, predictions) if part == "support" else predictions

    def objective(self, parameters: Parameters) -> Tensor:
        """Return the (T,) losses that the inner loop descends, at other values.

        They are those of `forward` after `transform_inner_losses` of all plugins, where it cannot
        be called.

        Args:
            parameters: as for `forward`.
        """
        return self._passes.objective(self, parameters)

    def gradients(self, losses: Tensor, parameters: Parameters) -> Gradients:
        """Return every task's gradient of its own loss, (T, *shape), of the parameters it reaches.

        Meta-gradients flow through it where this step is of second order; the graph of `losses`
        stays.

        Args:
            losses: (T,), of `forward` or `objective`.
            parameters: what to differentiate with respect to, (T, *shape) by name, as `losses`
                were made with. Of what is not adapted, give `forward` a copy for each task,
                `parameters[name].clone().requires_grad_()`, and differentiate that.

        Raises:
            RequestError: one of `parameters` is one tensor for all tasks, or takes no gradient.
        """
        return self._passes.gradients(self, losses, parameters)

    def by_task(
        self,
        function: Callable[..., Tensor],
        *others: Tensor,
        predictions: Tensor | None = None,
        part: Part = "support",
    ) -> Tensor:
        """Return what `function` gives of predictions, whatever the tasks' sizes.

        Args:
            function: from the predictions (tasks, n, *output) of tasks of one size, without padding
                and without outputs beyond their ways, to (tasks, ...). It is called once for each
                size.
            others: (T, n, ...) each, such as `targets`; `function` gets the rows of these tasks
                too, without padding.
            predictions: (T, n, *output), of `forward`; default: the step's own.
            part: the examples that they are of.

        Raises:
            RequestError: predictions of another number of examples than the part has; or none are
                given where the step has none: before its pass, and of query examples.
        """
        if predictions is None:
            if part == "query":
                raise RequestError(
                    f"plugin '{self._owner.name}' asks by_task for query examples, of which a step "
                    "has no predictions of its own: give predictions=step.forward(parameters, "
                    '"query")'
                )
            predictions = self.predictions
        axis = self.class_axis
        if self.passes is not None:
            check_part(predictions, self.passes.targets(part).shape[1], part, self._owner.name)
            axis = self.passes.class_axis(predictions, self.passes.targets(part))
        return by_size(function, predictions, *others, sizes=self.sizes, part=part, class_axis=axis)

    def task_mean(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Σ_t w[t]·x[t] / T over all tasks of the meta-batch, across ranks too; differentiable.

        Ranks wait for each other here: call it equally often, with equal shapes, for all tasks.

        Args:
            x: (T, ...), a floating dtype.
            weights: (T,), of x's dtype; default: all 1. Cheaper than a product by element.

        Raises:
            RequestError: at evaluation, where tasks must not see each other, unless the plugin is
                transductive; or the plugin does not declare `couples_tasks`.
        """
        if weights is None:
            mean = x.mean(0)
        else:  # one matrix product
            mean = ((weights / len(weights)) @ x.reshape(len(x), -1)).view(x.shape[1:])
        return self.over_ranks(mean)

    def over_ranks(self, mean: Tensor) -> Tensor:
        """Make a mean over this rank's tasks one over all tasks; linear, and its own transpose.

        `task_mean` ends with it. A derivative written by hand calls it once more, on the derivative
        of its result. On one rank it returns what it is given.

        Args:
            mean: of any shape, which is the same on all ranks; they wait for each other.

        Raises:
            RequestError: as of `task_mean`.
        """
        if not self._owner.couples_tasks:
            fault = f"plugin '{self._owner.name}' takes a mean over tasks but does not say so"
            raise RequestError(f"{fault}: set couples_tasks = True on its class, or in its module")
        if not self.training and not self._owner.transductive:
            raise RequestError(
                f"plugin '{self._owner.name}' takes a mean over test tasks, which must not see "
                "each other: use what was stored in training when step.training is False"
            )
        return mean if self.share is None else self.share.mean(mean)

    def keep(self, name: str, tensor: Tensor) -> None:
        """Hand over a statistic; `commit` receives a copy, detached, after the meta-update.

        Keep a mean over tasks, of a floating dtype. Where a batch is computed in parts, by
        `chunk_size` or on several ranks, `commit` receives the mean of theirs, weighted by their
        tasks: a sum, a count or a value for each task would become another one.

        Raises:
            RequestError: it is no tensor of a floating dtype.
        """
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise RequestError(
                f"plugin '{self._owner.name}' keeps '{name}', {_form(tensor)}: keep a mean over "
                "tasks, a tensor of a floating dtype, such as step.task_mean(x)"
            )
        self.statistics.setdefault(self._owner.name, {})[name] = tensor.detach().clone()

    def log(self, name: str, value: Tensor | float) -> None:
        """Log the mean of a value after the meta-update, as PLUGIN.NAME; at evaluation not.

        Args:
            name: of the figure. Of what a meta-iteration logs by one name, the last counts.
            value: of any shape and dtype, or a number; across ranks their mean is logged.

        Raises:
            RequestError: it is no number.
        """
        if not isinstance(value, Tensor | float | int):
            raise RequestError(
                f"plugin '{self._owner.name}' logs '{name}', {_form(value)}: log a tensor or a "
                "number"
            )
        beside = self.support_targets  # a number goes to the tasks' device, as other figures are
        value = torch.as_tensor(value, device=None if beside is None else beside.device)
        if not value.is_floating_point():
            value = value.to(torch.get_default_dtype())
        self.keep(LOGGED + name, value.mean())

    def seen_by(self, owner: Plugin) -> InnerStep:
        """The same step, held by `owner`."""
        return replace(self, owner=owner)

    def _of_forward(self, what: str, value: Tensor | None) -> Tensor:
        if value is None:
            raise RequestError(
                f"plugin '{self._owner.name}' asks for this step's {what} before the forward pass "
                "that makes them: use them in transform_inner_losses, transform_gradients, "
                "transform_learning_rates or update_parameters, or call step.forward"
            )
        return value

    @property
    def _owner(self) -> Plugin:
        assert self.owner is not None, "a step is always given to a plugin through seen_by"
        return self.owner

    @property
    def _passes(self) -> Passes:
        if self.passes is None:
            raise RequestError(
                f"plugin '{self._owner.name}' asks for a pass of the model where none can be made, "
                "as in derivative_order: call it in a hook of the inner loop that has parameters"
            )
        return self.passes


def _form(value: object) -> str:
    """What a value is, for an error."""
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
