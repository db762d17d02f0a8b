"""Proto-MAML: the head of every task starts from the prototypes of its classes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from metaplug import Context, InnerStep, Parameters, Plugin, PluginConfig, RequestError, hookimpl


class ProtoMaml(Plugin):
    """Start the last linear layer of every task as a prototypical network's classifier.

        p[c] = mean of the features of the support examples of class c
        weight[c] = 2 p[c],   bias[c] = −‖p[c]‖²        so logits are ‖h‖² − ‖h − p[c]‖²

    Meta-gradients flow through p to the body. Where a task has no example of a class, or fewer
    classes, the model's own row stays. Soft labels weigh the examples of a mean. Features are found
    as derivatives by the head, which are exact as long as the output is linear in it: another
    output, as of a log_softmax, is refused.

    Source: Triantafillou et al. 2020 (arXiv 1903.03096), section 3; their results are of the first
    order, by the plugin derivative-order.
    """

    class Config(PluginConfig):
        """Where the head is."""

        head: str | None = Field(
            None, description="Name of the linear layer; null: the last of the model."
        )

    config: Config

    @hookimpl
    def setup(self, context: Context) -> None:
        if context.kind != "classification":
            raise RequestError(
                f"plugin '{self.name}' starts a head from the mean features of classes, and "
                f"{context.kind} has none: leave it out, or use classification"
            )
        linear = [
            name.removesuffix("weight")
            for name, layer in context.layers.items()
            if issubclass(layer, nn.Linear) and name.rpartition(".")[2] == "weight"
        ]
        head = self.config.head
        chosen = [each for each in linear if head in (None, each.removesuffix("."))]
        if not chosen or f"{chosen[-1]}bias" not in context.shapes:
            named = "the last linear layer" if head is None else f"'{head}'"
            raise RequestError(
                f"plugin '{self.name}' needs a linear head with a trainable weight and bias, which "
                f"{named} is not: name one by head, or give the layer bias=True"
            )
        self._head = f"{chosen[-1]}weight", f"{chosen[-1]}bias"
        self.squared_length: Tensor
        self.register_buffer(
            "squared_length", torch.zeros((), dtype=context.dtype, device=context.device)
        )

    @hookimpl
    def initialize_parameters(self, parameters: Parameters, step: InnerStep) -> Parameters:
        weight, bias = self._head
        head = {name: torch.zeros_like(parameters[name]).requires_grad_() for name in self._head}
        _, logits = step.forward(head)
        labels, classes = step.targets, head[bias].shape[1]
        if logits.shape[2:] != (classes,):
            raise RequestError(
                f"plugin '{self.name}' needs the {classes} outputs of '{weight}' for an example, "
                f"and the model gives {tuple(logits.shape[2:])}: name its last linear layer by head"
            )
        if not labels.is_floating_point():  # -100, as of padding, is no class
            labels = labels.unsqueeze(2) == torch.arange(classes, device=labels.device)
        total, variables = (logits * labels).sum(), list(head.values())
        taken = _gradients(total, variables, graph=True)
        found = [each for each in taken if each is not None]
        if len(found) < 2 or any(
            again is not None for each in found for again in _gradients(each.sum(), variables)
        ):
            raise RequestError(
                f"plugin '{self.name}' needs the output of '{weight}' as it is, and that of the "
                "model is not linear in it, as after a log_softmax: return logits, or name the "
                "last linear layer by head"
            )
        sums, counts = found
        present = counts != 0
        means = sums / torch.where(present, counts, 1).unsqueeze(2)
        squares = means.square().sum(2)
        step.keep("squared_length", (squares.sum(1) / present.sum(1).clamp(min=1)).mean())
        return {
            **parameters,
            weight: torch.where(present.unsqueeze(2), 2 * means, parameters[weight]),
            bias: torch.where(present, -squares, parameters[bias]),
        }

    @hookimpl
    def commit(self, kept: Mapping[str, Tensor]) -> None:
        self.squared_length.copy_(kept["squared_length"])

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        return {"squared_length": float(self.squared_length)}


def _gradients(
    total: Tensor, variables: list[Tensor], *, graph: bool = False
) -> tuple[Tensor | None, ...]:
    if not total.requires_grad:
        return (None,) * len(variables)
    return torch.autograd.grad(
        total, variables, retain_graph=True, create_graph=graph, allow_unused=True
    )
