"""The contract between metaplug and its plugins: every hook, in the order of a meta-step.

Write a method of the same name, marked `@hookimpl`, with any subset of the arguments. The kinds:

* **fold**: called in the order of the configured list; each plugin receives what the one before
  returned. Return a new value, or None for "unchanged". Never write into what you were given.
  Names, shapes, dtypes and device are checked after every link.
* **choose**: at most one plugin answers; return None for "not me".
* **collect**: every answer counts.
* **notify**: no answer.

Hooks inside the loop (all that receive a `step`) write no state: they may run again, or for
nothing. Hand statistics to `step.keep` and store them in `commit`. A decision that depends on state
is a tensor (`torch.where`), never a Python branch.

The contract only grows: a new argument goes after the others, and no hook, argument or field is
renamed or removed. What is to go is first deprecated, by `warn_on_impl` or `warn_on_impl_args` on
its spec with a FutureWarning, which is shown at the plugin's own line.
T is the number of tasks, K the number of inner steps.

>>> KINDS["transform_gradients"], KINDS["derivative_order"], WHEN["setup"]
('fold', 'choose', 'once, when a learner is made')
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pluggy
import torch
from torch import Tensor, nn

from metaplug.contract.inner_step import InnerStep
from metaplug.contract.outcome import Outcome
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.values import Context, Gradients, LearningRates, Parameters

F = TypeVar("F", bound=Callable[..., Any])
_hookspec = pluggy.HookspecMarker("metaplug")

KINDS: dict[str, str] = {}
"""Every hook's kind, by name: "fold", "choose", "collect" or "notify"."""
WHEN: dict[str, str] = {}
"""When every hook is called, by name, in words."""
_MOMENTS: list[str] = []
"""The last is that of the hooks that are declared below it."""


def _declare(kind: str) -> Callable[[F], F]:
    def mark(function: F) -> F:
        KINDS[function.__name__], WHEN[function.__name__] = kind, _MOMENTS[-1]
        return _hookspec(function)

    return mark


fold, choose, collect, notify = (_declare(kind) for kind in ("fold", "choose", "collect", "notify"))


_MOMENTS.append("once, when a learner is made")


@fold
def select_adapted(
    names: tuple[str, ...], layers: Mapping[str, type[nn.Module]]
) -> tuple[str, ...] | None:
    """The parameters that the inner loop adapts: a subset of `names`; at first all trainable ones.

    What is left out is still meta-learned. Frozen parameters (requires_grad False) are neither
    adapted nor meta-learned. `layers` has, by name, the class of the module of a parameter.
    """


@notify
def setup(context: Context) -> None:
    """Create your nn.Parameters and buffers here, with `context.dtype` and `context.device`.

    torch's random numbers start from the run's seed and your plugin's name.
    """


@collect
def task_parameters(context: Context) -> Mapping[str, Tensor] | None:
    """The starts, by name, of variables of your own that the inner loop adapts in every task.

    They appear everywhere as PLUGIN.NAME, (T, *shape), and reach the model by your
    `transform_parameters`. An nn.Parameter of yours, under its own name, is a start that is
    meta-learned; a plain tensor is a constant one. Called after your `setup`. Of other plugins'
    variables `context` has those of plugins earlier in the list: one with a value for everything
    that adapts, such as a velocity, stands after them.
    """


_MOMENTS.append("in every meta-training iteration, before adaptation")


@fold
def transform_tasks(
    batch: TaskBatch, iteration: int, generator: torch.Generator, outputs: int | None
) -> TaskBatch | None:
    """Augment, relabel or mix meta-training batches; draw from `generator` (CPU) only.

    `outputs` is the number of classes that the model tells apart, which labels that become
    probabilities have; None in regression.
    """


_MOMENTS.append("once for every batch of training and of evaluation, before the first inner step")


@fold
def initialize_parameters(parameters: Parameters, step: InnerStep) -> Parameters | None:
    """Every task's own start, (T, *shape), differentiable: from its support set by `step.forward`.

    `parameters` has the plugins' task parameters too, as PLUGIN.NAME, which may start anew as well.
    `step` is the first one. The loop, and the query pass of a loop of no steps, go on from it.
    """


_MOMENTS.append("in every inner step k, of training and of evaluation")


@fold
def transform_parameters(parameters: Parameters, step: InnerStep) -> Parameters | None:
    """Values that a forward pass uses, (T, *shape); the query pass after update k gets step k."""


@fold
def transform_inner_losses(losses: Tensor, step: InnerStep) -> Tensor | None:
    """(T,) support losses: add a regulariser."""


@choose
def derivative_order(step: InnerStep) -> int | None:
    """2 (default), 1: no meta-gradient flows through this step's gradients; in training.

    0: none flows through the step at all, which then keeps no graph. It needs a plugin that answers
    `compute_meta_gradients`. Decide by the step's index and iteration: it has no parameters yet.
    """


@fold
def transform_gradients(gradients: Gradients, step: InnerStep) -> Gradients | None:
    """The inner gradients, (T, *shape) each, of the adapted parameters that received one."""


@fold
def transform_learning_rates(
    learning_rates: LearningRates, step: InnerStep
) -> LearningRates | None:
    """Learning rates by name, each broadcastable to (T, *shape); starts at the inner rate, ()."""


@choose
def update_parameters(
    parameters: Parameters, gradients: Gradients, learning_rates: LearningRates, step: InnerStep
) -> Parameters | None:
    """Replace the inner optimizer's update of the adapted `parameters`; answer all their names.

    A parameter that received no gradient has none in `gradients`: give it back as it is. An answer
    beside another inner optimizer than plain sgd is refused at the first update; to refuse it
    before, look at `context.inner_optimizer` in `setup`.
    """


_MOMENTS.append("in every meta-training iteration, after adaptation")


@choose
def outer_step_weights(iteration: int, inner_steps: int, total: int) -> Sequence[float] | None:
    """K weights over the query losses after each update, by default 1 for the last.

    A loss of weight 0 is not computed. `total` is the run's iterations; 0 where none has begun.
    """


@fold
def transform_outer_losses(losses: Tensor, outcome: Outcome) -> Tensor | None:
    """(T,) outer losses: add an outer regulariser. The meta-objective is their mean."""


@choose
def compute_meta_gradients(
    outcome: Outcome, outer_loss: Tensor, meta_parameters: Mapping[str, nn.Parameter]
) -> Mapping[str, Tensor] | None:
    """Replace differentiation through the loop. Answer by the names of `meta_parameters`.

    Those are the model's, and PLUGIN.NAME for a plugin's, of which none is left out. `outer_loss`
    () carries the graph of the loop, for what is still to be differentiated. A rule over the
    gradients of single tasks differentiates `outcome.outer_losses` (T,), of which it is the mean:
    other plugins' outer losses are in them, which `outcome.query_losses` lack.
    """


@fold
def transform_meta_gradients(
    gradients: Mapping[str, Tensor], iteration: int
) -> Mapping[str, Tensor] | None:
    """Meta-gradients by name, without a task axis: clip, project, precondition."""


@fold
def scale_meta_learning_rate(factor: float, iteration: int, total: int) -> float | None:
    """A factor >= 0 on every meta learning rate, starting at 1, in a run of `total` iterations."""


@notify
def commit(kept: Mapping[str, Tensor]) -> None:
    """Store the statistics of this iteration, by the names you gave, after the meta-update."""


@collect
def end_meta_step(iteration: int, total: int) -> Mapping[str, float] | None:
    """Figures by name to log after the meta-update of `iteration`, counted from 0."""
