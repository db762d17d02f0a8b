"""The cost of a meta-step, side by side: metaplug in every batching, a plain torch loop, plain `higher`, and the stacked loop by hand.

Every contestant does the same work on the same tasks from the same weights: adapt, meta-gradient, one Adam update.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import higher
import torch
from torch import Tensor, nn

from metaplug.errors import unknown
from metaplug.inner import Loss
from metaplug.learner import LOSSES, MetaLearner
from metaplug.models.conv4 import Conv4
from metaplug.models.mlp import Mlp
from metaplug.runtime.batching import Batching
from metaplug.tasks.batch import TaskBatch
from metaplug.values import Kind

MetaGradient = Mapping[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """One meta-step: which model, how many tasks, how long the inner loop."""

    name: str
    model: str
    tasks: int
    inner_steps: int
    inner_lr: float
    kind: Kind
    shots: int
    queries: int

    def build(self) -> tuple[nn.Module, TaskBatch]:
        """The model and a batch of random tasks, from a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = MODELS[self.model]()
        if self.kind == "regression":
            drawn = [torch.randn(self.tasks, n, 1, generator=generator) for n in (self.shots, self.shots, self.queries, self.queries)]
            return model, TaskBatch(*drawn)
        labels = [torch.arange(5).repeat_interleave(n).repeat(self.tasks, 1) for n in (self.shots, self.queries)]
        images = [torch.rand(self.tasks, 5 * n, 1, 28, 28, generator=generator) for n in (self.shots, self.queries)]
        return model, TaskBatch(images[0], labels[0], images[1], labels[1])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: Mlp((1,), 1),
    "conv4-32-stride": lambda: Conv4((1, 28, 28), 5, filters=32, pooling="stride"),
    "conv4-64-max": lambda: Conv4((1, 28, 28), 5, filters=64, pooling="max"),
}
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("sinusoid-25x1", "mlp", 25, 1, 0.01, "regression", 10, 10),
        Workload("sinusoid-25x5", "mlp", 25, 5, 0.01, "regression", 10, 10),
        Workload("sinusoid-100x5", "mlp", 100, 5, 0.01, "regression", 10, 10),
        Workload("conv4-32-stride-8x3", "conv4-32-stride", 8, 3, 0.4, "classification", 1, 5),
        Workload("conv4-32-stride-32x3", "conv4-32-stride", 32, 3, 0.4, "classification", 1, 1),
        Workload("conv4-64-max-8x5", "conv4-64-max", 8, 5, 0.4, "classification", 1, 5),
    )
}
"""By name; "25x5" is 25 tasks and 5 inner steps."""


@dataclass(frozen=True)
class Prepared:
    """A contestant, ready: one whole step; its meta-gradient alone; and the graph that it differentiates, None where it is never whole."""

    step: Callable[[], object]
    gradient: Callable[[], MetaGradient]
    graph: Callable[[], object] | None


Contestant = Callable[[nn.Module, TaskBatch, Workload], Prepared]


@dataclass(frozen=True)
class Row:
    """One contestant on one workload.

    Attributes:
        milliseconds: median over the repeats.
        spread: half the distance of the quartiles, in milliseconds.
        gradient_error: the largest difference of its meta-gradient from the plain loop's, in float64, over the largest entry of the latter;
            None where its chain changes the algorithm.
        graph_mib: what torch's allocator holds for the graph of all tasks, MiB; None where it was not measured, or there is none.
        peak_mib: the most that it holds in the course of a step, MiB; None where it was not measured.
    """

    workload: str
    contestant: str
    milliseconds: float
    spread: float
    gradient_error: float | None
    graph_mib: float | None
    peak_mib: float | None


