"""Wrong in numbers and derivatives."""

import torch
from torch import nn

from metaplug import Plugin, hookimpl


class WorksInFloat32Only(Plugin):
    """A matrix whose dtype is torch's default, not the model's."""

    caught_by = "finite"
    says = "in float64: "

    @hookimpl
    def transform_gradients(self, gradients):
        return {
            name: (gradient.flatten(1) @ torch.eye(gradient[0].numel())).view_as(gradient)
            for name, gradient in gradients.items()
        }


class OverflowsInFloat32(Plugin):
    """Scales up and down again."""

    caught_by = "finite"
    says = "returned NaN or Inf in"

    @hookimpl
    def transform_gradients(self, gradients):
        return {name: gradient * 1e30 * 1e30 / 1e30 / 1e30 for name, gradient in gradients.items()}


class DividesByANorm(Plugin):
    """The direction of a gradient of zero."""

    caught_by = "finite-at-zero"
    says = (
        "where every loss is 0 (in float32): bound from below what you divide by or take the "
        "root of"
    )

    @hookimpl
    def transform_gradients(self, gradients):
        norms = {
            name: gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.dim() - 1))
            for name, gradient in gradients.items()
        }
        return {name: gradient / norms[name] for name, gradient in gradients.items()}


class TakesARoot(Plugin):
    """Finite itself, with a derivative that is not."""

    caught_by = "finite-at-zero"
    says = (
        "the gradient of the support loss holds NaN or Inf in '0.weight', '0.bias', '2.weight' "
        "of task 0 in iteration 1, inner step 1 "
        "where every loss is 0"
    )

    @hookimpl
    def transform_inner_losses(self, losses, step):
        moved = sum(
            (step.parameters[name] - start).flatten(1).square().sum(1)
            for name, start in step.initial_parameters.items()
        )
        return losses + 0.1 * moved.sqrt() if step.index else None


class LooksForAGraph(Plugin):
    """Lets a value depend on whether it has a graph, which in first order it has not."""

    caught_by = "first-order"
    says = "in first and in second order"

    @hookimpl
    def transform_gradients(self, gradients):
        return {
            name: gradient * (2 if gradient.requires_grad else 1)
            for name, gradient in gradients.items()
        }


class ReadsBackItsStatistics(Plugin):
    """Reads what it kept in the step before, which is not there in a recomputed step."""

    caught_by = "recomputed"
    says = "with checkpoint_steps=1"

    @hookimpl
    def transform_gradients(self, gradients, step):
        earlier = step.statistics.get(self.name, {})
        step.keep("done", torch.tensor(1.0))
        return (
            {
                name: gradient / 2 if earlier else gradient * 1
                for name, gradient in gradients.items()
            }
            if step.training
            else None
        )


class NeverLearns(Plugin):
    """A meta-parameter that is used, and detached by accident."""

    caught_by = "meta-parameters-learn"
    says = "no meta-gradient reaches its meta-parameter 'never-learns.scale'"

    @hookimpl
    def setup(self, context):
        self.scale = nn.Parameter(torch.full((), 0.5, dtype=context.dtype, device=context.device))

    @hookimpl
    def transform_gradients(self, gradients):
        return {name: gradient * self.scale.data for name, gradient in gradients.items()}


class NeverPullsInTheFirstStep(Plugin):
    """A pull to the start for each inner step, of which the first is zero whatever it weighs."""

    caught_by = "meta-parameters-learn"
    says = "never-pulls-in-the-first-step.mu[0] never receives a gradient in a loop of 3 inner"

    @hookimpl
    def setup(self, context):
        slots = max(context.inner_steps, 1)
        self.mu = nn.Parameter(torch.full((slots,), 0.1, **context.factory_kwargs))

    @hookimpl
    def transform_gradients(self, gradients, step):
        now, start, mu = step.parameters, step.initial_parameters, self.mu[step.slot]
        return {name: each + mu * (now[name] - start[name]) for name, each in gradients.items()}


class DetachesTheGradient(Plugin):
    """First order by accident."""

    caught_by = "meta-gradients"
    says = "but the meta-gradient says"

    @hookimpl
    def transform_gradients(self, gradients):
        return {name: gradient.detach() * 0.5 for name, gradient in gradients.items()}


class DetachesAFactor(Plugin):
    """Its meta-parameter learns, but along half of its way only."""

    caught_by = "meta-gradients"
    says = "along a random direction of 'detaches-a-factor.scale'"

    @hookimpl
    def setup(self, context):
        self.scale = nn.Parameter(torch.full((), 0.5, dtype=context.dtype, device=context.device))

    @hookimpl
    def transform_gradients(self, gradients):
        return {
            name: gradient * self.scale * self.scale.detach()
            for name, gradient in gradients.items()
        }
