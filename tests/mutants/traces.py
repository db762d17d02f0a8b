"""Wrong in a traced step, which freezes what Python decided."""

import torch

from metaplug import Plugin, hookimpl


def _memory(value):
    """A place that is no attribute: how to read it, and how to write it."""
    held = [value]
    return lambda: held[0], lambda new: held.__setitem__(0, new)


class RemembersInAClosure(Plugin):
    """Anneals by a number that stands where nobody can look for it."""

    caught_by = "traced-equals-eager"
    says = "in iteration 2 of a compiled step and of an eager one"

    @hookimpl
    def setup(self):
        self.read, self.write = _memory(1.0)

    @hookimpl
    def transform_inner_losses(self, losses, step):
        step.keep("loss", losses.mean())
        return losses * self.read()

    @hookimpl
    def commit(self, kept):
        self.write(self.read() / 2)


class BranchesOnTheIteration(Plugin):
    """Warms up in the first iteration."""

    @hookimpl
    def transform_gradients(self, gradients, step):
        factor = 0.5 if step.meta_iteration == 0 else 1.5
        return {name: gradient * factor for name, gradient in gradients.items()}


class StartsByTheIteration(Plugin):
    """Warms its starts up."""

    @hookimpl
    def initialize_parameters(self, parameters, step):
        factor = 0.5 if step.meta_iteration == 0 else 1.5
        return {name: value * factor for name, value in parameters.items()}


class RemembersWhatItUpdates(Plugin):
    """A rate that grows in Python."""

    @hookimpl
    def setup(self):
        self.rates = [0.1]

    @hookimpl
    def update_parameters(self, parameters, gradients, step):
        step.keep("loss", step.losses.mean())
        return {name: parameters[name] - self.rates[-1] * gradients[name] for name in parameters}

    @hookimpl
    def commit(self, kept):
        self.rates.append(self.rates[-1] * 2)


class LooksUpTheIteration(Plugin):
    """A schedule as a list."""

    @hookimpl
    def transform_gradients(self, gradients, step):
        factor = [0.5, 1.5, 2.0, 3.0][step.meta_iteration]
        return {name: gradient * factor for name, gradient in gradients.items()}


class RemembersInAList(Plugin):
    """A list whose last entry counts."""

    @hookimpl
    def setup(self):
        self.factors = [0.5]

    @hookimpl
    def transform_inner_losses(self, losses, step):
        step.keep("loss", losses.mean())
        return losses * self.factors[-1]

    @hookimpl
    def commit(self, kept):
        self.factors.append(self.factors[-1] * 2)


class RemembersInATensor(Plugin):
    """A running mean that is no buffer."""

    @hookimpl
    def setup(self, context):
        self.memory = torch.ones((), dtype=context.dtype, device=context.device)

    @hookimpl
    def transform_inner_losses(self, losses, step):
        step.keep("loss", losses.mean())
        return losses * self.memory

    @hookimpl
    def commit(self, kept):
        self.memory = kept["loss"]


FROZEN = [
    BranchesOnTheIteration,
    StartsByTheIteration,
    RemembersWhatItUpdates,
    LooksUpTheIteration,
    RemembersInAList,
    RemembersInATensor,
]
"""Plugins whose steps must not be traced: refused by name where that is seen, else caught."""
