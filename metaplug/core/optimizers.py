"""Everything that touches `higher`: a model that takes its parameters from outside, and optimizers that can be differentiated.

What higher gets wrong is put right here, or refused with the reason.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import higher
import torch
from torch import Tensor, nn

from metaplug.errors import RequestError, did_you_mean, unknown

OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[str, ...]]] = {
    "sgd": (torch.optim.SGD, ("momentum", "dampening", "nesterov", "weight_decay")),
    "adam": (torch.optim.Adam, ("betas", "eps", "weight_decay", "amsgrad")),
    "adamax": (torch.optim.Adamax, ("betas", "eps", "weight_decay")),
    "adagrad": (torch.optim.Adagrad, ("lr_decay", "eps", "weight_decay")),
    "adadelta": (torch.optim.Adadelta, ("rho", "eps", "weight_decay")),
    "rmsprop": (torch.optim.RMSprop, ("alpha", "eps", "weight_decay", "momentum", "centered")),
}
"""The inner optimizers, with the settings that `higher` mirrors faithfully; learning rates come from the chain."""


class MirroredOptimizer:
    """A torch optimizer, differentiable, on stacked tensors. One parameter group for each tensor, so that each has its own learning rate.

    Args:
        name, settings: a name in OPTIMIZERS, and its settings.
        lr: a learning rate that torch accepts; every step brings its own.
        count: how many tensors a step updates.

    Raises:
        RequestError: an unknown optimizer, or a setting that higher would ignore or get wrong.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], lr: float, count: int) -> None:
        if name not in OPTIMIZERS:
            raise unknown("inner optimizer", name, OPTIMIZERS)
        optimizer, faithful = OPTIMIZERS[name]
        for setting, value in settings.items():
            if any(
                isinstance(each, Tensor)
                for each in (value if isinstance(value, list | tuple) else [value])
            ):
                raise RequestError(
                    f"inner optimizer '{name}' is given a tensor as '{setting}', whose meta-gradient higher gets wrong: give plain numbers"
                )
            if setting not in faithful:
                reason = (
                    f"higher would ignore it or get it wrong: {did_you_mean(setting, faithful)}"
                )
                raise RequestError(
                    f"inner optimizer '{name}' does not take the setting '{setting}': {reason}"
                )
        stand_ins = [
            torch.empty(0, requires_grad=True) for _ in range(count)
        ]  # higher copies what it is given: nothing, here
        try:
            torch_optimizer = optimizer(
                [{"params": [stand_in]} for stand_in in stand_ins], lr=lr, **settings
            )
        except (TypeError, ValueError) as error:
            raise RequestError(f"inner optimizer '{name}': {error}; correct the setting") from None
        with warnings.catch_warnings():
            # higher doubts its RMSprop; tests/core/test_inner_loop.py holds it against a plain loop, meta-gradients included.
            warnings.filterwarnings(
                "ignore", message="Differentiable RMSprop", category=UserWarning
            )
            make = _Sgd if optimizer is torch.optim.SGD else higher.optim.get_diff_optim
            self._mirror = make(torch_optimizer, stand_ins)
        self._eps, self._betas = (
            self._mirror.param_groups[0].get(setting) for setting in ("eps", "betas")
        )
        self._unconnected = torch.zeros((), requires_grad=True)
        self.reset()

    def step(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None], rates: Sequence[Tensor]
    ) -> list[Tensor]:
        """The weights after one update; where the gradient is None, unchanged. Differentiable in all three."""
        # higher's own gradient, of a loss that depends on nothing, costs nothing and is replaced. Settings stay, so all are given anew.
        override = {"lr": list(rates), **self._corrected()}
        return list(
            self._mirror.step(
                self._unconnected,
                params=weights,
                override=override,
                grad_callback=lambda _: gradients,
            )
        )

    def snapshot(self) -> list[dict[int, dict[str, Any]]]:
        """The state as it is now, in containers of its own."""
        return [
            {place: dict(state) for place, state in group.items()} for group in self._mirror.state
        ]

    def restore(self, snapshot: Sequence[Mapping[int, Mapping[str, Any]]]) -> None:
        """Go on from a snapshot, which stays as it is."""
        for group, saved in zip(self._mirror.state, snapshot, strict=True):
            group.clear()
            group.update({place: dict(state) for place, state in saved.items()})

    def reset(self) -> None:
        """Forget momenta, and let go of the last tensors."""
        self._mirror.state = [self._first_state() for _ in self._mirror.param_groups]
        for group in self._mirror.param_groups:
            group["params"], group["lr"] = [None], None

    def _first_state(self) -> defaultdict[int, dict[str, Any]]:
        """What a group remembers before the first step: nothing, but for Adagrad, which expects to find its sums."""
        adagrad = isinstance(self._mirror, higher.optim.DifferentiableAdagrad)
        return defaultdict(lambda: {"step": 0, "sum": torch.zeros(())} if adagrad else {})

    def _corrected(self) -> dict[str, list[float]]:
        """Adam's eps for this step: higher adds it before bias correction, torch (and the paper) behind it."""
        if not isinstance(self._mirror, higher.optim.DifferentiableAdam):
            return {}
        steps = [state[0].get("step", 0) + 1 for state in self._mirror.state]
        return {"eps": [self._eps * math.sqrt(1 - self._betas[1] ** step) for step in steps]}


