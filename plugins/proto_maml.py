"""Proto-MAML: the head of every task starts from the prototypes of its classes."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from metaplug import Context, InnerStep, Parameters, Plugin, PluginConfig, RequestError, hookimpl


class ProtoMaml(Plugin):
    """Start the last linear layer of every task as a prototypical network's classifier.

        p[c] = mean of the features of the support examples of class c
        weight[c] = 2 p[c],   bias[c] = −‖p[c]‖²        so logits are ‖h‖² − ‖h − p[c]‖²

    Meta-gradients flow through p to the body. The rows of classes without examples stay the
    model's. Features are derivatives by the head, exact where the output is linear in it.

    Source: Triantafillou et al. 2020 (arXiv 1903.03096), section 3; their results are first-order.
    """

    class Config(PluginConfig):
        """Where the head is."""

        head: str | None = Field(None, description="Name of a linear layer; null: the last.")

    config: Config

    @hookimpl
    def setup(self, context: Context) -> None:
        linear = context.layers_of(nn.Linear)
        head = self.config.head or next(reversed(linear), "the last linear layer")
        weight, bias = linear.get(head, (None, None))
        if context.kind != "classification" or weight is None or bias is None:
            raise RequestError(
                f"plugin '{self.name}' starts a classifier that is a linear layer with a trainable "
                f"weight and bias, and '{head}' in {context.kind} is none: name one by head"
            )
        self._head = weight, bias

    @hookimpl
    def initialize_parameters(self, parameters: Parameters, step: InnerStep) -> Parameters:
        weight, bias = self._head
        head = {name: torch.zeros_like(parameters[name]).requires_grad_() for name in self._head}
        labels, logits = step.targets, step.forward(head)[1]
        classes = torch.arange(head[bias].shape[1], device=labels.device)
        if logits.shape[2:] != classes.shape:
            raise self._refused(f"has the form {tuple(logits.shape[2:])}")
        if not labels.is_floating_point():  # -100, as of padding, is no class
            labels = labels.unsqueeze(2) == classes
        found = _gradients((logits * labels).sum(), head)
        if len(found) < 2 or any(_gradients(each.sum(), head) for each in found):
            raise self._refused("is not linear in it")
        sums, counts = found
        present = counts != 0
        means = sums / torch.where(present, counts, 1).unsqueeze(2)
        squares = means.square().sum(2)
        step.log("squared_length", squares.sum(1) / present.sum(1).clamp(min=1))
        return {
            **parameters,
            weight: torch.where(present.unsqueeze(2), 2 * means, parameters[weight]),
            bias: torch.where(present, -squares, parameters[bias]),
        }

    def _refused(self, why: str) -> RequestError:
        return RequestError(
            f"plugin '{self.name}' needs the output of '{self._head[0]}' as it is, and that of the "
            f"model {why}: return logits, or name the last linear layer by head"
        )


def _gradients(total: Tensor, head: dict[str, Tensor]) -> list[Tensor]:
    """Those of the head that `total` depends on."""
    if not total.requires_grad:
        return []
    found = torch.autograd.grad(total, [*head.values()], create_graph=True, allow_unused=True)
    return [each for each in found if each is not None]
