"""One inner update of all tasks: their gradients, what plugins make of these, the new weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from metaplug.contract.inner_step import InnerStep
from metaplug.core.inner_loop import InnerLoop
from metaplug.core.model_passes import ModelPasses, Weights
from metaplug.errors import RequestError, RunError, quoted

StepObserver = Callable[[int, Weights, Weights], None]
"""(k, gradients before any plugin changes them, learning rates after all have), by name."""

NO_DERIVATIVE = (
    "has no finite derivative there, such as a root or norm of 0: add a small number inside it"
)
_NO_GRADIENT = (
    f"the loss was finite: an operation of the model, or of a plugin's loss, {NO_DERIVATIVE}"
)


@dataclass(frozen=True)
class InnerUpdate:
    """Updates the weights of the tasks of a batch, the same way at every inner step.

    Attributes:
        observe: called at every update of an evaluation; None for nobody.
    """

    loop: InnerLoop
    passes: ModelPasses
    observe: StepObserver | None = None

    def take(self, fast: Weights, objective: Tensor, step: InnerStep, *, linked: bool) -> Weights:
        """Return the fast weights after one update, with a graph to those before if `linked`."""
        loop, names, watch = self.loop, self.loop.adapted, self.loop.chain.watch
        gradients = self._gradients(fast, objective, step)
        self.passes.look("the gradient of the support loss", gradients, step, _NO_GRADIENT)
        folded = loop.chain.fold("transform_gradients", gradients, step=step)
        # Made anew for each step, and for each name: what a plugin writes in place stays there.
        full = torch.full((len(names),), loop.inner_lr, dtype=loop.dtype, device=loop.device)
        rates = dict(zip(names, full.unbind(), strict=True))
        rates = loop.chain.fold("transform_learning_rates", rates, step=step)
        if self.observe is not None:
            self.observe(step.index, gradients, rates)
        if not linked:
            folded = {name: value.detach() for name, value in folded.items()}
            rates = {name: value.detach() for name, value in rates.items()}
        before = {name: fast[name] for name in names}
        changed = self._updated(before, folded, rates, step)
        if watch is not None:
            watch.update(rates, changed)
        advice = "gradients and rates were finite: lower inner_lr"
        self.passes.look("what the update made of the weights", changed, step, advice)
        if linked:
            return {**fast, **changed}
        loop.optimizer.detach()
        return {**fast, **leaves(changed, names)}

    def _updated(
        self, before: Weights, gradients: Weights, rates: Weights, step: InnerStep
    ) -> Weights:
        """Return the adapted weights after a plugin's update, or that of the inner optimizer."""
        loop, answer = self.loop, None
        if links := loop.chain.links("update_parameters"):
            answer = loop.chain.choose(
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
            by = quoted(link.plugin.name for link in links)
            raise RequestError(
                f"plugin {by} makes the inner update itself, so the inner optimizer "
                f"'{loop.optimizer.name}' and its settings would do nothing: leave them out"
            )
        return differentiable({name: answer[name] for name in before})

    def _gradients(self, fast: Weights, objective: Tensor, step: InnerStep) -> Weights:
        """Return every task's own gradient of its objective, (T, *shape) by name."""
        loop = self.loop
        if loop.first_order_only and step.training and step.second_order:
            raise RunError(
                "second-order meta-gradients cannot be had of this model (one of its operations is "
                "marked once_differentiable): add the plugin derivative-order"
            )
        adapted = {name: fast[name] for name in loop.adapted}
        gradients = self.passes.differentiate(objective, adapted, step, retain=False)
        if not gradients:
            raise RunError(
                f"no gradient reaches the adapted parameters {quoted(loop.adapted[:3])}: "
                "the loss does not depend on them; adapt others"
            )
        return gradients


def differentiable(values: Weights) -> dict[str, Tensor]:
    """The same values, made by a plugin, as variables of their own.

    Where it made one of another, the gradient of the other would include the way through the first:
    a view is a node that only what is computed of it reaches. A graph begins at those without one.
    """
    return {
        name: value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        for name, value in values.items()
    }


def leaves(values: Weights, adapted: Collection[str]) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_(name in adapted) for name, value in values.items()}
