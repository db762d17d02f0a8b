"""The differentiable inner optimizers, from `higher`; nothing else of metaplug imports it.

Where `higher` differs from torch, the difference is corrected here, or refused with the reason.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import higher
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from metaplug.errors import RequestError, did_you_mean, unknown

OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[str, ...]]] = {
    "sgd": (torch.optim.SGD, ("momentum", "dampening", "nesterov", "weight_decay")),
    "adam": (torch.optim.Adam, ("betas", "eps", "weight_decay", "amsgrad")),
    "adamax": (torch.optim.Adamax, ("betas", "eps", "weight_decay")),
    "adagrad": (torch.optim.Adagrad, ("lr_decay", "eps", "weight_decay")),
    "adadelta": (torch.optim.Adadelta, ("rho", "eps", "weight_decay")),
    "rmsprop": (torch.optim.RMSprop, ("alpha", "eps", "weight_decay", "momentum", "centered")),
}
"""The inner optimizers, with the settings that `higher` gets right."""


class DifferentiableOptimizer:
    """A torch optimizer, differentiable, on stacked tensors.

    Each tensor is a parameter group, so each has its own learning rate.

    Args:
        name, settings: a name in OPTIMIZERS, and its settings.
        lr: a learning rate that torch accepts; every step brings its own.
        count: how many tensors a step updates.

    Attributes:
        name: as given.
        is_plain: whether a step is θ − α g, and no setting asks for more.

    Raises:
        RequestError: an unknown optimizer, or a setting that higher would ignore or get wrong.

    Example:
        >>> sgd = DifferentiableOptimizer("sgd", {}, lr=0.1, count=1)
        >>> sgd.step([torch.ones(1)], [torch.tensor([2.0])], [torch.tensor(0.1)])[0].item()
        0.800000011920929
    """

    def __init__(self, name: str, settings: Mapping[str, Any], lr: float, count: int) -> None:
        if name not in OPTIMIZERS:
            raise unknown("inner optimizer", name, OPTIMIZERS)
        optimizer, faithful = OPTIMIZERS[name]
        for setting, value in settings.items():
            numbers = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(each, Tensor) for each in numbers):
                raise RequestError(
                    f"inner optimizer '{name}' is given a tensor as '{setting}', whose "
                    "meta-gradient higher gets wrong: give plain numbers"
                )
            if setting not in faithful:
                raise RequestError(
                    f"inner optimizer '{name}' does not take the setting '{setting}': higher would "
                    f"ignore it or get it wrong: {did_you_mean(setting, faithful)}"
                )
        # higher deep-copies the parameters that it is given. Empty ones cost nothing.
        stand_ins = [torch.empty(0, requires_grad=True) for _ in range(count)]
        try:
            given = optimizer([{"params": [each]} for each in stand_ins], lr=lr, **settings)
        except (TypeError, ValueError) as error:
            raise RequestError(f"inner optimizer '{name}': {error}; correct the setting") from None
        with warnings.catch_warnings():
            # higher doubts its RMSprop; the tests compare it with a plain loop.
            message = "Differentiable RMSprop"
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
            self._optimizer = higher.optim.get_diff_optim(given, stand_ins)
        self.name, group = name, self._optimizer.param_groups[0]
        self.is_plain = name == "sgd" and not any(settings.values())
        self._eps, self._betas = group.get("eps"), group.get("betas")
        self._unconnected = torch.zeros((), requires_grad=True)
        self.reset()

    def step(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None], rates: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the weights after one update, differentiable in all three.

        Args:
            weights: (T, *shape) each.
            gradients: likewise; None leaves the weights as they are.
            rates: the learning rates, each broadcastable to its weights.
        """
        if self.is_plain:  # one operation for each, which saves one tensor less than higher's two
            return [
                weight if gradient is None else torch.addcmul(weight, rate, gradient, value=-1)
                for weight, gradient, rate in zip(weights, gradients, rates, strict=True)
            ]
        updated = self._optimizer.step(
            # higher differentiates a loss itself, without names, order or step. That of a loss
            # that depends on nothing costs nothing, and the callback replaces its gradient.
            self._unconnected,
            params=weights,
            # Overridden settings stay for later steps, so each step gives all of them.
            override={"lr": list(rates), **self._corrected()},
            grad_callback=lambda _: gradients,
        )
        return list(updated)

    def snapshot(self) -> list[dict[int, dict[str, Any]]]:
        """Return the state as it is now, in containers of its own."""
        return [
            {place: dict(state) for place, state in group.items()}
            for group in self._optimizer.state
        ]

    def restore(self, snapshot: Sequence[Mapping[int, Mapping[str, Any]]]) -> None:
        """Go on from a snapshot, which stays as it is."""
        for group, saved in zip(self._optimizer.state, snapshot, strict=True):
            group.clear()
            group.update({place: dict(state) for place, state in saved.items()})

    def detach(self) -> None:
        """Cut the graph to earlier steps."""
        self.restore(tree_map_only(Tensor, Tensor.detach, self.snapshot()))

    def reset(self) -> None:
        """Forget momenta, and release the last tensors, which would keep their graph alive."""
        adagrad = isinstance(self._optimizer, higher.optim.DifferentiableAdagrad)
        first = _adagrad_state if adagrad else dict
        self._optimizer.state = [defaultdict(first) for _ in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["params"], group["lr"] = [None], None

    def _corrected(self) -> dict[str, list[float]]:
        """Adam's eps for this step: higher adds it before bias correction, torch after it."""
        if not isinstance(self._optimizer, higher.optim.DifferentiableAdam):
            return {}
        steps = [state[0].get("step", 0) + 1 for state in self._optimizer.state]
        return {"eps": [self._eps * math.sqrt(1 - self._betas[1] ** step) for step in steps]}


def _adagrad_state() -> dict[str, Any]:
    """The state that higher's Adagrad expects to find before its first step."""
    return {"step": 0, "sum": torch.zeros(())}
