"""The contestants that need no library beside `higher`: plain loops, and metaplug in every mode."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import higher
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from metaplug.bench.meters import in_tf32
from metaplug.bench.workloads import Workload
from metaplug.contract.plugin import Plugin, hookimpl
from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import RequestError
from metaplug.execution.batching import Batching
from metaplug.learner import MetaLearner
from metaplug.training.assemble import LOSSES

T = TypeVar("T")
MetaGradient = Mapping[str, Tensor]
OuterLoss = Callable[[nn.Module, TaskBatch, Workload], Tensor]


@dataclass(frozen=True)
class Prepared:
    """A contestant that is ready to be measured.

    Attributes:
        step: makes one whole step.
        gradient: gives the meta-gradient at the first weights; called once, on a copy of its own.
        graph: gives what holds the whole graph of a step; None where there never is one.
        torch_memory: whether torch's allocator sees what a step takes: not another library's
            arrays, nor a captured step, which holds its memory all along.
    """

    step: Callable[[], object]
    gradient: Callable[[], MetaGradient]
    graph: Callable[[], object] | None = None
    torch_memory: bool = True


@dataclass(frozen=True)
class Contestant:
    """One row of the bench: how it is prepared, and whether its meta-gradient must be the loop's.

    The failures of one that needs the `module` of others are a row, not an error.
    """

    prepare: Callable[[nn.Module, TaskBatch, Workload], Prepared]
    same_algorithm: bool = True
    module: str | None = None


def own_contestants(
    plugins: Sequence[str], *, compiled: bool = False, captured: bool = False
) -> dict[str, Contestant]:
    """Return plain loops and metaplug by name, with a row for each plugin."""
    made = {
        "plain torch loop": Contestant(partial(by_loss, torch_loop)),
        "higher, task by task": Contestant(_higher),
        "stacked by hand": Contestant(partial(by_loss, stacked)),
    }

    def ours(mode: str, *, same: bool = True, **settings: Any) -> None:
        made[f"metaplug{mode}"] = Contestant(partial(by_metaplug, **settings), same)

    for batching in ("vectorized", "sequential", "auto"):
        ours(f", {batching}", task_batching=batching)
    for plugin in plugins:
        ours(f" + {plugin}", same=False, plugins=[plugin])
    ours(" without its chain", chainless=True)
    ours(", first order", same=False, plugins=["derivative-order"])
    ours(", recomputed steps", checkpoint_steps=1)
    ours(", chunks of 4", chunk_size=4)
    if compiled:
        ours(", compiled", compile=True)
        for plugin in plugins:
            ours(f" + {plugin}, compiled", same=False, plugins=[plugin], compile=True)
    if captured:
        ours(", captured", capture=True)
    if captured and compiled:
        ours(", compiled and captured", compile=True, capture=True)
    # The published maml++ begins in first order, which would not show what its steps cost.
    ours(", maml++-reference", same=False, preset="maml++-reference")
    return made


class _KeepGraph(Plugin):
    """Keeps the outer losses with their graph, and gives the engine nothing to differentiate."""

    @hookimpl
    def setup(self, context: Any) -> None:
        self.zero = nn.Parameter(torch.zeros((), dtype=context.dtype, device=context.device))

    @hookimpl
    def transform_outer_losses(self, losses: Tensor, outcome: Any) -> Tensor:
        self.losses = losses
        return losses.detach() + self.zero


def by_metaplug(
    model: nn.Module,
    batch: TaskBatch,
    workload: Workload,
    *,
    task_batching: Batching = "vectorized",
    preset: str | None = None,
    plugins: Sequence[str] = (),
    chainless: bool = False,
    **runtime: Any,
) -> Prepared:
    """Prepare metaplug as a user runs it; `chainless` takes the calls of hooks out."""
    # A learner sees to its own precision, whatever is set around it.
    single = next(model.parameters()).dtype == torch.float32
    tf32 = single and in_tf32(batch.device)
    rounding: dict[str, Any] = {"precision": "tf32"} if tf32 else {}

    def learner(*more: Plugin) -> MetaLearner:
        return MetaLearner(
            model,
            preset=preset,
            plugins=[*plugins, *more],
            kind=workload.kind,
            inner_steps=workload.inner_steps,
            inner_lr=workload.inner_lr,
            task_batching=task_batching,
            **runtime,
            **rounding,
        )

    def graph() -> Tensor:
        keeper = _KeepGraph()
        learner(keeper).meta_gradients(batch)
        return keeper.losses

    class Same:
        split = "train"

        def batch(self, iteration: int, indices: Sequence[int]) -> TaskBatch:
            return batch

    ours = learner()
    if chainless:
        ours.chain.fold = lambda hook, value, **_: value  # type: ignore[method-assign]
        ours.chain.choose = lambda hook, default, **_: default  # type: ignore[method-assign]
    steps = ours.iterate(Same(), iterations=sys.maxsize, tasks_per_batch=workload.tasks)
    traced = bool(runtime.keys() & {"compile", "capture"})
    return Prepared(
        step=lambda: _as_asked(lambda: next(steps)) if traced else next(steps),
        gradient=lambda: _as_asked(lambda: ours.meta_gradients(batch)),
        graph=None if runtime else graph,  # another runtime changes what is kept, and when
        torch_memory=not runtime.get("capture", False),
    )


def _as_asked(work: Callable[[], T]) -> T:
    """Refuse a step that is compiled or captured in name only."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = work()
    for warning in told:
        if (text := str(warning.message)).startswith("steps are not "):
            raise RequestError(f"refused, so its steps would be as without: {text}")
    return result


