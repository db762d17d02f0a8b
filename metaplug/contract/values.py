"""Values that pass through the hooks: T tasks in a batch, K inner steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from metaplug.contract.plugin import Plugin
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_groups import by_size
from metaplug.contract.task_sizes import TaskSize
from metaplug.errors import RequestError

Kind: TypeAlias = Literal["classification", "regression"]

Gradients: TypeAlias = Mapping[str, Tensor]
"""Read-only, by name of an adapted parameter that received a gradient, (T, *parameter.shape)."""

Parameters: TypeAlias = Mapping[str, Tensor]
"""Read-only, by the model's own parameter name, each (T, *parameter.shape)."""

LearningRates: TypeAlias = Mapping[str, Tensor]
"""Read-only, by adapted parameter name, each broadcastable to (T, *parameter.shape)."""


class TaskShare(Protocol):
    """This rank's share of a meta-batch, and the mean over ranks."""

    @property
    def weight(self) -> float: ...
    def mean(self, x: Tensor) -> Tensor: ...


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
        parameters: the fast weights of this forward pass, all parameters of the model.
        initial_parameters: the weights that every task started from.
        sizes: of each task, where they differ; predictions are padded with zeros beyond them.
        class_axis: of `predictions`: that of classes, or the first of outputs that have a target
            each; None elsewhere.

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
    def losses(self) -> Tensor:
        """(T,) support losses, before `transform_inner_losses`."""
        return self._of_forward("losses", self.support_losses)

    @property
    def predictions(self) -> Tensor:
        """(T, n_support, *output) of the support pass; logits in classification."""
        return self._of_forward("predictions", self.support_predictions)

    @property
    def targets(self) -> Tensor:
        """(T, n_support, *target) of the support pass; class indices of -100 count for nothing."""
        return self._of_forward("targets", self.support_targets)

    def by_task(self, function: Callable[..., Tensor], *others: Tensor) -> Tensor:
        """Return what `function` gives of the support predictions, whatever the tasks' sizes.

        Args:
            function: from the predictions (tasks, n_support, *output) of tasks of one size, without
                padding and without outputs beyond their ways, to (tasks, ...). It is called once
                for each size.
            others: (T, n_support, ...) each, such as `targets`; `function` gets the rows of these
                tasks too, without padding.
        """
        form: dict[str, Any] = {"sizes": self.sizes, "class_axis": self.class_axis}
        return by_size(function, self.predictions, *others, part="support", **form)

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
        if not self._owner.couples_tasks:
            fault = f"plugin '{self._owner.name}' takes a mean over tasks but does not say so"
            raise RequestError(f"{fault}: set couples_tasks = True on its class, or in its module")
        if not self.training and not self._owner.transductive:
            raise RequestError(
                f"plugin '{self._owner.name}' takes a mean over test tasks, which must not see "
                "each other: use what was stored in training when step.training is False"
            )
        if weights is None:
            mean = x.mean(0)
        else:  # one matrix product
            mean = ((weights / len(weights)) @ x.reshape(len(x), -1)).view(x.shape[1:])
        return mean if self.share is None else self.share.mean(mean)

    def keep(self, name: str, tensor: Tensor) -> None:
        """Hand over a statistic, detached; `commit` receives it by this name after the meta-update.

        Across ranks it receives the mean weighted by their tasks: keep a mean over tasks, a float.
        """
        self.statistics.setdefault(self._owner.name, {})[name] = tensor.detach()

    def seen_by(self, owner: Plugin) -> InnerStep:
        """The same step, held by `owner`."""
        return replace(self, owner=owner)

    def _of_forward(self, what: str, value: Tensor | None) -> Tensor:
        if value is None:
            raise RequestError(
                f"plugin '{self._owner.name}' asks for this step's {what} in transform_parameters, "
                "before the forward pass that makes them: use them in transform_inner_losses, "
                "transform_gradients or transform_learning_rates"
            )
        return value

    @property
    def _owner(self) -> Plugin:
        assert self.owner is not None, "a step is always given to a plugin through seen_by"
        return self.owner


@dataclass(frozen=True)
class Outcome:
    """The result of adapting a batch of tasks.

    Attributes:
        batch: the tasks.
        initial_parameters: what every task started from, (T, *shape) each.
        adapted_parameters: the fast weights after the last update, (T, *shape) each, all of them.
        support_losses: K tensors (T,), before `transform_inner_losses`; the k-th before update k.
        query_losses: those that count, (T,) each, by the number of updates before (1 … K, or 0).
        query_predictions: (T, n_query, *output) of the last query pass, detached.
        query_parameters: of the last query pass, after `transform_parameters`.
        statistics: what plugins kept, by plugin and name.
        adapted: the names of the parameters that the inner loop updated.
    """

    batch: TaskBatch
    initial_parameters: Parameters
    adapted_parameters: Parameters
    support_losses: tuple[Tensor, ...]
    query_losses: Mapping[int, Tensor]
    query_predictions: Tensor
    query_parameters: Parameters
    statistics: Mapping[str, Mapping[str, Tensor]]
    adapted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Context:
    """The run as a plugin sees it when it creates its meta-parameters and buffers.

    Attributes:
        shapes: by name, of every trainable parameter of the model, without the task axis.
        parameters: by name, their values as meta-training begins, detached: copy what you need.
        layers: by name, the class of the module that each belongs to.
        adapted: the names of the parameters that the inner loop adapts, in the model's order.
        dtype, device: of the model's parameters; create yours with both.
        inner_steps: K in training, 0 or more.
        inner_lr: the inner learning rate.
        kind: "classification" or "regression".
        ranks: the processes over which the tasks of a meta-batch are spread.
    """

    shapes: Mapping[str, torch.Size]
    parameters: Mapping[str, Tensor]
    layers: Mapping[str, type[nn.Module]]
    adapted: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    inner_steps: int
    inner_lr: float
    kind: Kind
    ranks: int = 1
