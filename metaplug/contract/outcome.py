"""The result of adapting a batch of tasks, as the hooks of the outer loop see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from metaplug.contract.inner_step import InnerStep, Passes
from metaplug.contract.plugin import Plugin
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_sizes import Part
from metaplug.contract.values import Gradients, Parameters


@dataclass(frozen=True)
class Outcome:
    """The result of adapting a batch of tasks.

    Attributes:
        batch: the tasks.
        initial_parameters: what every task started from, (T, *shape) each.
        adapted_parameters: the fast weights after the last update, (T, *shape) each, all of them.
        support_losses: K tensors (T,), before `transform_inner_losses`; the k-th before update k.
        query_losses: those that count, (T,) each, by the number of updates before (1 … K, or 0);
            without their weights, and before `transform_outer_losses`.
        query_predictions: (T, n_query, *output) of the last query pass, detached.
        query_parameters: of the last query pass, after `transform_parameters`.
        statistics: what plugins kept, by plugin and name.
        adapted: the names of what the inner loop updated: parameters, and PLUGIN.NAME of the
            plugins' task parameters.
        model_parameters: what tasks share, before `initialize_parameters`: the model's parameters
            and the starts of task parameters, by name, without a task axis.
        derivative_orders: of the K steps; empty at evaluation.
        last: the last step, which `forward` and `objective` go by.
        again: computes the outer loss anew, for `outer_loss`.
        outer_losses: (T,), after `transform_outer_losses` of all plugins: the outer loss is their
            mean. For `compute_meta_gradients`; None before, and at evaluation.

    Example, in a hook of the outer loop of a model that is one linear layer:

    >>> from metaplug.learner import MetaLearner
    >>> def transform_outer_losses(losses, outcome):
    ...     before, _ = outcome.forward(outcome.initial_parameters)
    ...     return losses + 0 * before
    >>> learner = MetaLearner(torch.nn.Linear(2, 3), plugins=[transform_outer_losses])
    >>> x, y = torch.ones(2, 4, 2), torch.zeros(2, 4, dtype=torch.int64)
    >>> sorted(learner.meta_gradients(TaskBatch(x, y, x, y)))
    ['bias', 'weight']
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
    model_parameters: Parameters = field(default_factory=dict)
    derivative_orders: tuple[int, ...] = ()
    last: InnerStep | None = None
    again: Callable[[Parameters], Tensor] | None = None
    outer_losses: Tensor | None = None

    def forward(
        self, parameters: Parameters, part: Part = "query", *, index: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the model once more; `transform_parameters` of all plugins apply.

        Args:
            parameters: (T, *shape) by name; those left out are the adapted ones.
            part: the examples.
            index: of the inner step whose values plugins use; default: the last.

        Returns:
            Losses (T,) and predictions (T, n, *output).
        """
        step = self._step if index is None else replace(self._step, index=index)
        return self._passes.forward(step, parameters, part)

    def objective(self, parameters: Parameters) -> Tensor:
        """Return the (T,) losses that the last inner step descends, at other values.

        They are support losses after `transform_inner_losses` of all plugins.

        Args:
            parameters: as for `forward`.
        """
        return self._passes.objective(self._step, parameters)

    def gradients(self, losses: Tensor, parameters: Parameters) -> Gradients:
        """Return every task's gradient of its own loss, (T, *shape), of the parameters it reaches.

        It can be differentiated again, and the graph of `losses` stays.

        Args:
            losses: (T,), of `forward` or `objective`.
            parameters: (T, *shape) by name, as `losses` were made with.
        """
        return self._passes.gradients(self._step, losses, parameters)

    def outer_loss(self, parameters: Parameters) -> Tensor:
        """Adapt the same tasks once more, from other shared values; return the outer loss, ().

        It is after `transform_outer_losses` of all plugins, and of this rank's tasks. Nothing that
        plugins keep on the way is stored.

        Args:
            parameters: the model's, by name, without a task axis; those left out are its own.
        """
        assert self.again is not None, "the outer loop gives every outcome a way to repeat it"
        return self.again(parameters)

    def by_task(
        self,
        function: Callable[..., Tensor],
        *others: Tensor,
        predictions: Tensor,
        part: Part = "query",
    ) -> Tensor:
        """Return what `function` gives of predictions, as `InnerStep.by_task` does.

        Args:
            function: from the predictions (tasks, n, *output) of tasks of one size, without padding
                and without outputs beyond their ways, to (tasks, ...). It is called once for each
                size.
            others: (T, n, ...) each, such as `batch.query_y`; `function` gets the rows of these
                tasks too, without padding.
            predictions: (T, n, *output), of `forward`, which can be differentiated.
            part: the examples that they are of.

        Raises:
            RequestError: predictions of another number of examples than the part has.
        """
        return self._step.by_task(function, *others, predictions=predictions, part=part)

    @property
    def meta_iteration(self) -> int:
        """The meta-iteration, counted from 0."""
        return self._step.meta_iteration

    @property
    def meta_iterations(self) -> int:
        """The meta-iterations of the whole run; 0 where none has begun."""
        return self._step.meta_iterations

    @property
    def class_axis(self) -> int | None:
        """The axis of classes in predictions, as of `InnerStep`."""
        return self._step.class_axis

    def task_mean(self, x: Tensor) -> Tensor:
        """Take the mean over all tasks of the meta-batch, as `InnerStep.task_mean` does.

        Args:
            x: (T, ...), or a mean over this rank's tasks, expanded.
        """
        return self._step.task_mean(x)

    def keep(self, name: str, tensor: Tensor) -> None:
        """Hand over a statistic, as `InnerStep.keep` does."""
        self._step.keep(name, tensor)

    def log(self, name: str, value: Tensor | float) -> None:
        """Log the mean of a value after the meta-update, as `InnerStep.log` does."""
        self._step.log(name, value)

    def seen_by(self, owner: Plugin) -> Outcome:
        """The same outcome, held by `owner`."""
        return self if self.last is None else replace(self, last=self.last.seen_by(owner))

    @property
    def _step(self) -> InnerStep:
        assert self.last is not None, "the inner loop gives every outcome its last step"
        return self.last

    @property
    def _passes(self) -> Passes:
        assert self._step.passes is not None, "the inner loop gives every step its passes"
        return self._step.passes
