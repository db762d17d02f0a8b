"""The bilevel engine: adapt a batch, outer loss, meta-gradients, meta-update.

L(θ, φ) = mean over t of Σ_i w_i · ℓ(f(query x_t; θ[t,i]), query y_t)        θ the model's parameters, φ the plugins'
θ, φ ← meta-optimizer(∂L/∂θ, ∂L/∂φ)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from metaplug.checks.find_nonfinite import culprit
from metaplug.checks.watch import FAILURES
from metaplug.contract.chain import Chain
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.values import Outcome
from metaplug.core.inner_loop import NO_DERIVATIVE, InnerLoop, recording
from metaplug.errors import RankError, RunError, quoted
from metaplug.execution.determinism import repeatable
from metaplug.execution.precision import arithmetic
from metaplug.execution.ranks import ALONE, Share, World
from metaplug.random_streams import mix, stream

META_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
"""The optimizers of the outer loop, by name."""

SKIPS_IN_A_ROW = 10
"""Batches in a row that would be skipped, which is no fault of a batch, but a broken run: the last of them stops it."""


@dataclass(frozen=True)
class MetaGradients:
    """What one meta-iteration found.

    Attributes:
        gradients: by name.
        outer_loss: (), that they belong to.
        losses: the mean over tasks of every support and query loss on the way; behind them, of every tensor of fast weights and of what
            the last query pass used, the largest absolute value. What of these is NaN or Inf fails the iteration.
        statistics: what plugins kept, by plugin and name.
        outcome: how the tasks of this rank were adapted; everything else is over all ranks. None where it was not kept.
    """

    gradients: Mapping[str, Tensor]
    outer_loss: Tensor
    losses: Tensor
    statistics: Mapping[str, Mapping[str, Tensor]]
    outcome: Outcome | None


@dataclass(frozen=True)
class MetaStep:
    """One meta-update: its iteration (counted from 1 once done), outer loss, norm of the meta-gradient, the meta learning rate of the
    model's weights, and the plugins' figures. Of a batch that was skipped, `skipped` says why: nothing was updated, and the loss or the
    norm may be NaN or Inf."""

    iteration: int
    outer_loss: float
    meta_gradient_norm: float
    meta_lr: float
    figures: Mapping[str, float]
    skipped: str | None = None


_NO_DERIVATIVE = (
    f"every loss on the way was finite: an operation of the model or of a plugin {NO_DERIVATIVE}"
)

Derivation = Callable[[TaskBatch, int, int, Mapping[int, float]], MetaGradients]
"""(batch, iteration, total, outer weights) → what `Engine.derive` gives for them."""


class Engine:
    """Runs meta-iterations for one model and one chain.

    Args:
        model: its trainable parameters are meta-learned, in place.
        chain: set up already, so that the plugins' meta-parameters exist.
        inner: the inner loop over the same model and chain.
        meta_optimizer: a name in META_OPTIMIZERS.
        meta_lr: its rate for the model, and for plugins that set none of their own.
        seed: of every random number that a step draws.
        world: the processes that the tasks of a batch are spread over; each is given its own.
    """

    def __init__(
        self,
        model: nn.Module,
        chain: Chain,
        inner: InnerLoop,
        *,
        meta_optimizer: str,
        meta_lr: float,
        seed: int,
        world: World = ALONE,
    ) -> None:
        self.chain, self.inner, self.seed, self.world = chain, inner, seed, world
        self.iteration = 0
        self.total = 0
        """The iterations of the whole run that the last meta-update belonged to; 0 before the first. Schedules depend on it."""
        self.outputs: int | None = None
        """The number of classes that the model tells apart, once it is known; labels are checked against it."""
        self.derivation: Derivation | None = None
        """What takes the place of `derive`, the same numbers with another cost; on several ranks only where no plugin couples tasks."""
        self.skipped, self.skipped_in_a_row = 0, 0
        """Batches that were skipped so far, and those of them that were the last."""
        self.deterministic = False
        """Whether torch may only take algorithms that give the same bits every time."""
        self.device = next(model.parameters()).device
        own = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self.meta_parameters: dict[str, nn.Parameter] = {**own, **chain.named_parameters()}
        groups = [(list(own.values()), meta_lr)]
        groups += [
            (list(plugin.parameters()), meta_lr if plugin.meta_lr is None else plugin.meta_lr)
            for plugin in chain.plugins
        ]
        self._rates = [lr for parameters, lr in groups if parameters]
        make = META_OPTIMIZERS[meta_optimizer]
        self.optimizer = make(
            [{"params": parameters, "lr": lr} for parameters, lr in groups if parameters]
        )

    def meta_gradients(self, batch: TaskBatch, iteration: int, total: int) -> MetaGradients:
        """The meta-gradients of one batch, as iteration `iteration` of a run of `total` would use them. Steps and commits nothing."""
        with self._computing(mix(self.seed, iteration, *self.world.salt)) as generator, recording():
            transformed = self.chain.fold(
                "transform_tasks", batch, iteration=iteration, generator=generator
            )
            if transformed is not batch:
                transformed.check_labels(self.outputs)
            batch = transformed
            share = self.world.share(batch.num_tasks)
            weights = self._outer_weights(iteration, total)
            if self.derivation is not None:
                found = self.derivation(batch, iteration, total, weights)
            else:
                found = self.derive(batch, iteration, total, weights, share=share)
            if share is not None:
                found = self._over_ranks(found, share)
            with self._common_stream(iteration):
                gradients = self.chain.fold(
                    "transform_meta_gradients", found.gradients, iteration=iteration
                )
        return replace(found, gradients=gradients)

    def derive(
        self,
        batch: TaskBatch,
        iteration: int,
        total: int,
        weights: Mapping[int, float],
        *,
        orders: Sequence[int] | None = None,
        share: Share | None = None,
    ) -> MetaGradients:
        """The meta-gradients of a batch as the loop gives them, before they are transformed.

        Args:
            weights: of the query losses, by the number of updates done before.
            orders: derivative orders of the inner steps, where they are known already.
            share: what these tasks are of those of all ranks.
        """
        outcome = self.inner.run(
            batch,
            steps=self.inner.inner_steps,
            training=True,
            iteration=iteration,
            total=total,
            query_after=weights,
            share=share,
            orders=orders,
        )
        losses = torch.stack(
            [weight * outcome.query_losses[after] for after, weight in weights.items()]
        ).sum(0)
        outer_loss = self.chain.fold(
            "transform_outer_losses", losses, outcome=outcome, iteration=iteration
        ).mean()
        replaced = self.chain.choose(
            "compute_meta_gradients",
            None,
            outcome=outcome,
            outer_loss=outer_loss,
            meta_parameters=MappingProxyType(self.meta_parameters),
            learned=tuple(self.chain.named_parameters()),
            iteration=iteration,
        )
        watch = self.chain.watch
        if watch is not None:
            watch.look(
                {"outer loss": outer_loss},
                lambda fault: f"the mean over tasks is {fault}",
                "its terms were finite: make them smaller",
            )
        gradients = self._differentiate(outer_loss) if replaced is None else dict(replaced)
        if self.inner.checkpoint_steps is not None:
            self.inner.release()  # steps that were taken again for their graph have left their weights there
        if watch is not None:
            watch.look(
                gradients,
                lambda fault: f"the meta-gradient holds {fault} in iteration {int(iteration)}",
                _NO_DERIVATIVE,
            )
        on_the_way = [
            loss.detach().mean()
            for loss in (*outcome.support_losses, *outcome.query_losses.values())
        ]
        on_the_way += [largest.to(outer_loss.dtype) for largest in self._largest(outcome)]
        return MetaGradients(
            gradients, outer_loss.detach(), torch.stack(on_the_way), outcome.statistics, outcome
        )

    def meta_step(self, batch: TaskBatch, total: int, *, skip: bool = False) -> MetaStep:
        """One meta-update on `batch`, in a run of `total` iterations.

        Args:
            skip: leave a batch out, and count it, where something is NaN or Inf: nothing is updated or committed.

        Raises:
            RunError: something is NaN or Inf, and is not to be skipped, or so many batches were before; nothing was updated.
        """
        iteration, found, failure = self.iteration, None, None
        outer_loss, norm, finite = math.nan, math.nan, 0.0
        try:
            found = self.meta_gradients(batch, iteration, total)
            outer_loss, norm, finite = self.told(found, batch if skip else None).tolist()
        except RankError:
            raise
        except (
            FAILURES
        ) as error:  # a plugin or the model may have failed on NaN that something else had made
            if self.world.size > 1:
                raise
            failure = error
        if found is None or not finite:
            text = culprit(self, batch, failure, total, alone=not skip)
            self._skip(text, total)
            return MetaStep(
                self.iteration,
                outer_loss,
                norm,
                self._rates[0] * self._factor(iteration, total),
                {},
                text,
            )
        meta_lr = self.update(found, total)
        return MetaStep(
            self.iteration, outer_loss, norm, meta_lr, self.chain.figures(iteration, total)
        )

    def _skip(self, text: str, total: int) -> None:
        """Count one iteration that updates nothing.

        Raises:
            RunError: it is the last of too many.
        """
        if self.skipped_in_a_row + 1 >= SKIPS_IN_A_ROW:
            raise RunError(
                f"iteration {self.iteration} stopped, nothing was updated: {SKIPS_IN_A_ROW} batches in a row would be skipped, which is no "
                f"fault of a batch; the last because {text}"
            )
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self.iteration, self.total = self.iteration + 1, total

    def update(self, found: MetaGradients, total: int) -> float:
        """Step, commit and count one iteration; the meta learning rate of the model's weights."""
        iteration = self.iteration
        factor = self._factor(iteration, total)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        for name, parameter in self.meta_parameters.items():
            parameter.grad = found.gradients.get(name)
        with (
            recording()
        ):  # under inference_mode the optimizer would make a state that no later step can change
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.chain.commit(found.statistics, iteration)
        self.iteration, self.total, self.skipped_in_a_row = iteration + 1, total, 0
        meta_lr: float = self.optimizer.param_groups[0]["lr"]
        return meta_lr

    def _factor(self, iteration: int, total: int) -> float:
        """Of every meta learning rate, as schedules have it."""
        factor: float = self.chain.fold(
            "scale_meta_learning_rate", 1.0, iteration=iteration, total=total
        )
        return factor

    def evaluate(self, batch: TaskBatch, steps: int) -> Outcome:
        """Adapt test tasks. No graph, no state, no random stream of the caller's is touched."""
        with self._computing(mix(self.seed)):
            return self.inner.run(
                batch,
                steps=steps,
                training=False,
                iteration=self.iteration,
                total=self.total,
                query_after={steps},
            )

    @contextmanager
    def _computing(self, seed: int) -> Iterator[torch.Generator]:
        """Inside, random numbers start from a seed, and torch rounds and chooses its algorithms as configured."""
        rounding = arithmetic(self.inner.precision, self.device)
        with stream(seed, self.device) as generator, rounding, repeatable(self.deterministic):
            yield generator

    def adapted_losses(self, outcome: Outcome) -> Tensor:
        """(T,) support losses of test tasks after their last update: one more forward pass."""
        with self._computing(mix(self.seed)):
            return self.inner.adapted_losses(outcome)

    def _outer_weights(self, iteration: int, total: int) -> dict[int, float]:
        """By the number of updates done before the query loss, the weight of that loss; only those that count."""
        steps = self.inner.inner_steps
        if steps == 0:
            return {0: 1.0}
        chosen = self.chain.choose(
            "outer_step_weights",
            [0.0] * (steps - 1) + [1.0],
            iteration=iteration,
            inner_steps=steps,
            total=total,
        )
        return {after: weight for after, weight in enumerate(chosen, 1) if weight}

    def _differentiate(self, outer_loss: Tensor) -> dict[str, Tensor]:
        if not outer_loss.requires_grad:
            raise RunError(
                "no meta-gradient: the outer loss depends on no trainable parameter; let the model's output depend on one"
            )
        try:
            taken = torch.autograd.grad(
                outer_loss, list(self.meta_parameters.values()), allow_unused=True
            )
        except RuntimeError as error:
            raise _not_differentiable(error) from error
        return {
            name: gradient
            for name, gradient in zip(self.meta_parameters, taken, strict=True)
            if gradient is not None
        }

    def _over_ranks(self, found: MetaGradients, share: Share) -> MetaGradients:
        """The same over the tasks of all ranks. A gradient that is missing on a rank counts as zero there."""
        kept = {
            (plugin, name): tensor
            for plugin, tensors in found.statistics.items()
            for name, tensor in tensors.items()
        }
        if whole := [
            f"{plugin}.{name}"
            for (plugin, name), tensor in kept.items()
            if not tensor.is_floating_point()
        ]:
            raise RunError(
                f"plugins keep {quoted(whole)} as whole numbers, which have no mean over ranks: keep floating-point tensors"
            )
        form = ", ".join(
            f"{plugin}.{name} {tuple(tensor.shape)} {tensor.dtype}"
            for (plugin, name), tensor in kept.items()
        )
        present = self.world.any(
            *(name in found.gradients for name in self.meta_parameters), form=form
        )
        names = [
            name for name, somewhere in zip(self.meta_parameters, present, strict=True) if somewhere
        ]
        own = [
            found.gradients[name]
            if name in found.gradients
            else torch.zeros_like(self.meta_parameters[name])
            for name in names
        ]
        outer_loss, losses, *means = share.means(
            [found.outer_loss, found.losses, *own, *kept.values()]
        )
        statistics: dict[str, dict[str, Tensor]] = {}
        for (plugin, name), mean in zip(kept, means[len(names) :], strict=True):
            statistics.setdefault(plugin, {})[name] = mean
        return MetaGradients(
            dict(zip(names, means, strict=False)), outer_loss, losses, statistics, found.outcome
        )

    @contextmanager
    def _common_stream(self, iteration: int) -> Iterator[None]:
        """Inside, the ranks draw the same random numbers, or their weights would part."""
        if self.world.size == 1:
            yield
            return
        with stream(mix(self.seed, iteration, self.world.size), self.device):
            yield

    def _largest(self, outcome: Outcome) -> Iterator[Tensor]:
        """() each: the largest absolute value of every tensor of weights that the last query pass used or the loop made."""
        made = [outcome.adapted_parameters[name] for name in self.inner.adapted]
        used = [
            value
            for name, value in outcome.query_parameters.items()
            if value is not outcome.adapted_parameters[name]
        ]
        return (
            torch.linalg.vector_norm(value.detach(), math.inf)
            for value in (*made, *used)
            if value.numel()
        )

    def told(self, found: MetaGradients, batch: TaskBatch | None) -> Tensor:
        """(3,): outer loss, norm of the meta-gradient, and 1 where these, all on the way, what is kept and `batch` are finite.

        With a batch, whose tasks are other ones on other ranks, the ranks agree.
        """
        norm = torch.nn.utils.get_total_norm(found.gradients.values())
        kept = [
            tensor
            for tensors in found.statistics.values()
            for tensor in tensors.values()
            if tensor.is_floating_point()
        ]
        single = [
            norm,
            found.outer_loss,
            *([torch.nn.utils.get_total_norm(kept, math.inf)] if kept else []),
        ]
        finite = torch.isfinite(
            torch.cat([torch.stack([value.to(norm) for value in single]), found.losses.to(norm)])
        ).all()
        if batch is not None:
            for tensor in (batch.support_x, batch.support_y, batch.query_x, batch.query_y):
                finite = finite & torch.isfinite(tensor).all()
            finite = self.world.sum((~finite).to(norm.dtype)) == 0
        return torch.stack([found.outer_loss.to(norm), norm, finite.to(norm.dtype)])


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
