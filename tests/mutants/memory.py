"""Wrong in what they write and remember."""

import random

import torch
from torch import Tensor

from metaplug import Plugin, hookimpl

_SEEN: dict[str, Tensor] = {}


class WritesIntoItsInput(Plugin):
    """Clips in place."""

    caught_by = "no-mutation"
    says = "transform_gradients (iteration 1, inner step 0) wrote into gradients['0.weight']"

    @hookimpl
    def transform_gradients(self, gradients):
        return {name: gradient.clamp_(-0.1, 0.1) for name, gradient in gradients.items()}


class WritesThroughAView(Plugin):
    """Scales a flat view of each gradient, and returns nothing."""

    caught_by = "no-mutation"
    says = "wrote into gradients['"

    @hookimpl
    def transform_gradients(self, gradients):
        for gradient in gradients.values():
            gradient.flatten(1)[:, :1].mul_(0.5)


class WritesIntoTheMapping(Plugin):
    """Puts its gradient where the old one was."""

    caught_by = "no-mutation"
    says = (
        "tried to write into what it was given (TypeError: 'mappingproxy' object does not "
        "support item assignment)"
    )

    @hookimpl
    def transform_gradients(self, gradients):
        for name in gradients:
            gradients[name] = gradients[name] * 0.5
        return gradients


class WritesIntoTheModel(Plugin):
    """Decays the model's own weights by .data, which autograd does not notice."""

    caught_by = "no-mutation"
    says = "wrote into the model's parameter '0.weight'"

    @hookimpl
    def setup(self, context):
        self._weights = dict(context.parameters)

    @hookimpl
    def transform_meta_gradients(self, gradients):
        for weight in self._weights.values():
            weight.data.mul_(0.99)


class WritesTheGrad(Plugin):
    """Leaves its gradient in .grad, from which an optimizer would take it."""

    caught_by = "no-mutation"
    says = "wrote into the .grad of the model's parameter '0.weight'"

    @hookimpl
    def transform_gradients(self, gradients, step):
        for name, gradient in gradients.items():
            if step.training:
                step.initial_parameters[name]._base.grad = gradient.detach().mean(0)


class WritesIntoTheRates(Plugin):
    """Halves the learning rates in place, and with them those of every later step."""

    caught_by = "no-mutation"
    says = (
        "transform_learning_rates (iteration 1, inner step 0) wrote into learning_rates['0.weight']"
    )

    @hookimpl
    def transform_learning_rates(self, learning_rates):
        for rate in learning_rates.values():
            rate.mul_(0.5)


class RemembersInTheLoop(Plugin):
    """A running mean that is updated in the step itself."""

    caught_by = "no-state-in-loop"
    says = "transform_inner_losses (iteration 1, inner step 0) changed self.mean"

    @hookimpl
    def setup(self, context):
        self.register_buffer("mean", torch.zeros((), dtype=context.dtype))

    @hookimpl
    def transform_inner_losses(self, losses):
        self.mean = 0.9 * self.mean + 0.1 * losses.detach().mean()
        return losses * (1 + self.mean)


class CountsItsCalls(Plugin):
    """An annealing that follows how often a hook was called."""

    caught_by = "no-state-in-loop"
    says = "changed self.calls"

    @hookimpl
    def setup(self):
        self.calls = 0

    @hookimpl
    def transform_inner_losses(self, losses):
        self.calls += 1
        return losses / self.calls


class DrawsUnseeded(Plugin):
    """Noise from Python's random numbers."""

    caught_by = "deterministic"
    says = "of two learners of one seed"

    @hookimpl
    def transform_inner_losses(self, losses):
        return losses * (1 + random.random())


class RemembersTestTasks(Plugin):
    """What it sees at evaluation, in a place outside the plugin, is used in training."""

    caught_by = "evaluation-leaves-no-trace"
    says = "of two learners that differ in what they were evaluated on before"

    @hookimpl
    def transform_inner_losses(self, losses, step):
        if not step.training:
            _SEEN["losses"] = losses.detach().mean()
            return None
        return losses * (1 + _SEEN["losses"]) if "losses" in _SEEN else losses


class DrawsAtEvaluation(Plugin):
    """Numbers from a stream of the caller's, which a validation moves."""

    caught_by = "evaluation-leaves-no-trace"
    says = "an evaluation moves the random numbers of random, which are the caller's"

    @hookimpl
    def transform_inner_losses(self, losses, step):
        if not step.training:
            random.random()
        return losses * 2


class ForgetsWhenLoaded(Plugin):
    """A statistic in a plain attribute, which is in no checkpoint."""

    caught_by = "checkpoint"
    exceptions = {"traced-equals-eager": "a trace freezes such a statistic too"}
    says = "of the learner that was loaded and the one that was saved"

    @hookimpl
    def setup(self, context):
        self.mean = torch.zeros((), dtype=context.dtype)

    @hookimpl
    def transform_inner_losses(self, losses, step):
        step.keep("mean", losses.detach().mean())
        return losses * (1 + self.mean)

    @hookimpl
    def commit(self, kept):
        self.mean = kept["mean"]
