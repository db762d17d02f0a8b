"""Wrong between tasks."""

import torch
from torch import nn

from metaplug import Plugin, TaskBatch, hookimpl


class WeighsTasksByTheirPlace(Plugin):
    """The first task counts once, the second twice, ..."""

    caught_by = "task-permutation"
    says = "so that a task's place decides"

    @hookimpl
    def transform_inner_losses(self, losses):
        return losses * torch.arange(1, len(losses) + 1, device=losses.device)


class FollowsTheFirstTask(Plugin):
    """Declared as coupling, but all tasks follow the one that happens to come first."""

    caught_by = "task-permutation"
    says = "so that a task's place decides"
    couples_tasks = True

    @hookimpl
    def transform_gradients(self, gradients, step):
        return (
            {name: (gradient + gradient[:1]) / 2 for name, gradient in gradients.items()}
            if step.training
            else None
        )


class SharesUndeclared(Plugin):
    """A plain mean over axis 0."""

    caught_by = "tasks-apart"
    says = (
        "when the other tasks of the batch are replaced, and the plugin does not say that it "
        "couples tasks"
    )

    @hookimpl
    def transform_gradients(self, gradients, step):
        return (
            {name: (gradient + gradient.mean(0)) / 2 for name, gradient in gradients.items()}
            if step.training
            else None
        )


class CountsTasks(Plugin):
    """Keeps a sum over tasks, where parts of a batch would be averaged."""

    caught_by = "tasks-apart"
    says = "keep a mean over tasks, which is the mean of its parts, no sum and no count"

    @hookimpl
    def setup(self, context):
        self.register_buffer("seen", torch.ones((), **context.factory_kwargs))

    @hookimpl
    def transform_inner_losses(self, losses, step):
        step.keep("seen", losses.new_full((), len(losses)))
        return losses / self.seen

    @hookimpl
    def commit(self, kept):
        self.seen.add_(kept["seen"])


class NormalisesOverTasks(Plugin):
    """A norm over axis 0 that should have been over the weights of each task."""

    caught_by = "tasks-apart"
    says = "when the other tasks of the batch are replaced"

    @hookimpl
    def transform_gradients(self, gradients):
        return {
            name: gradient / gradient.norm(dim=0, keepdim=True).clamp_min(1e-6)
            for name, gradient in gradients.items()
        }


class DecidesForAllTasks(Plugin):
    """A Python branch on the value of a tensor: one large loss halves the gradients of all."""

    caught_by = "tasks-apart"
    says = "when the other tasks of the batch are replaced"

    @hookimpl
    def transform_inner_losses(self, losses):
        return losses / 2 if losses.max() > 1.2 else None


class SharesOuterLosses(Plugin):
    """Weighs the outer losses by how hard the tasks are for each other."""

    caught_by = "tasks-apart"
    says = "the outer loss of task 0"

    @hookimpl
    def transform_outer_losses(self, losses):
        return losses * len(losses) * losses.softmax(0)


class LooksAtOtherTestTasks(Plugin):
    """Declared as coupling, and couples test tasks too, past step.task_mean."""

    caught_by = "test-tasks-apart"
    says = "which must not see each other"
    couples_tasks = True

    @hookimpl
    def transform_gradients(self, gradients):
        return {name: (gradient + gradient.mean(0)) / 2 for name, gradient in gradients.items()}


class AveragesPaddingBehindAZero(Plugin):
    """A mean over all rows of the predictions, behind an encoder that starts at zero."""

    caught_by = "unequal-sizes"
    says = "at evaluation, alone and beside a task of more examples"

    @hookimpl
    def setup(self, context):
        form = {"dtype": context.dtype, "device": context.device}
        self.encoder = nn.Parameter(torch.zeros(3, 3, **form))

    @hookimpl
    def initialize_parameters(self, parameters, step):
        mean = step.forward(parameters)[1].mean(1)
        return {**parameters, "2.bias": parameters["2.bias"] + mean @ self.encoder.T}


class AveragesPaddedQueries(Plugin):
    """A mean over all rows of the query predictions, in the outer loss alone."""

    caught_by = "unequal-sizes"
    says = "of two tasks of unequal size together and as the mean of each alone"

    @hookimpl
    def transform_outer_losses(self, losses, outcome):
        return losses + 0.1 * outcome.forward({})[1].square().mean((1, 2))


class ForgetsSizes(Plugin):
    """Makes tasks anew, whose padding would count."""

    caught_by = "unequal-sizes"
    says = "returned a batch without the sizes of its tasks"

    @hookimpl
    def transform_tasks(self, batch):
        return TaskBatch(1.1 * batch.support_x, batch.support_y, batch.query_x, batch.query_y)


class SharesBehindAZero(Plugin):
    """Pulls each start to the mean of the tasks', behind a gate that starts at zero."""

    caught_by = "tasks-apart"
    says = "when the other tasks of the batch are replaced"

    @hookimpl
    def setup(self, context):
        self.gate = nn.Parameter(torch.zeros((), dtype=context.dtype, device=context.device))

    @hookimpl
    def transform_gradients(self, gradients):
        return {
            name: gradient + self.gate * gradient.mean(0) for name, gradient in gradients.items()
        }


class ReadsTheBatching(Plugin):
    """Longer gradients where the engine stacks tasks, which is a choice of speed."""

    caught_by = "vectorized-equals-sequential"
    says = "vectorised and sequential"

    @hookimpl
    def transform_gradients(self, gradients, step):
        factor = 1.1 if step.passes.loop.vectorized else 1.0
        return {name: factor * gradient for name, gradient in gradients.items()}
