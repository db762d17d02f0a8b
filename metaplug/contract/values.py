"""Values that pass through the hooks: T tasks in a batch, K inner steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

Kind: TypeAlias = Literal["classification", "regression"]

Gradients: TypeAlias = Mapping[str, Tensor]
"""Read-only, by name of an adapted parameter that received a gradient, (T, *parameter.shape)."""

Parameters: TypeAlias = Mapping[str, Tensor]
"""Read-only, (T, *shape) each, by the model's own name, or PLUGIN.NAME of a task parameter."""

LearningRates: TypeAlias = Mapping[str, Tensor]
"""Read-only, by adapted parameter name, each broadcastable to (T, *parameter.shape)."""


def per_task(values: Tensor, like: Tensor) -> Tensor:
    """Give values of each task, (T, ...), the axes to multiply a (T, *shape) tensor.

    >>> per_task(torch.ones(3), torch.ones(3, 4, 5)).shape
    torch.Size([3, 1, 1])
    """
    return values.view(*values.shape, *[1] * (like.dim() - values.dim()))


def task_vectors(tensors: Iterable[Tensor]) -> Tensor:
    """Join tensors (T, *shape) into one vector for each task, (T, n), as for its length.

    >>> task_vectors([torch.ones(3, 4, 5), torch.ones(3)]).shape
    torch.Size([3, 21])
    """
    return torch.cat([each.reshape(len(each), -1) for each in tensors], 1)


def tensor_means(tensors: Iterable[Tensor]) -> Tensor:
    """Return, for each task, the mean of the entries of each of P tensors (T, *shape): (T, P).

    >>> tensor_means([torch.ones(3, 4, 5), torch.zeros(3)])[0]
    tensor([1., 0.])
    """
    return torch.stack([each.reshape(len(each), -1).mean(1) for each in tensors], 1)


def gradients_of(
    loss: Tensor, parameters: Mapping[str, Tensor], *, retain_graph: bool = False
) -> dict[str, Tensor]:
    """Return ∂loss/∂parameter by name, 0 where the loss () does not depend on it.

    >>> x, unused = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    >>> gradients_of(x.square().sum(), {"x": x, "unused": unused})
    {'x': tensor([2., 2.]), 'unused': tensor([0.])}
    """
    at = list(parameters.values())
    if not at:
        return {}
    taken = torch.autograd.grad(
        loss, at, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, taken, strict=True))


@dataclass(frozen=True)
class Context:
    """The run as a plugin sees it when it creates its meta-parameters and buffers.

    Attributes:
        shapes: by name, of every trainable parameter of the model, without the task axis; and of
            the plugins' task parameters, as PLUGIN.NAME.
        parameters: by name, their values as meta-training begins, detached: copy what you need.
        layers: by name, the class of the module that each parameter of the model belongs to.
        adapted: the names of what the inner loop adapts: parameters in the model's order, then
            task parameters.
        dtype, device: of the model's parameters; create yours with both.
        inner_steps: K in training, 0 or more.
        inner_lr: the inner learning rate.
        kind: "classification" or "regression".
        ranks: the processes over which the tasks of a meta-batch are spread.
        inner_optimizer: its name, such as "sgd".

    >>> Context({}, {}, {}, (), torch.float32, torch.device("cpu"), 5, 0.1, "regression").ranks
    1
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
    inner_optimizer: str = "sgd"

    @property
    def factory_kwargs(self) -> dict[str, Any]:
        """dtype and device by name, for functions of torch that make a tensor or a module."""
        return {"dtype": self.dtype, "device": self.device}

    def layers_of(self, *classes: type[nn.Module]) -> dict[str, tuple[str, str | None]]:
        """Find the layers of these classes that have a trainable weight, in the model's order.

        Returns:
            By name of the layer ("weight" where it is the model itself), the names of its weight
            and of its bias; None for a bias that it has not, or that is frozen.

        >>> layers = {"0.weight": nn.Linear, "0.bias": nn.Linear, "1.weight": nn.LayerNorm}
        >>> form = torch.float32, torch.device("cpu"), 5, 0.1
        >>> Context({}, {}, layers, (), *form, "regression").layers_of(nn.Linear, nn.LayerNorm)
        {'0': ('0.weight', '0.bias'), '1': ('1.weight', None)}
        """
        found = {}
        for weight, layer in self.layers.items():
            if weight.rpartition(".")[2] == "weight" and issubclass(layer, classes):
                bias = weight.removesuffix("weight") + "bias"
                found[weight.removesuffix(".weight")] = (
                    weight,
                    bias if bias in self.layers else None,
                )
        return found