def by_loss(
    outer_loss: OuterLoss, model: nn.Module, batch: TaskBatch, workload: Workload
) -> Prepared:
    """Prepare a contestant that gives the outer loss of all tasks together."""
    weights = trainable(model)

    def gradient() -> MetaGradient:
        loss = outer_loss(model, batch, workload)
        return dict(zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True))

    return by_gradient(model, gradient, graph=lambda: outer_loss(model, batch, workload))


def by_gradient(
    model: nn.Module,
    gradient: Callable[[], MetaGradient],
    graph: Callable[[], object] | None = None,
) -> Prepared:
    """Prepare a contestant that gives the meta-gradient, in the order of the parameters."""
    parameters = [*trainable(model).values()]
    optimizer = torch.optim.Adam(parameters, 1e-3)

    def step() -> None:
        for parameter, found in zip(parameters, gradient().values(), strict=True):
            parameter.grad = found
        optimizer.step()

    return Prepared(step, gradient, graph)


def task_by_task(
    model: nn.Module, batch: TaskBatch, query_loss: Callable[[int], Tensor]
) -> Prepared:
    """Prepare a contestant that gives one task's query loss; each graph goes before the next."""

    def gradient() -> MetaGradient:
        model.zero_grad()
        for task in range(batch.num_tasks):
            (query_loss(task) / batch.num_tasks).backward()
        return gradients_of(model)

    return by_gradient(model, gradient)


def gradients_of(model: nn.Module) -> MetaGradient:
    """Return what a backward pass left in the parameters."""
    found = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return {name: gradient for name, gradient in found if gradient is not None}


def torch_loop(model: nn.Module, batch: TaskBatch, workload: Workload) -> Tensor:
    """The mean query loss by a plain loop over tasks: every other meta-gradient is held to it."""
    loss, weights = _functional(model, workload), trainable(model)
    tasks = zip(*tensors_of(batch), strict=True)
    return torch.stack([_adapted(loss, weights, task, workload) for task in tasks]).mean()


def stacked(
    model: nn.Module,
    batch: TaskBatch,
    workload: Workload,
    start: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The engine's own computation without hooks or checks: the floor for a chain of plugins."""
    tasks = batch.num_tasks
    initial = trainable(model) if start is None else start
    weights = {name: value.expand(tasks, *value.shape) for name, value in initial.items()}
    loss = torch.vmap(_functional(model, workload))
    return _adapted(loss, weights, tensors_of(batch), workload).mean()


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return by name the parameters that are adapted and meta-learned; frozen ones are neither."""
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def tensors_of(batch: TaskBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the tensors of a batch in the order in which TaskBatch takes them."""
    return batch.support_x, batch.support_y, batch.query_x, batch.query_y


def _functional(model: nn.Module, workload: Workload) -> Callable[..., Tensor]:
    """Return the loss of one task as a function of weights, x and y."""
    loss, call = LOSSES[workload.kind], torch.func.functional_call
    return lambda weights, x, y: loss(call(model, weights, (x,)), y)


def _adapted(
    loss: Callable[..., Tensor],
    weights: Mapping[str, Tensor],
    tensors: Sequence[Tensor],
    workload: Workload,
) -> Tensor:
    """Return the query loss after the inner loop, of one task or stacked ones alike."""
    support_x, support_y, query_x, query_y = tensors
    for _ in range(workload.inner_steps):
        support = loss(weights, support_x, support_y)
        total = support.sum() if support.dim() else support
        gradients = torch.autograd.grad(total, [*weights.values()], create_graph=True)
        weights = {
            name: weight - workload.inner_lr * gradient
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
    return loss(weights, query_x, query_y)


def compiled(model: nn.Module, batch: TaskBatch, workload: Workload) -> Prepared:
    """Trace and compile the stacked loop with its meta-gradient: half a minute, or minutes."""
    parameters = trainable(model)

    def gradients(values: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        start = dict(zip(parameters, values, strict=True))
        return torch.autograd.grad(stacked(model, TaskBatch(*tensors), workload, start), values)

    tensors = tensors_of(batch)
    leaves = [parameter.detach().requires_grad_() for parameter in parameters.values()]
    function = torch.compile(make_fx(gradients)(leaves, *tensors))

    def gradient() -> MetaGradient:
        with torch.no_grad():
            values = [parameter.detach() for parameter in parameters.values()]
            return dict(zip(parameters, function(values, *tensors), strict=True))

    return by_gradient(model, gradient)


def _higher(model: nn.Module, batch: TaskBatch, workload: Workload) -> Prepared:
    loss, weights = LOSSES[workload.kind], trainable(model).values()
    inner = torch.optim.SGD(weights, lr=workload.inner_lr)

    def query_loss(task: int) -> Tensor:
        with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (network, optimizer):
            for _ in range(workload.inner_steps):
                optimizer.step(loss(network(batch.support_x[task]), batch.support_y[task]))
            return loss(network(batch.query_x[task]), batch.query_y[task])

    return task_by_task(model, batch, query_loss)
