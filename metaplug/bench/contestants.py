"""Who makes a meta-step without a library of others but `higher`: plain loops, and metaplug in every batching."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import higher
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from metaplug.bench.meters import in_tf32
from metaplug.bench.workloads import Workload
from metaplug.contract.task_batch import TaskBatch
from metaplug.core.inner_loop import Loss
from metaplug.errors import RequestError
from metaplug.execution.batching import Batching
from metaplug.learner import LOSSES, MetaLearner

MetaGradient = Mapping[str, Tensor]


@dataclass(frozen=True)
class Prepared:
    """A contestant, ready.

    Attributes:
        step: makes one whole step.
        gradient: gives the meta-gradient at the first weights, by the model's own names. Called at most once, on a copy of its own.
        graph: gives the graph that a step differentiates; None where it is never whole.
        torch_memory: whether torch's allocator tells what it takes: not for another library's arrays, nor for a captured step, which
            holds its memory all along.
    """

    step: Callable[[], object]
    gradient: Callable[[], MetaGradient]
    graph: Callable[[], object] | None = None
    torch_memory: bool = True


@dataclass(frozen=True)
class Contestant:
    """One row of the bench.

    Attributes:
        prepare: from a model of its own, a batch and a workload.
        same_algorithm: whether its meta-gradient has to be the plain loop's.
        module: what it needs to be installed, where that is not metaplug's own; its failures are then a row, not an error.
    """

    prepare: Callable[[nn.Module, TaskBatch, Workload], Prepared]
    same_algorithm: bool = True
    module: str | None = None


def own_contestants(
    plugins: Sequence[str], *, compiled: bool = False, captured: bool = False
) -> dict[str, Contestant]:
    """By name, the plain loops and metaplug; one more for each plugin, and for each plugin compiled where that is asked for.

    `captured` adds steps that are replayed from a CUDA graph, which only a CUDA device has.
    """
    made = {
        "plain torch loop": Contestant(lambda *work: by_loss(torch_loop, *work)),
        "higher, task by task": Contestant(_higher),
        "stacked by hand": Contestant(lambda *work: by_loss(stacked, *work)),
    }
    for batching in ("vectorized", "sequential", "auto"):
        made[f"metaplug, {batching}"] = Contestant(
            lambda *work, batching=batching: by_metaplug(*work, batching=batching)
        )
    for plugin in plugins:
        made[f"metaplug + {plugin}"] = Contestant(
            lambda *work, plugin=plugin: by_metaplug(*work, plugins=(plugin,)), False
        )
    made["metaplug without its chain"] = Contestant(
        lambda *work: by_metaplug(*work, chainless=True)
    )
    made["metaplug, first order"] = Contestant(
        lambda *work: by_metaplug(*work, plugins=("derivative-order",)), False
    )
    made["metaplug, recomputed steps"] = Contestant(
        lambda *work: by_metaplug(*work, checkpoint_steps=1)
    )
    made["metaplug, chunks of 4"] = Contestant(lambda *work: by_metaplug(*work, chunk_size=4))
    if compiled:
        made["metaplug, compiled"] = Contestant(lambda *work: by_metaplug(*work, compile=True))
        for plugin in plugins:
            made[f"metaplug + {plugin}, compiled"] = Contestant(
                lambda *work, plugin=plugin: by_metaplug(*work, plugins=(plugin,), compile=True),
                False,
            )
    if captured:
        made["metaplug, captured"] = Contestant(lambda *work: by_metaplug(*work, capture=True))
    if captured and compiled:
        made["metaplug, compiled and captured"] = Contestant(
            lambda *work: by_metaplug(*work, compile=True, capture=True)
        )
    # The reference form, as the published one begins in first order and would not show what its steps cost.
    made["metaplug, maml++-reference"] = Contestant(
        lambda *work: by_metaplug(*work, preset="maml++-reference"), False
    )
    return made


def by_metaplug(
    model: nn.Module,
    batch: TaskBatch,
    workload: Workload,
    *,
    batching: Batching = "vectorized",
    preset: str | None = None,
    plugins: Sequence[str] = (),
    chainless: bool = False,
    **runtime: Any,
) -> Prepared:
    """metaplug as a user runs it; `chainless` takes the calls of hooks out, `runtime` are arguments of MetaLearner."""
    # A learner sees to its own precision, whatever is set around it.
    rounding: dict[str, Any] = (
        {"precision": "tf32"}
        if in_tf32(batch.device) and batch.support_x.dtype == torch.float32
        else {}
    )
    learner = MetaLearner(
        model,
        preset=preset,
        plugins=plugins,
        kind=workload.kind,
        inner_steps=workload.inner_steps,
        inner_lr=workload.inner_lr,
        task_batching=batching,
        **runtime,
        **rounding,
    )

    if chainless:
        learner.chain.fold = lambda hook, value, **given: value  # type: ignore[method-assign]
        learner.chain.choose = lambda hook, default, **given: default  # type: ignore[method-assign]

    class Same:
        split = "train"

        def batch(self, iteration: int, indices: Sequence[int]) -> TaskBatch:
            return batch

    iterations = learner.iterate(Same(), iterations=sys.maxsize, tasks_per_batch=workload.tasks)
    inner = learner.engine.inner

    def checked(found: Any) -> Any:
        """A step that is compiled or captured in name only is not what was to be measured."""
        derivation = learner.engine.derivation
        for part in (derivation, getattr(derivation, "compile_graph", None)):
            if reason := getattr(part, "refusal", None):
                raise RequestError(f"refused, so that its steps would be as without: {reason}")
        return found

    return Prepared(
        step=lambda: checked(next(iterations)),
        gradient=lambda: checked(learner.meta_gradients(batch)),
        graph=None
        if runtime  # which changes what is kept, and when
        else lambda: inner.run(
            batch,
            steps=workload.inner_steps,
            training=True,
            iteration=0,
            query_after={workload.inner_steps},
        ),
        torch_memory=not runtime.get("capture", False),
    )


def by_loss(
    outer_loss: Callable[[nn.Module, TaskBatch, Workload, Loss], Tensor],
    model: nn.Module,
    batch: TaskBatch,
    workload: Workload,
) -> Prepared:
    """For a contestant that gives the outer loss of all tasks together."""
    names = [name for name, _ in model.named_parameters()]

    def gradient() -> MetaGradient:
        loss = outer_loss(model, batch, workload, LOSSES[workload.kind])
        return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))

    return by_gradient(
        model, gradient, graph=lambda: outer_loss(model, batch, workload, LOSSES[workload.kind])
    )


def by_gradient(
    model: nn.Module,
    gradient: Callable[[], MetaGradient],
    graph: Callable[[], object] | None = None,
) -> Prepared:
    """For a contestant that gives the meta-gradient, in the order of the model's parameters."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def step() -> None:
        for parameter, found in zip(model.parameters(), gradient().values(), strict=True):
            parameter.grad = found
        optimizer.step()

    return Prepared(step, gradient, graph)


