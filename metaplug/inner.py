"""The differentiable inner loop on `higher`, with all tasks of a batch stacked; the only file that imports higher.

    g[t,k] = ∂ ℓ(f(x_t; θ[t,k]), y_t) / ∂θ[t,k]        then the fold of transform_gradients
    θ[t,k+1] = update(θ[t,k], g[t,k], α[k])            the inner optimizer; for SGD θ − α g

Tasks' losses do not depend on each other's weights, so the gradient of their sum with respect to the stacked weights is every task's own.
It is taken outside vmap: inside, second-order gradients through batch and layer norm are silently wrong.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import higher
import torch
from higher.optim import DifferentiableOptimizer
from torch import Tensor, nn

from metaplug.chain import Chain
from metaplug.errors import RequestError, RunError, did_you_mean, quoted, unknown
from metaplug.runtime.folding import Folding
from metaplug.tasks.batch import TaskBatch
from metaplug.values import InnerStep, Outcome

Loss = Callable[[Tensor, Tensor], Tensor]
"""(prediction, target) of one task → its loss, a tensor of shape ()."""

OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[str, ...]]] = {
    "sgd": (torch.optim.SGD, ("momentum", "dampening", "nesterov", "weight_decay")),
    "adam": (torch.optim.Adam, ("betas", "eps", "weight_decay", "amsgrad")),
    "adamax": (torch.optim.Adamax, ("betas", "eps", "weight_decay")),
    "adagrad": (torch.optim.Adagrad, ("lr_decay", "eps", "weight_decay")),
    "adadelta": (torch.optim.Adadelta, ("rho", "eps", "weight_decay")),
    "rmsprop": (torch.optim.RMSprop, ("alpha", "eps", "weight_decay", "momentum", "centered")),
}
"""The inner optimizers, with the settings that `higher` mirrors faithfully; learning rates come from the chain."""


class InnerLoop:
    """Adapts the tasks of a batch, in lock-step, each from the model's own weights.

    Args:
        model: called with one task's inputs (n, *input); patched once, never changed here.
        chain: the plugins.
        loss: of one task.
        adapted: names of the parameters that the loop updates.
        inner_steps: K in training, 0 or more.
        inner_lr: the inner learning rate, above 0 or equal to it.
        optimizer, optimizer_settings: a name in OPTIMIZERS, and its settings.
        batch_norm: "batch" (statistics of each task's own batch, in training and evaluation) or "frozen" (the model's stored statistics).
    """

    def __init__(
        self,
        model: nn.Module,
        chain: Chain,
        loss: Loss,
        *,
        adapted: Collection[str],
        inner_steps: int,
        inner_lr: float,
        optimizer: str,
        optimizer_settings: Mapping[str, Any],
        batch_norm: str,
    ) -> None:
        self.model, self.chain, self.loss, self.inner_steps, self.batch_norm = model, chain, loss, inner_steps, batch_norm
        self.vectorized = True
        self._parameters = dict(model.named_parameters())
        self.adapted = tuple(name for name in self._parameters if name in adapted)
        reference = next(iter(self._parameters.values()))
        self._rate = torch.tensor(inner_lr, dtype=reference.dtype, device=reference.device)
        self._unconnected = torch.zeros((), device=reference.device, requires_grad=True)
        self._optimizer = _differentiable_optimizer(optimizer, optimizer_settings, inner_lr, len(self.adapted))
        self._eps, self._betas = (self._optimizer.param_groups[0].get(setting) for setting in ("eps", "betas"))
        self.patched = _patch(model, batch_norm)

    def run(self, batch: TaskBatch, *, steps: int, training: bool, iteration: int, query_after: Collection[int]) -> Outcome:
        """Adapt every task for `steps` steps, and take the query losses after as many updates as `query_after` says.

        In training the result carries the graph for meta-gradients; otherwise no graph is taken, and no surrounding
        `no_grad` or `inference_mode` reaches in.
        """
        if self.patched.training != training:
            set_mode(self.patched, training, self.batch_norm)
        with recording():
            try:
                return self._run(usable(batch), steps, training, iteration, query_after)
            finally:
                self._release()

    def predict(self, parameters: list[Tensor], x: Tensor) -> Tensor:
        """One task's prediction (n, *output), with its own parameters in the model's order."""
        self.patched.update_params(parameters)  # of every module at once: a parent may read a child's weight without calling the child
        prediction: Tensor = self.patched(x)
        return prediction

    def task(self, parameters: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One task's loss () and prediction (n, *output)."""
        prediction = self.predict(parameters, x)
        return self.loss(prediction, y), prediction

    def _run(self, batch: TaskBatch, steps: int, training: bool, iteration: int, query_after: Collection[int]) -> Outcome:
        initial = {name: parameter.expand(batch.num_tasks, *parameter.shape) for name, parameter in self._parameters.items()}
        fast = initial = initial if training else _leaves(initial, self.adapted)
        support_losses: list[Tensor] = []
        query_losses: dict[int, Tensor] = {}
        first = InnerStep(
            0, steps, self.inner_steps, iteration, training, parameters=MappingProxyType(fast), initial_parameters=MappingProxyType(initial)
        )
        if 0 in query_after:
            query_losses[0], predictions, values = self._query(fast, batch, first)
        for index in range(steps):
            step = replace(first, index=index, parameters=MappingProxyType(fast))
            losses, _, _ = self._forward(fast, batch.support_x, batch.support_y, step)
            support_losses.append(losses)
            fast = self._update(fast, losses, replace(step, support_losses=losses))
            if index + 1 in query_after:
                query_losses[index + 1], predictions, values = self._query(fast, batch, replace(step, parameters=MappingProxyType(fast)))
        return Outcome(
            batch,
            initial_parameters=MappingProxyType(initial),
            adapted_parameters=MappingProxyType(fast),
            support_losses=tuple(support_losses),
            query_losses=MappingProxyType(query_losses),
            query_predictions=predictions.detach(),
            query_parameters=MappingProxyType(dict(values)),
            statistics=MappingProxyType(first.statistics),
        )

    def _update(self, fast: Mapping[str, Tensor], losses: Tensor, step: InnerStep) -> dict[str, Tensor]:
        objective = self.chain.fold("transform_inner_losses", losses, step=step)
        order = self.chain.choose("derivative_order", 2, step=step) if step.training else 1
        weights = [fast[name] for name in self.adapted]
        taken = torch.autograd.grad(objective.sum(), weights, create_graph=order == 2, allow_unused=True) if objective.requires_grad else ()
        gradients = {name: gradient for name, gradient in zip(self.adapted, taken, strict=False) if gradient is not None}
        if not gradients:
            raise RunError(
                f"no gradient reaches the adapted parameters {quoted(self.adapted[:3])}: the loss does not depend on them; adapt others"
            )
        self._check("the gradient of the support loss", gradients, step)
        folded = self.chain.fold("transform_gradients", gradients, step=step)
        rates = self.chain.fold("transform_learning_rates", dict.fromkeys(self.adapted, self._rate), step=step)
        if not step.training:
            folded, rates = ({name: value.detach() for name, value in values.items()} for values in (folded, rates))
        updated = self._optimizer.step(
            self._unconnected,
            params=weights,
            override={"lr": [rates[name] for name in self.adapted], **self._corrected()},
            grad_callback=lambda _: [folded.get(name) for name in self.adapted],
        )
        after = {**fast, **dict(zip(self.adapted, updated, strict=True))}
        self._check("the updated weights", after, step)
        return after if step.training else _leaves(after, self.adapted)

    def _corrected(self) -> dict[str, list[float]]:
        """Adam's eps for this step: higher adds it before bias correction, torch (and the paper) behind it."""
        if not isinstance(self._optimizer, higher.optim.DifferentiableAdam):
            return {}
        steps = [state[0].get("step", 0) + 1 for state in self._optimizer.state]
        return {"eps": [self._eps * math.sqrt(1 - self._betas[1] ** step) for step in steps]}

    def _query(self, fast: Mapping[str, Tensor], batch: TaskBatch, step: InnerStep) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        with torch.set_grad_enabled(step.training):
            return self._forward(fast, batch.query_x, batch.query_y, step)

    def _forward(self, fast: Mapping[str, Tensor], x: Tensor, y: Tensor, step: InnerStep) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """Every task's loss (T,) and prediction (T, n, *output), and the parameter values that they were made with."""
        values = self.chain.fold("transform_parameters", fast, step=step)
        stacked = [values[name] for name in self._parameters]
        losses, predictions = self._vectorized(stacked, x, y) if self.vectorized else self._sequential(stacked, x, y)
        self._check("the model's output", {"prediction": predictions}, step)
        self._check("the loss", {"loss": losses}, step)
        return losses, predictions, values

    def _vectorized(self, stacked: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        # Weights that no task has changed are one tensor, expanded: vmap need not batch them, unless the gradient is asked for by task.
        shared = [name not in self.adapted and value.stride(0) == 0 for name, value in zip(self._parameters, stacked, strict=True)]
        values = [value[0] if same else value for value, same in zip(stacked, shared, strict=True)]
        dims = [None if same else 0 for same in shared]
        losses, predictions = torch.vmap(self._folded_task, in_dims=(dims, 0, 0), randomness="different")(values, x, y)
        return losses, predictions

    def _folded_task(self, parameters: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with Folding():
            return self.task(parameters, x, y)

    def _sequential(self, stacked: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        rows = zip(*(value.unbind(0) for value in stacked), strict=True)
        results = [self.task(list(row), *task) for row, *task in zip(rows, x.unbind(0), y.unbind(0), strict=True)]
        return torch.stack([loss for loss, _ in results]), torch.stack([prediction for _, prediction in results])

    def _check(self, what: str, values: Mapping[str, Tensor], step: InnerStep) -> None:
        """In a replay that looks for the culprit (Chain.check_finite): refuse NaN and Inf where the core itself makes a value."""
        if self.chain.check_finite:
            wrong = [name for name, value in values.items() if not bool(torch.isfinite(value).all())]
            if wrong:
                raise RunError(f"{what} is NaN or Inf ({quoted(wrong[:3])}) in iteration {step.meta_iteration}, inner step {step.index}")

    def _release(self) -> None:
        """Let go of the last fast weights, which higher keeps in the patched modules and in the optimizer."""
        self.patched.update_params(list(self._parameters.values()))
        for module in self.patched.modules():
            if isinstance(module, nn.RNNBase):
                module._flat_weights = [module._parameters[name] for name in module._flat_weights_names]
        self._optimizer.state = _first_state(self._optimizer)
        for group in self._optimizer.param_groups:
            group["params"], group["lr"] = [None], None


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


def _patch(model: nn.Module, batch_norm: str) -> Any:
    patched: Any = higher.patch.make_functional(model)
    higher.patch.buffer_sync(model, patched)
    patched.track_higher_grads = False
    patched._fast_params = [[]]  # with tracking off, a history of length one, replaced at every call
    set_mode(patched, True, batch_norm)
    return patched


def _differentiable_optimizer(name: str, settings: Mapping[str, Any], lr: float, count: int) -> DifferentiableOptimizer:
    if name not in OPTIMIZERS:
        raise unknown("inner optimizer", name, OPTIMIZERS)
    optimizer, faithful = OPTIMIZERS[name]
    for setting in settings:
        if setting not in faithful:
            reason = f"higher would ignore it or get it wrong: {did_you_mean(setting, faithful)}"
            raise RequestError(f"inner optimizer '{name}' does not take the setting '{setting}': {reason}")
    stand_ins = [torch.empty(0, requires_grad=True) for _ in range(count)]
    try:
        mirrored = optimizer([{"params": [stand_in]} for stand_in in stand_ins], lr=lr, **settings)
    except (TypeError, ValueError) as error:
        raise RequestError(f"inner optimizer '{name}': {error}; correct the setting") from None
    with warnings.catch_warnings():
        # higher doubts its RMSprop; tests/test_inner.py holds it against a plain loop, meta-gradients included.
        warnings.filterwarnings("ignore", message="Differentiable RMSprop", category=UserWarning)
        mirror = higher.optim.get_diff_optim(mirrored, stand_ins)
    mirror.state = _first_state(mirror)
    return mirror


def _first_state(optimizer: DifferentiableOptimizer) -> list[defaultdict[int, dict[str, Any]]]:
    """What the optimizer remembers before the first step: nothing, but for Adagrad, which expects to find its sums."""
    if isinstance(optimizer, higher.optim.DifferentiableAdagrad):
        return [defaultdict(lambda: {"step": 0, "sum": torch.zeros(())}) for _ in optimizer.param_groups]
    return [defaultdict(dict) for _ in optimizer.param_groups]


def _leaves(values: Mapping[str, Tensor], adapted: Collection[str]) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_(name in adapted) for name, value in values.items()}


@contextmanager
def recording() -> Iterator[None]:
    """Inside, autograd records, whatever surrounds the call."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def usable(batch: TaskBatch) -> TaskBatch:
    """Tensors that were made under inference_mode cannot be saved for a backward pass: copies of them can."""
    tensors = (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
    if not any(tensor.is_inference() for tensor in tensors):
        return batch
    return TaskBatch(*(tensor.clone() for tensor in tensors))
