"""The contract between metaplug and its plugins: every hook, in the order in which a meta-step calls them.

Write a method of the same name, marked `@hookimpl`, and name the arguments that you need (any subset). There are four kinds:

* **fold**: called in the order of the configured list; each plugin receives what the one before returned. Return a new value, or None for
  "unchanged". Never write into what you were given. After every link names, shapes, dtypes and device are checked.
* **choose**: at most one plugin answers; return None for "not me".
* **collect**: every answer counts.
* **notify**: no answer.

Hooks inside the loop (all that receive a `step`) write no state: they may run again, or for nothing. Hand statistics to `step.keep` and
store them in `commit`. A decision that depends on state is a tensor (`torch.where`), never a Python branch.

The contract only grows: a new argument goes behind the others, and no hook, argument or field is renamed or taken away. What is to go is
first deprecated, by `warn_on_impl` or `warn_on_impl_args` on its spec with a FutureWarning, which is shown at the plugin's own line.
T is the number of tasks, K the number of inner steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pluggy
import torch
from torch import Tensor, nn

from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.values import (
    Context,
    Gradients,
    InnerStep,
    LearningRates,
    Outcome,
    Parameters,
)

F = TypeVar("F", bound=Callable[..., Any])
_hookspec = pluggy.HookspecMarker("metaplug")

KINDS: dict[str, str] = {}
"""Every hook's kind, by name: "fold", "choose", "collect" or "notify"."""


def _declare(kind: str) -> Callable[[F], F]:
    def mark(function: F) -> F:
        KINDS[function.__name__] = kind
        return _hookspec(function)

    return mark


fold, choose, collect, notify = (_declare(kind) for kind in ("fold", "choose", "collect", "notify"))


# Once, when a learner is made.


@fold
def select_adapted(
    names: tuple[str, ...], layers: Mapping[str, type[nn.Module]]
) -> tuple[str, ...] | None:
    """Which parameters the inner loop adapts: a subset of `names`, in any order. Starts with every trainable parameter of the model.

    What is left out is still meta-learned. Frozen parameters (requires_grad False) are neither adapted nor meta-learned.
    `layers` has, by name, the class of the module that a parameter belongs to.
    """


@notify
def setup(context: Context) -> None:
    """Create your meta-parameters (nn.Parameter) and statistics (buffers) here, with `context.dtype` and `context.device`."""


# In every meta-training iteration, before adaptation.


@fold
def transform_tasks(
    batch: TaskBatch, iteration: int, generator: torch.Generator
) -> TaskBatch | None:
    """Meta-training batches before adaptation: augmentation, label noise, mixing. Draw from `generator` (CPU) only."""


# In every inner step k of training and of evaluation.


@fold
def transform_parameters(parameters: Parameters, step: InnerStep) -> Parameters | None:
    """The values that a forward pass uses, (T, *shape) each; support, and query (the query pass after update k gets step k)."""


@fold
def transform_inner_losses(losses: Tensor, step: InnerStep) -> Tensor | None:
    """(T,) support losses: add a regulariser."""


@choose
def derivative_order(step: InnerStep) -> int | None:
    """2 (the default) or 1: whether meta-gradients flow through this step's gradients. Meta-training only."""


@fold
def transform_gradients(gradients: Gradients, step: InnerStep) -> Gradients | None:
    """The inner gradients, (T, *shape) each, of the adapted parameters that received one."""


@fold
def transform_learning_rates(
    learning_rates: LearningRates, step: InnerStep
) -> LearningRates | None:
    """Learning rates by name, each broadcastable to (T, *shape). Starts at the inner learning rate, a tensor of shape ()."""


# In every meta-training iteration, after adaptation.


@choose
def outer_step_weights(iteration: int, inner_steps: int, total: int) -> Sequence[float] | None:
    """K weights over the query losses after each update (default: 1 for the last). A query loss of weight 0 is not computed.

    `total` is the iterations of the whole run; 0 where none has begun.
    """


@fold
def transform_outer_losses(losses: Tensor, outcome: Outcome) -> Tensor | None:
    """(T,) outer losses: add an outer regulariser. The meta-objective is their mean."""


@choose
def compute_meta_gradients(
    outcome: Outcome, outer_loss: Tensor, meta_parameters: Mapping[str, nn.Parameter]
) -> Mapping[str, Tensor] | None:
    """Replace differentiation through the loop. Answer by the names of `meta_parameters`: the model's, and PLUGIN.NAME for a plugin's.

    Leave no plugin's parameter out. `outer_loss` () carries the graph of the loop, for what is still to be differentiated.
    """


@fold
def transform_meta_gradients(
    gradients: Mapping[str, Tensor], iteration: int
) -> Mapping[str, Tensor] | None:
    """Meta-gradients by name, without a task axis: clip, project, precondition."""


@fold
def scale_meta_learning_rate(factor: float, iteration: int, total: int) -> float | None:
    """A schedule: a factor >= 0 on the meta learning rate of every group, starting at 1. `total` is the iterations of the whole run."""


@notify
def commit(kept: Mapping[str, Tensor]) -> None:
    """After a meta-update: store the statistics that you kept in this iteration, by the names you gave, into your buffers."""


@collect
def end_meta_step(iteration: int, total: int) -> Mapping[str, float] | None:
    """Figures to log after the meta-update of `iteration` (counted from 0), by name: gate values, learning rates, norms."""
