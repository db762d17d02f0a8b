"""The bilevel engine: adapt a batch, outer loss, meta-gradients, meta-update.

L(θ, φ) = mean over t of Σ_i w_i · ℓ(f(query x_t; θ[t,i]), query y_t)        θ the model's parameters, φ the plugins'
θ, φ ← meta-optimizer(∂L/∂θ, ∂L/∂φ)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from metaplug.chain import Chain
from metaplug.checks import form, non_finite
from metaplug.errors import RunError, quoted
from metaplug.inner import InnerLoop, recording
from metaplug.runtime.seeding import mix, stream
from metaplug.tasks.batch import TaskBatch
from metaplug.values import Outcome

META_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
"""The optimizers of the outer loop, by name."""


@dataclass(frozen=True)
class MetaGradients:
    """What one meta-iteration found: `gradients` by name, the outer loss () that they belong to, and how the tasks were adapted."""

    gradients: Mapping[str, Tensor]
    outer_loss: Tensor
    outcome: Outcome


@dataclass(frozen=True)
class MetaStep:
    """One meta-update: its iteration (counted from 1 once done), outer loss, norm of the meta-gradient, the meta learning rate of the
    model's weights, and the plugins' figures."""

    iteration: int
    outer_loss: float
    meta_gradient_norm: float
    meta_lr: float
    figures: Mapping[str, float]


class Engine:
    """Runs meta-iterations for one model and one chain.

    Args:
        model: its trainable parameters are meta-learned, in place.
        chain: set up already, so that the plugins' meta-parameters exist.
        inner: the inner loop over the same model and chain.
        meta_optimizer: a name in META_OPTIMIZERS.
        meta_lr: its rate for the model, and for plugins that set none of their own.
        seed: of every random number that a step draws.
    """

    def __init__(self, model: nn.Module, chain: Chain, inner: InnerLoop, *, meta_optimizer: str, meta_lr: float, seed: int) -> None:
        self.chain, self.inner, self.seed = chain, inner, seed
        self.iteration = 0
        self.total = 0
        """The iterations of the whole run that the last meta-update belonged to; 0 before the first. Schedules depend on it."""
        self.outputs: int | None = None
        """The number of classes that the model tells apart, once it is known; labels are checked against it."""
        self.device = next(model.parameters()).device
        own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.meta_parameters: dict[str, nn.Parameter] = {**own, **chain.named_parameters()}
        groups = [(list(own.values()), meta_lr)]
        groups += [(list(plugin.parameters()), meta_lr if plugin.meta_lr is None else plugin.meta_lr) for plugin in chain.plugins]
        self._rates = [lr for parameters, lr in groups if parameters]
        make = META_OPTIMIZERS[meta_optimizer]
        self.optimizer = make([{"params": parameters, "lr": lr} for parameters, lr in groups if parameters])

    def meta_gradients(self, batch: TaskBatch, iteration: int, total: int) -> MetaGradients:
        """The meta-gradients of one batch, as iteration `iteration` of a run of `total` would use them. Steps and commits nothing."""
        with stream(mix(self.seed, iteration), self.device) as generator, recording():
            transformed = self.chain.fold("transform_tasks", batch, iteration=iteration, generator=generator)
            if transformed is not batch:
                transformed.check_labels(self.outputs)
            batch = transformed
            weights = self._outer_weights(iteration, total)
            outcome = self.inner.run(
                batch, steps=self.inner.inner_steps, training=True, iteration=iteration, total=total, query_after=weights
            )
            losses = torch.stack([weight * outcome.query_losses[after] for after, weight in weights.items()]).sum(0)
            outer_loss = self.chain.fold("transform_outer_losses", losses, outcome=outcome).mean()
            replaced = self.chain.choose(
                "compute_meta_gradients",
                None,
                outcome=outcome,
                outer_loss=outer_loss,
                meta_parameters=MappingProxyType(self.meta_parameters),
            )
            gradients = self._differentiate(outer_loss) if replaced is None else self._replaced(replaced)
            if self.chain.check_finite and (fault := non_finite(gradients)):
                raise RunError(f"the meta-gradient holds {fault}, though every loss on the way was finite")
            gradients = self.chain.fold("transform_meta_gradients", gradients, iteration=iteration)
        return MetaGradients(gradients, outer_loss.detach(), outcome)

    def meta_step(self, batch: TaskBatch, total: int) -> MetaStep:
        """One meta-update on `batch`, in a run of `total` iterations.

        Raises:
            RunError: a loss or a meta-gradient is NaN or Inf; nothing was updated.
        """
        iteration = self.iteration
        found = self.meta_gradients(batch, iteration, total)
        norm = torch.nn.utils.get_total_norm(found.gradients.values())
        losses = [*found.outcome.support_losses, *found.outcome.query_losses.values()]
        if not bool(torch.isfinite(torch.stack([norm, found.outer_loss, *(loss.detach().sum() for loss in losses)])).all()):
            raise self._culprit(batch, iteration, total)
        factor = self.chain.fold("scale_meta_learning_rate", 1.0, iteration=iteration, total=total)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        for name, parameter in self.meta_parameters.items():
            parameter.grad = found.gradients.get(name)
        with recording():  # under inference_mode the optimizer would make a state that no later step can change
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.chain.commit(found.outcome.statistics)
        self.iteration, self.total = iteration + 1, total
        meta_lr = self.optimizer.param_groups[0]["lr"]
        return MetaStep(self.iteration, float(found.outer_loss), float(norm), meta_lr, self.chain.figures(iteration, total))

    def evaluate(self, batch: TaskBatch, steps: int) -> Outcome:
        """Adapt test tasks. No graph, no state, no random stream of the caller's is touched."""
        with stream(mix(self.seed), self.device):
            return self.inner.run(batch, steps=steps, training=False, iteration=self.iteration, total=self.total, query_after={steps})

    def _outer_weights(self, iteration: int, total: int) -> dict[int, float]:
        """By the number of updates done before the query loss, the weight of that loss; only those that count."""
        steps = self.inner.inner_steps
        if steps == 0:
            return {0: 1.0}
        chosen = self.chain.choose("outer_step_weights", [0.0] * (steps - 1) + [1.0], iteration=iteration, inner_steps=steps, total=total)
        return {after: weight for after, weight in enumerate(chosen, 1) if weight}

    def _differentiate(self, outer_loss: Tensor) -> dict[str, Tensor]:
        if not outer_loss.requires_grad:
            raise RunError("no meta-gradient: the outer loss depends on no trainable parameter; let the model's output depend on one")
        try:
            taken = torch.autograd.grad(outer_loss, list(self.meta_parameters.values()), allow_unused=True)
        except RuntimeError as error:
            raise _not_differentiable(error) from error
        return {name: gradient for name, gradient in zip(self.meta_parameters, taken, strict=True) if gradient is not None}

    def _replaced(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        wrong = [name for name in gradients if name not in self.meta_parameters]
        left_out = [name for name in self.chain.named_parameters() if name not in gradients]
        misshapen = [name for name in gradients if name not in wrong and form(gradients[name]) != form(self.meta_parameters[name])]
        if misshapen:
            raise RunError(
                f"compute_meta_gradients answered another form than the parameter's for {quoted(misshapen)}: keep shape and dtype"
            )
        if wrong or left_out:
            raise RunError(
                f"compute_meta_gradients answered names that are not meta-learned ({quoted(wrong)}) or left out a plugin's parameters "
                f"({quoted(left_out)}), which would then never learn: answer by the names of MetaLearner.meta_gradients"
            )
        return dict(gradients)

    def _culprit(self, batch: TaskBatch, iteration: int, total: int) -> RunError:
        """Replay the iteration with every value checked, and return the error that names the first to be NaN or Inf."""
        try:
            with self._checking():
                batch.check_values(None)
                self.meta_gradients(batch, iteration, total)
        except RunError as error:
            return RunError(f"iteration {iteration} stopped, nothing was updated: {error}; try a smaller inner or meta learning rate")
        return RunError(
            f"iteration {iteration} stopped, nothing was updated: the norm of the meta-gradient is Inf; clip it or lower inner_lr"
        )

    @contextmanager
    def _checking(self) -> Iterator[None]:
        self.chain.check_finite = True
        try:
            yield
        finally:
            self.chain.check_finite = False


def _not_differentiable(error: RuntimeError) -> RuntimeError:
    """The error of differentiating through the loop in words for the user; the error itself where it says something else."""
    if "a second time" in str(error):
        return RunError(
            "a plugin uses the support losses of a first-order step in what is differentiated, but their graph is gone: "
            "detach them in the plugin, or use second order"
        )
    if "derivative for" in str(error) or "once_differentiable" in str(error):
        return RunError(
            f"second-order meta-gradients cannot be had of this model ({str(error).splitlines()[0]}): add the plugin derivative-order"
        )
    return error