def task_by_task(
    model: nn.Module, batch: TaskBatch, query_loss: Callable[[int], Tensor]
) -> Prepared:
    """For a contestant that adapts to one task after the other and gives its query loss; a task's graph is gone before the next."""

    def gradient() -> MetaGradient:
        model.zero_grad()
        for task in range(batch.num_tasks):
            (query_loss(task) / batch.num_tasks).backward()
        return {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }

    return by_gradient(model, gradient)


def torch_loop(model: nn.Module, batch: TaskBatch, workload: Workload, loss: Loss) -> Tensor:
    """The mean query loss by a plain loop over tasks: what every other contestant's meta-gradient is held to."""
    losses = []
    for task in range(batch.num_tasks):
        weights: dict[str, Tensor] = dict(model.named_parameters())
        for _ in range(workload.inner_steps):
            support = loss(
                torch.func.functional_call(model, weights, (batch.support_x[task],)),
                batch.support_y[task],
            )
            gradients = torch.autograd.grad(support, list(weights.values()), create_graph=True)
            weights = {
                name: weight - workload.inner_lr * gradient
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
            }
        losses.append(
            loss(
                torch.func.functional_call(model, weights, (batch.query_x[task],)),
                batch.query_y[task],
            )
        )
    return torch.stack(losses).mean()


def stacked(
    model: nn.Module,
    batch: TaskBatch,
    workload: Workload,
    loss: Loss,
    start: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """What the engine does, without hooks or checks: the floor for what a chain of plugins may cost."""
    initial = dict(model.named_parameters()) if start is None else start
    weights = {
        name: parameter.expand(batch.num_tasks, *parameter.shape)
        for name, parameter in initial.items()
    }

    def one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, values, (x,)), y)

    for _ in range(workload.inner_steps):
        support = torch.vmap(one)(weights, batch.support_x, batch.support_y)
        gradients = torch.autograd.grad(support.sum(), list(weights.values()), create_graph=True)
        weights = {
            name: weight - workload.inner_lr * gradient
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
    losses: Tensor = torch.vmap(one)(weights, batch.query_x, batch.query_y)
    return losses.mean()


def compiled(model: nn.Module, batch: TaskBatch, workload: Workload) -> Prepared:
    """The stacked loop with its meta-gradient, traced whole and compiled; half a minute for a small network, minutes for others."""
    names = [name for name, _ in model.named_parameters()]

    def gradients(values: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        loss = stacked(
            model,
            TaskBatch(*tensors),
            workload,
            LOSSES[workload.kind],
            dict(zip(names, values, strict=True)),
        )
        return torch.autograd.grad(loss, values)

    tensors = (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
    graph = make_fx(gradients)(
        [parameter.detach().requires_grad_() for parameter in model.parameters()], *tensors
    )
    function = torch.compile(graph)

    def gradient() -> MetaGradient:
        with torch.no_grad():
            return dict(
                zip(
                    names,
                    function([parameter.detach() for parameter in model.parameters()], *tensors),
                    strict=True,
                )
            )

    return by_gradient(model, gradient)


def _higher(model: nn.Module, batch: TaskBatch, workload: Workload) -> Prepared:
    loss, inner = LOSSES[workload.kind], torch.optim.SGD(model.parameters(), lr=workload.inner_lr)

    def query_loss(task: int) -> Tensor:
        with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (
            functional,
            differentiable,
        ):
            for _ in range(workload.inner_steps):
                differentiable.step(loss(functional(batch.support_x[task]), batch.support_y[task]))
            return loss(functional(batch.query_x[task]), batch.query_y[task])

    return task_by_task(model, batch, query_loss)
