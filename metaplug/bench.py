"""The cost of a meta-step, side by side: metaplug in every batching, a plain torch loop, plain `higher`, and the stacked loop by hand.

Every contestant does the same work on the same tasks from the same weights: adapt, meta-gradient, one Adam update.
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
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

Step = Callable[[], object]
STATUS = Path("/proc/self/status")
"""Where Linux says how much memory a process has had; elsewhere memory is not measured."""
MetaGradient = Mapping[str, Tensor]
Contestant = Callable[[nn.Module, TaskBatch, "Workload"], tuple[Step, Callable[[], MetaGradient]]]


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
class Row:
    """One contestant on one workload.

    Attributes:
        milliseconds: median over the repeats.
        spread: half the distance of the quartiles, in milliseconds.
        gradient_error: the largest difference of its meta-gradient from the plain loop's, in float64, over the largest entry of the latter;
            None where its chain changes the algorithm.
        peak_mib: how far one step raises the peak memory of a process of its own, MiB; None where it was not measured.
    """

    workload: str
    contestant: str
    milliseconds: float
    spread: float
    gradient_error: float | None
    peak_mib: float | None


def run(
    workloads: Sequence[str], plugins: Sequence[str], *, repeats: int, memory: bool, on_workload: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """Measure every contestant on every workload, interleaved, `repeats` times each; one more contestant for each plugin."""
    rows: list[Row] = []
    for name in workloads:
        if name not in WORKLOADS:
            raise unknown("workload", name, WORKLOADS)
        on_workload(name)
        rows += _measure(WORKLOADS[name], contestants(plugins), repeats, memory)
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


def _measure(workload: Workload, made: dict[str, Any], repeats: int, memory: bool) -> list[Row]:
    model, batch = workload.build()
    steps = {name: make(copy.deepcopy(model), batch, workload)[0] for name, make in made.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    errors = _gradient_errors(workload, made)
    return [
        Row(
            workload.name,
            name,
            milliseconds=statistics.median(taken),
            spread=(statistics.quantiles(taken)[2] - statistics.quantiles(taken)[0]) / 2 if len(taken) > 1 else 0.0,
            gradient_error=errors.get(name),
            peak_mib=_peak_in_own_process(workload.name, name) if memory else None,
        )
        for name, taken in times.items()
    ]


def _gradient_errors(workload: Workload, made: dict[str, Any]) -> dict[str, float]:
    model, batch = workload.build()
    tensors = (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
    batch = TaskBatch(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors))
    found = {name: make(copy.deepcopy(model).double(), batch, workload)[1]() for name, make in made.items() if _same_algorithm(name)}
    reference = found["plain torch loop"]
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
) -> tuple[Step, Callable[[], MetaGradient]]:
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
    return lambda: next(iterations), lambda: learner.meta_gradients(batch)


def _by_loss(
    outer_loss: Callable[[nn.Module, TaskBatch, Workload, Loss], Tensor], model: nn.Module, batch: TaskBatch, workload: Workload
) -> tuple[Step, Callable[[], MetaGradient]]:
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

    return step, gradient


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


def _higher(model: nn.Module, batch: TaskBatch, workload: Workload) -> tuple[Step, Callable[[], MetaGradient]]:
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

    return step, gradient


def _peak_in_own_process(workload: str, contestant: str) -> float | None:
    if not STATUS.exists():
        return None
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(sender, workload, contestant))
    process.start()
    sender.close()
    peak: float = receiver.recv()
    process.join()
    return peak


def _report_peak(sender: Any, workload: str, contestant: str) -> None:
    """In a process of its own: a first step with one task loads what torch loads lazily, so that the second shows the step's own memory."""
    torch.set_num_threads(1)
    plugins = [contestant.removeprefix("metaplug + ")] if "+" in contestant else []
    work = WORKLOADS[workload]
    for size in (replace(work, tasks=1), work):
        gc.collect()
        before = _high_water_mib()
        contestants(plugins)[contestant](*size.build(), size)[0]()
    sender.send(_high_water_mib() - before)


def _high_water_mib() -> float:
    """The most memory that this process has had resident, MiB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
