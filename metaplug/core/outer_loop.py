"""The outer loss of a batch and its gradients: the meta-gradients.

    L(θ, φ) = mean over t of Σ_i w_i · ℓ(f(query x_t; θ[t,i]), query y_t)

with θ the model's parameters and φ the plugins'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from metaplug.contract.chain import Chain
from metaplug.contract.inner_step import TaskShare
from metaplug.contract.outcome import Outcome
from metaplug.contract.return_checks import form
from metaplug.contract.schedule import iteration_text
from metaplug.contract.task_batch import TaskBatch
from metaplug.core.adaptation import adapt
from metaplug.core.autograd_graph import graph_leaves
from metaplug.core.inner_loop import InnerLoop
from metaplug.core.inner_update import NO_DERIVATIVE
from metaplug.errors import RequestError, RunError, did_you_mean, quoted

_NO_DERIVATIVE = (
    f"every loss on the way was finite: an operation of the model or of a plugin {NO_DERIVATIVE}"
)


@dataclass(frozen=True)
class MetaGradients:
    """The meta-gradients of one batch.

    Attributes:
        gradients: by name, each of its meta-parameter's shape.
        outer_loss: (), the loss that they belong to.
        losses: the mean over tasks of every support and query loss on the way; after them, of every
            tensor of fast weights, and of what the last query pass used, the smallest and the
            largest value. A non-finite value among these fails the iteration.
        statistics: what plugins kept, by plugin and name.
        outcome: how the tasks of this rank were adapted (everything else is over all ranks). None
            where it was not kept.
        told: what `Engine.told` makes of all this, where it came along; else None.
    """

    gradients: Mapping[str, Tensor]
    outer_loss: Tensor
    losses: Tensor
    statistics: Mapping[str, Mapping[str, Tensor]]
    outcome: Outcome | None
    told: Tensor | None = None


class OuterLoop:
    """Takes meta-gradients through an inner loop.

    Args:
        model: its trainable parameters are meta-learned.
        chain: set up already, so the plugins' meta-parameters exist.
        inner: the inner loop over the same model and chain.

    Attributes:
        meta_parameters: by the model's own names, and PLUGIN.NAME for a plugin's.
    """

    def __init__(self, model: nn.Module, chain: Chain, inner: InnerLoop) -> None:
        self.chain, self.inner = chain, inner
        self._knows_its_leaves = False
        self.meta_parameters: dict[str, nn.Parameter] = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        } | chain.named_parameters()

    def weights(self, iteration: int, total: int) -> dict[int, float]:
        """Return the weights of the query losses that count, by the number of updates before."""
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

    def derive(
        self,
        batch: TaskBatch,
        iteration: int,
        total: int,
        weights: Mapping[int, float | Tensor],
        *,
        orders: Sequence[int] | None = None,
        share: TaskShare | None = None,
    ) -> MetaGradients:
        """Differentiate through the inner loop of a batch; no hook has transformed the result yet.

        Args:
            weights: of the query losses, by the number of updates before.
            orders: derivative orders of the inner steps, where they are known already.
            share: the part that these tasks are of those of all ranks.
        """
        known: dict[str, Any] = {"orders": orders, "share": share}
        outcome, losses = self._outer_losses(batch, iteration, total, weights, **known)
        outer_loss = losses.mean()
        self._refuse_unregistered(outer_loss)

        shared = outcome.model_parameters  # the outcome itself would hold on to itself

        def again(parameters: Mapping[str, Tensor]) -> Tensor:
            _check_parameters(parameters, shared)
            given = {**known, "parameters": parameters}
            return self._outer_losses(batch, iteration, total, weights, **given)[1].mean()

        outcome = replace(outcome, again=again, outer_losses=losses)
        replaced = self.chain.choose(
            "compute_meta_gradients",
            None,
            outcome=outcome,
            outer_loss=outer_loss,
            meta_parameters=MappingProxyType(self.meta_parameters),
            learned=tuple(self.chain.named_parameters()),
            iteration=iteration,
        )
        if replaced is None and 0 in outcome.derivative_orders:
            raise RunError(
                "derivative order 0 leaves no way from the outer loss to what tasks start from, so "
                "it would never learn: add a plugin that makes meta-gradients itself, such as "
                "reptile or imaml, or use order 1 or 2"
            )
        watch = self.chain.watch
        if watch is not None:
            watch.look(
                {"outer loss": outer_loss},
                lambda fault: f"the mean over tasks is {fault}",
                "its terms were finite: make them smaller",
            )
        gradients = self._differentiate(outer_loss) if replaced is None else dict(replaced)
        if watch is not None:
            where = f"in {iteration_text(iteration)}"
            watch.look(
                gradients, lambda fault: f"the meta-gradient holds {fault} {where}", _NO_DERIVATIVE
            )
        on_the_way = [
            loss.detach().mean()
            for loss in (*outcome.support_losses, *outcome.query_losses.values())
        ]
        on_the_way += [end.to(outer_loss.dtype) for end in self._ends(outcome)]
        return MetaGradients(
            gradients, outer_loss.detach(), torch.stack(on_the_way), outcome.statistics, outcome
        )

    def _refuse_unregistered(self, outer_loss: Tensor) -> None:
        """Refuse, once, parameters that the outer loss depends on and that nothing would train."""
        if self._knows_its_leaves:
            return
        known = {id(parameter) for parameter in self.meta_parameters.values()}
        leaves = [leaf for leaf in graph_leaves(outer_loss) if isinstance(leaf, nn.Parameter)]
        if others := [leaf for leaf in leaves if id(leaf) not in known]:
            forms = ", ".join(str(tuple(leaf.shape)) for leaf in others)
            raise RequestError(
                "the outer loss depends on parameters that neither the model nor a plugin has as "
                f"its own (of shape {forms}), so that nothing would train them: make them in a "
                "plugin's setup, as attributes or in an nn.ParameterList, not in a Python list; or "
                "call requires_grad_(False) on them"
            )
        self._knows_its_leaves = True

    def _outer_losses(
        self,
        batch: TaskBatch,
        iteration: int,
        total: int,
        weights: Mapping[int, float | Tensor],
        **options: Any,
    ) -> tuple[Outcome, Tensor]:
        """Adapt the tasks, and return how, with their outer losses (T,)."""
        outcome = adapt(
            self.inner,
            batch,
            steps=self.inner.inner_steps,
            training=True,
            iteration=iteration,
            total=total,
            query_after=weights,
            **options,
        )
        weighted = [weight * outcome.query_losses[after] for after, weight in weights.items()]
        losses = self.chain.fold(
            "transform_outer_losses",
            torch.stack(weighted).sum(0),
            outcome=outcome,
            iteration=iteration,
        )
        return outcome, losses

    def _differentiate(self, outer_loss: Tensor) -> dict[str, Tensor]:
        if not outer_loss.requires_grad:
            raise RunError(
                "no meta-gradient: the outer loss depends on no trainable parameter; "
                "let the model's output depend on one"
            )
        wanted = list(self.meta_parameters.values())
        try:
            taken = torch.autograd.grad(outer_loss, wanted, allow_unused=True)
        except RuntimeError as error:
            links = self.chain.links("transform_inner_losses")
            owners = list(dict.fromkeys(link.plugin.name for link in links))
            raise _not_differentiable(error, owners) from error
        return {
            name: gradient
            for name, gradient in zip(self.meta_parameters, taken, strict=True)
            if gradient is not None
        }

    def _ends(self, outcome: Outcome) -> Iterator[Tensor]:
        """The ends, () each, of the tensors that the loop made or a query used."""
        made, used = outcome.adapted_parameters, outcome.query_parameters
        values = [made[name] for name in outcome.adapted]
        values += [value for name, value in used.items() if value is not made[name]]
        return (end for value in values if value.numel() for end in ends(value.detach()))


def ends(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value, () each, of at least one; NaN where one is NaN.

    Of complex values these are the absolute ones. On a CPU torch's maximum norm takes fifteen times
    as long.

    Example:
        >>> ends(torch.tensor([1.0, -3.0]))
        (tensor(-3.), tensor(1.))
    """
    low, high = torch.aminmax(values.abs() if values.is_complex() else values)
    return low, high


