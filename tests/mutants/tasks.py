"""Wrong between tasks."""

import torch

from metaplug import Plugin, hookimpl


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


class DrawsByStrides(Plugin):
    """Noise whose numbers follow the layout of memory, which differs with the batching."""

    caught_by = "vectorized-equals-sequential"
    says = "vectorised and sequential"
    exceptions = {"task-permutation": "its numbers follow a task's place"}

    @hookimpl
    def transform_gradients(self, gradients, step):
        return (
            {
                name: gradient + 0.1 * torch.randn_like(gradient)
                for name, gradient in gradients.items()
            }
            if step.training
            else None
        )