class _Sgd(higher.optim.DifferentiableSGD):  # type: ignore[misc]
    """higher's SGD; without momentum and weight decay in one operation for each tensor, which keeps one tensor less on the way."""

    def _update(self, grouped_grads: Sequence[Sequence[Tensor | None]], **kwargs: Any) -> None:
        if any(group["momentum"] or group["weight_decay"] for group in self.param_groups):
            super()._update(grouped_grads, **kwargs)
            return
        for group, [gradient] in zip(self.param_groups, grouped_grads, strict=True):
            if gradient is not None:
                group["params"] = [
                    torch.addcmul(group["params"][0], group["lr"], gradient, value=-1)
                ]


def patch(model: nn.Module, batch_norm: str) -> Any:
    """A copy of the model's structure that is called with parameters of the caller's. Patch once: it makes a class for every module."""
    patched: Any = higher.patch.make_functional(model)
    higher.patch.buffer_sync(model, patched)
    patched.track_higher_grads = False
    patched._fast_params = [
        []
    ]  # with tracking off, a history of length one, replaced at every call
    patched.metaplug_places = [
        (module._parameters, name) for module in patched.modules() for name in module._param_names
    ]
    set_mode(patched, True, batch_norm)
    own = dict(model.named_modules(remove_duplicate=False))
    patched.metaplug_buffers = [
        [
            own[path]._buffers,
            module._buffers,
            name,
            own[path]._buffers[name],
            _version(own[path]._buffers[name]),
        ]
        for path, module in patched.named_modules(remove_duplicate=False)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    return patched


def follow(patched: Any) -> None:
    """Give a patched model the values that the buffers of the model itself have now: higher copies them once, at patching."""
    for place in patched.metaplug_buffers:
        own, copies, name, seen, version = place
        buffer = own[name]
        if buffer is not seen or version is None or buffer._version != version:
            copies[name] = None if buffer is None else buffer.detach().clone()
            place[3:] = [buffer, _version(buffer)]


def _version(buffer: Tensor | None) -> int | None:
    """How often it was written to; None where torch does not count."""
    return None if buffer is None or buffer.is_inference() else buffer._version


def assign(patched: Any, parameters: list[Tensor]) -> None:
    """Give every module of a patched model its parameters, as higher's update_params does, without its search for their places."""
    patched.fast_params = parameters
    for (holder, name), parameter in zip(
        patched.metaplug_places, patched._expand_params(parameters), strict=True
    ):
        holder[name] = parameter


def release(patched: Any, parameters: list[Tensor]) -> None:
    """Let a patched model go of the last fast weights, which it would keep alive with their graph."""
    assign(patched, parameters)
    for module in patched.modules():
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [module._parameters[name] for name in module._flat_weights_names]


def set_mode(module: nn.Module, training: bool, batch_norm: str) -> None:
    """Training or evaluation mode for a model, and what `batch_norm` says for the layers that normalise by running statistics."""
    module.train(training)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            if batch_norm == "batch":
                layer.track_running_stats = False
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
            else:
                layer.eval()
