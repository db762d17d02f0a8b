"""The bilevel engine: adapt a batch, outer loss, meta-gradients, meta-update.

L(θ, φ) = mean over t of Σ_i w_i · ℓ(f(query x_t; θ[t,i]), query y_t)        θ the model's parameters, φ the plugins'
θ, φ ← meta-optimizer(∂L/∂θ, ∂L/∂φ)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from metaplug.chain import Chain
from metaplug.checks import non_finite
from metaplug.errors import RankError, RunError, quoted
from metaplug.inner import InnerLoop, recording
from metaplug.runtime.distributed import ALONE, Share, World
from metaplug.runtime.precision import arithmetic
from metaplug.runtime.seeding import mix, stream
from metaplug.tasks.batch import TaskBatch
from metaplug.values import Outcome

META_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
"""The optimizers of the outer loop, by name."""


@dataclass(frozen=True)
class MetaGradients:
    """What one meta-iteration found.

    Attributes:
        gradients: by name.
        outer_loss: (), that they belong to.
        losses: the mean over tasks of every support and query loss on the way.
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
    model's weights, and the plugins' figures."""

    iteration: int
    outer_loss: float
    meta_gradient_norm: float
    meta_lr: float
    figures: Mapping[str, float]


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
        rounding = arithmetic(self.inner.precision, self.device)
        with stream(mix(self.seed, iteration, *self.world.salt), self.device) as generator, recording(), rounding:
            transformed = self.chain.fold("transform_tasks", batch, iteration=iteration, generator=generator)
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
                gradients = self.chain.fold("transform_meta_gradients", found.gradients, iteration=iteration)
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
        losses = torch.stack([weight * outcome.query_losses[after] for after, weight in weights.items()]).sum(0)
        outer_loss = self.chain.fold("transform_outer_losses", losses, outcome=outcome, iteration=iteration).mean()
        replaced = self.chain.choose(
            "compute_meta_gradients",
            None,
            outcome=outcome,
            outer_loss=outer_loss,
            meta_parameters=MappingProxyType(self.meta_parameters),
            learned=tuple(self.chain.named_parameters()),
            iteration=iteration,
        )
        gradients = self._differentiate(outer_loss) if replaced is None else dict(replaced)
        if self.inner.checkpoint_steps is not None:
            self.inner.release()  # steps that were taken again for their graph have left their weights there
        if self.chain.check_finite and (fault := non_finite(gradients)):
            raise RunError(f"the meta-gradient holds {fault}, though every loss on the way was finite")
        on_the_way = torch.stack([loss.detach().mean() for loss in (*outcome.support_losses, *outcome.query_losses.values())])
        return MetaGradients(gradients, outer_loss.detach(), on_the_way, outcome.statistics, outcome)

    def meta_step(self, batch: TaskBatch, total: int) -> MetaStep:
        """One meta-update on `batch`, in a run of `total` iterations.

        Raises:
            RunError: a loss or a meta-gradient is NaN or Inf; nothing was updated.
        """
        iteration = self.iteration
        found = self.meta_gradients(batch, iteration, total)
        told = _told(found)
        if not bool(told[2]):
            raise self._culprit(batch, iteration, total)
        meta_lr = self._update(found, total)
        return MetaStep(self.iteration, float(told[0]), float(told[1]), meta_lr, self.chain.figures(iteration, total))

    def meta_steps(self, batches: Iterable[TaskBatch], total: int) -> list[MetaStep]:
        """One meta-update on each batch in turn, at least one; only behind the last the device is waited for, and plugins give figures.

        Raises:
            RunError: as meta_step; what was updated from that batch on is taken back.
        """
        begun, before = self.iteration, self._snapshot()
        done, told, rates = list[TaskBatch](), list[Tensor](), list[float]()
        for batch in batches:
            found = self.meta_gradients(batch, self.iteration, total)
            done.append(batch)
            told.append(_told(found))
            rates.append(self._update(found, total))
        rows = torch.stack(told).tolist()
        if not all(finite for *_, finite in rows):
            self._restore(before)
            return [self.meta_step(batch, total) for batch in done]
        steps = [
            MetaStep(begun + place, outer_loss, norm, rate, {})
            for place, ((outer_loss, norm, _), rate) in enumerate(zip(rows, rates, strict=True), 1)
        ]
        return [*steps[:-1], replace(steps[-1], figures=self.chain.figures(self.iteration - 1, total))]

    def _update(self, found: MetaGradients, total: int) -> float:
        """Step, commit and count one iteration; the meta learning rate of the model's weights."""
        iteration = self.iteration
        factor = self.chain.fold("scale_meta_learning_rate", 1.0, iteration=iteration, total=total)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        for name, parameter in self.meta_parameters.items():
            parameter.grad = found.gradients.get(name)
        with recording():  # under inference_mode the optimizer would make a state that no later step can change
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.chain.commit(found.statistics, iteration)
        self.iteration, self.total = iteration + 1, total
        meta_lr: float = self.optimizer.param_groups[0]["lr"]
        return meta_lr

    def _snapshot(self) -> tuple[Any, ...]:
        weights = {name: parameter.detach().clone() for name, parameter in self.meta_parameters.items()}
        states = [copy.deepcopy(plugin.state_dict()) for plugin in self.chain.plugins]
        return self.iteration, self.total, weights, states, copy.deepcopy(self.optimizer.state_dict())

    def _restore(self, snapshot: tuple[Any, ...]) -> None:
        self.iteration, self.total, weights, states, optimizer = snapshot
        with torch.no_grad():
            for name, weight in weights.items():
                self.meta_parameters[name].copy_(weight)
        for plugin, state in zip(self.chain.plugins, states, strict=True):
            plugin.load_state_dict(state)
        self.optimizer.load_state_dict(optimizer)

    def evaluate(self, batch: TaskBatch, steps: int) -> Outcome:
        """Adapt test tasks. No graph, no state, no random stream of the caller's is touched."""
        with stream(mix(self.seed), self.device), arithmetic(self.inner.precision, self.device):
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

    def _over_ranks(self, found: MetaGradients, share: Share) -> MetaGradients:
        """The same over the tasks of all ranks. A gradient that is missing on a rank counts as zero there."""
        kept = {(plugin, name): tensor for plugin, tensors in found.statistics.items() for name, tensor in tensors.items()}
        if whole := [f"{plugin}.{name}" for (plugin, name), tensor in kept.items() if not tensor.is_floating_point()]:
            raise RunError(f"plugins keep {quoted(whole)} as whole numbers, which have no mean over ranks: keep floating-point tensors")
        form = ", ".join(f"{plugin}.{name} {tuple(tensor.shape)} {tensor.dtype}" for (plugin, name), tensor in kept.items())
        present = self.world.any(*(name in found.gradients for name in self.meta_parameters), form=form)
        names = [name for name, somewhere in zip(self.meta_parameters, present, strict=True) if somewhere]
        own = [found.gradients[name] if name in found.gradients else torch.zeros_like(self.meta_parameters[name]) for name in names]
        outer_loss, losses, *means = share.means([found.outer_loss, found.losses, *own, *kept.values()])
        statistics: dict[str, dict[str, Tensor]] = {}
        for (plugin, name), mean in zip(kept, means[len(names) :], strict=True):
            statistics.setdefault(plugin, {})[name] = mean
        return MetaGradients(dict(zip(names, means, strict=False)), outer_loss, losses, statistics, found.outcome)

    @contextmanager
    def _common_stream(self, iteration: int) -> Iterator[None]:
        """Inside, the ranks draw the same random numbers, or their weights would part."""
        if self.world.size == 1:
            yield
            return
        with stream(mix(self.seed, iteration, self.world.size), self.device):
            yield

    def _culprit(self, batch: TaskBatch, iteration: int, total: int) -> RunError:
        """Replay the iteration with every value checked, and return the error that names the first to be NaN or Inf."""
        try:
            with self._checking():
                batch.check_values(None)
                self.meta_gradients(batch, iteration, total)
        except RankError as error:  # the rank that found it says what it is
            return error
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


def _told(found: MetaGradients) -> Tensor:
    """(3,): outer loss, norm of the meta-gradient, and 1 where these and all losses on the way are finite."""
    norm = torch.nn.utils.get_total_norm(found.gradients.values())
    finite = torch.isfinite(torch.stack([norm, found.outer_loss, *found.losses])).all()
    return torch.stack([found.outer_loss, norm, finite.to(norm.dtype)])


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