def run(
    workloads: Sequence[str],
    plugins: Sequence[str],
    *,
    repeats: int,
    memory: bool,
    only: Sequence[str] = (),
    on_workload: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure every contestant on every workload, interleaved, `repeats` times each; one more contestant for each plugin.

    Args:
        only: names of contestants; the others are left out. Empty for all.

    Raises:
        RequestError: an unknown workload or contestant; the nearest is offered.
    """
    made = contestants(plugins)
    for kind, names, known in (("workload", workloads, list(WORKLOADS)), ("contestant", only, list(made))):
        for name in names:
            if name not in known:
                raise unknown(kind, name, known)
    rows: list[Row] = []
    for name in workloads:
        on_workload(name)
        rows += _measure(WORKLOADS[name], {each: make for each, make in made.items() if not only or each in only}, repeats, memory)
    return rows


def contestants(plugins: Sequence[str]) -> dict[str, Contestant]:
    """By name, what makes a step and a meta-gradient from a model, a batch and a workload."""
    made: dict[str, Contestant] = {
        "plain torch loop": lambda *work: _by_loss(_torch_loop, *work),
        "higher, task by task": _higher,
        "stacked by hand": lambda *work: _by_loss(_stacked, *work),
    }
    for batching in ("vectorized", "sequential", "auto"):
        made[f"metaplug, {batching}"] = lambda *work, batching=batching: _metaplug(*work, batching=batching)
    for plugin in plugins:
        made[f"metaplug + {plugin}"] = lambda *work, plugin=plugin: _metaplug(*work, plugins=(plugin,))
    made["metaplug without its chain"] = lambda *work: _metaplug(*work, chainless=True)
    made["metaplug, first order"] = lambda *work: _metaplug(*work, plugins=("derivative-order",))
    return made


def as_json_values(rows: Sequence[Row], repeats: int) -> dict[str, Any]:
    """The rows with what they were measured on."""
    return {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "repeats": repeats,
        "rows": [asdict(row) for row in rows],
    }


def _measure(workload: Workload, made: dict[str, Contestant], repeats: int, memory: bool) -> list[Row]:
    model, batch = workload.build()
    ready = {name: make(copy.deepcopy(model), batch, workload) for name, make in made.items()}
    times: dict[str, list[float]] = {name: [] for name in ready}
    for repeat in range(repeats + 1):
        for name in list(ready) if repeat % 2 else reversed(ready):
            start = time.perf_counter()
            ready[name].step()
            if repeat:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    errors = _gradient_errors(workload, made)
    rows = []
    for name, contestant in ready.items():
        quartiles = statistics.quantiles(times[name]) if repeats > 1 else times[name] * 3
        rows.append(
            Row(
                workload.name,
                name,
                milliseconds=statistics.median(times[name]),
                spread=(quartiles[2] - quartiles[0]) / 2,
                gradient_error=errors.get(name),
                graph_mib=_memory(contestant.graph)[1] if memory and contestant.graph else None,
                peak_mib=_memory(contestant.step)[0] if memory else None,
            )
        )
    return rows


def _gradient_errors(workload: Workload, made: dict[str, Contestant]) -> dict[str, float]:
    model, batch = workload.build()
    tensors = (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
    batch = TaskBatch(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors))
    found = {name: make(copy.deepcopy(model).double(), batch, workload).gradient() for name, make in made.items() if _same_algorithm(name)}
    reference = _by_loss(_torch_loop, copy.deepcopy(model).double(), batch, workload).gradient()
    scale = max(float(gradient.abs().max()) for gradient in reference.values())
    return {
        name: max(float((gradients[key] - reference[key]).abs().max()) for key in reference) / scale for name, gradients in found.items()
    }


def _same_algorithm(contestant: str) -> bool:
    return "+" not in contestant and "first order" not in contestant


def _metaplug(
    model: nn.Module,
    batch: TaskBatch,
    workload: Workload,
    *,
    batching: Batching = "vectorized",
    plugins: Sequence[str] = (),
    chainless: bool = False,
) -> Prepared:
    learner = MetaLearner(
        model,
        plugins=plugins,
        kind=workload.kind,
        inner_steps=workload.inner_steps,
        inner_lr=workload.inner_lr,
        task_batching=batching,
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
    return Prepared(
        step=lambda: next(iterations),
        gradient=lambda: learner.meta_gradients(batch),
        graph=lambda: inner.run(batch, steps=workload.inner_steps, training=True, iteration=0, query_after={workload.inner_steps}),
    )


def _by_loss(
    outer_loss: Callable[[nn.Module, TaskBatch, Workload, Loss], Tensor], model: nn.Module, batch: TaskBatch, workload: Workload
) -> Prepared:
    """A step and a meta-gradient for a contestant that gives the outer loss."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    names = [name for name, _ in model.named_parameters()]

    def gradient() -> MetaGradient:
        loss = outer_loss(model, batch, workload, LOSSES[workload.kind])
        return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))

    def step() -> None:
        for parameter, found in zip(model.parameters(), gradient().values(), strict=True):
            parameter.grad = found
        optimizer.step()

    return Prepared(step, gradient, graph=lambda: outer_loss(model, batch, workload, LOSSES[workload.kind]))


def _torch_loop(model: nn.Module, batch: TaskBatch, workload: Workload, loss: Loss) -> Tensor:
    losses = []
    for task in range(batch.num_tasks):
        weights: dict[str, Tensor] = dict(model.named_parameters())
        for _ in range(workload.inner_steps):
            support = loss(torch.func.functional_call(model, weights, (batch.support_x[task],)), batch.support_y[task])
            gradients = torch.autograd.grad(support, list(weights.values()), create_graph=True)
            weights = {
                name: weight - workload.inner_lr * gradient for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
            }
        losses.append(loss(torch.func.functional_call(model, weights, (batch.query_x[task],)), batch.query_y[task]))
    return torch.stack(losses).mean()


def _stacked(model: nn.Module, batch: TaskBatch, workload: Workload, loss: Loss) -> Tensor:
    """What the engine does, without hooks or checks: the floor for what a chain of plugins may cost."""
    weights = {name: parameter.expand(batch.num_tasks, *parameter.shape) for name, parameter in model.named_parameters()}

    def one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, values, (x,)), y)

    for _ in range(workload.inner_steps):
        support = torch.vmap(one)(weights, batch.support_x, batch.support_y)
        gradients = torch.autograd.grad(support.sum(), list(weights.values()), create_graph=True)
        weights = {name: weight - workload.inner_lr * gradient for (name, weight), gradient in zip(weights.items(), gradients, strict=True)}
    stacked: Tensor = torch.vmap(one)(weights, batch.query_x, batch.query_y)
    return stacked.mean()


def _higher(model: nn.Module, batch: TaskBatch, workload: Workload) -> Prepared:
    loss, optimizer = LOSSES[workload.kind], torch.optim.Adam(model.parameters(), 1e-3)
    inner = torch.optim.SGD(model.parameters(), lr=workload.inner_lr)

    def gradient() -> MetaGradient:
        optimizer.zero_grad()
        for task in range(batch.num_tasks):
            with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (functional, differentiable):
                for _ in range(workload.inner_steps):
                    differentiable.step(loss(functional(batch.support_x[task]), batch.support_y[task]))
                (loss(functional(batch.query_x[task]), batch.query_y[task]) / batch.num_tasks).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    def step() -> None:
        gradient()
        optimizer.step()

    return Prepared(step, gradient, graph=None)


def _memory(work: Callable[[], object]) -> tuple[float, float]:
    """(most, left): the most MiB that torch's allocator held while `work` ran, and what its result still holds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = work()
    # The public list of events leaves out what happens inside operators.
    events: list[Any] = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    del result
    return max(held) / 2**20, held[-1] / 2**20