def _check_parameters(given: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
    for name, value in given.items():
        if name not in known:
            fault = f"an outer loss is asked for at '{name}', which is no parameter of the model"
            raise RequestError(f"{fault}: {did_you_mean(name, known)}")
        if value.shape != known[name].shape:
            raise RequestError(
                f"an outer loss is asked for at '{name}' of {form(value)}, not of "
                f"{form(known[name])}: give it without a task axis"
            )


def _not_differentiable(error: RuntimeError, owners: Sequence[str] = ()) -> RuntimeError:
    """Return the error of differentiating through the loop, in words for the user.

    Args:
        owners: the plugins that add to the inner loss.
    """
    if "3rd+ order" in str(error) and owners:
        return RunError(
            f"the meta-gradient is of third order in the inner loss of plugin {quoted(owners)} "
            f"({str(error).splitlines()[0].rstrip('.')}): a gradient in transform_inner_losses is "
            "not detached; add that of the regulariser in transform_gradients, by step.gradients, "
            "as docs/writing-a-plugin.md#a-regulariser-that-needs-a-gradient-or-a-second-pass shows"
        )
    if "a second time" in str(error):
        return RunError(
            "a plugin uses the support losses of a first-order step in what is differentiated, but "
            "their graph is gone: detach them in the plugin, or use second order"
        )
    if "derivative for" in str(error):
        return RunError(
            "second-order meta-gradients cannot be had of this model "
            f"({str(error).splitlines()[0]}): add the plugin derivative-order"
        )
    return error
