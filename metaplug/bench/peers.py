"""Other libraries and JAX on the same work, each by its public interface, as it documents it.

Every one is imported only when it is measured, and may be missing.
"""

from __future__ import annotations

import logging
import os
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from metaplug.bench.contestants import (
    Contestant,
    MetaGradient,
    Prepared,
    compiled,
    gradients_of,
    task_by_task,
    tensors_of,
    trainable,
)
from metaplug.bench.meters import in_tf32
from metaplug.bench.workloads import Workload
from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import RequestError
from metaplug.training.assemble import LOSSES

COMPILED = "compiled by hand"


def peers() -> dict[str, Contestant]:
    """Return by name whoever metaplug is compared with and does not depend on."""
    return {
        "learn2learn, MAML": Contestant(_learn2learn, module="learn2learn"),
        "torchopt, MetaSGD": Contestant(_torchopt, module="torchopt"),
        "betty, iterative": Contestant(_betty, module="betty"),
        "parallel-metalearn, vmap": Contestant(_parallel_metalearn, module="metalearn"),
        "JAX, jitted by hand": Contestant(_jax, module="jax"),
        COMPILED: Contestant(compiled, module="torch._inductor"),
    }


def _learn2learn(model: nn.Module, batch: TaskBatch, workload: Workload) -> Prepared:
    import learn2learn

    loss, rate = LOSSES[workload.kind], workload.inner_lr
    maml = learn2learn.algorithms.MAML(model, lr=rate, allow_nograd=True)  # of frozen parameters

    def query_loss(task: int) -> Tensor:
        learner = maml.clone()
        for _ in range(workload.inner_steps):
            learner.adapt(loss(learner(batch.support_x[task]), batch.support_y[task]))
        return loss(learner(batch.query_x[task]), batch.query_y[task])

    return task_by_task(model, batch, query_loss)


def _torchopt(model: nn.Module, batch: TaskBatch, workload: Workload) -> Prepared:
    import torchopt

    loss, parts = LOSSES[workload.kind], (each for each in model.modules() if _trains(each))
    # It differentiates by every parameter of its module, frozen ones too.
    inner = torchopt.MetaSGD(nn.ModuleList(parts), lr=workload.inner_lr)
    start = [torchopt.extract_state_dict(part, by="reference") for part in (model, inner)]

    def query_loss(task: int) -> Tensor:
        for _ in range(workload.inner_steps):
            inner.step(loss(model(batch.support_x[task]), batch.support_y[task]))
        query = loss(model(batch.query_x[task]), batch.query_y[task])
        for part, state in zip((model, inner), start, strict=True):
            torchopt.recover_state_dict(part, state)
        return query

    return task_by_task(model, batch, query_loss)


def _trains(module: nn.Module) -> bool:
    """Whether a module has trainable parameters, beside those of its children."""
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _betty(model: nn.Module, batch: TaskBatch, workload: Workload) -> Prepared:
    """Unroll a problem for each task, below one for the first weights.

    betty's own example of MAML is the implicit one, another algorithm.
    """
    if not version("betty-ml").startswith("0.1."):
        installed = version("betty-ml")
        raise RequestError(f"betty-ml unrolls in versions 0.1 only, and {installed} is installed")
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem, IterativeProblem

    logging.getLogger("betty").disabled = True  # it would write every problem to standard output
    loss, weights = LOSSES[workload.kind], trainable(model)
    found: dict[str, Tensor] = {}

    class Task(IterativeProblem):  # type: ignore[misc]
        def on_inner_loop_start(self) -> None:
            self.params = tuple(parameter.clone() for parameter in weights.values())
            # betty would keep the graph of every step so far.
            self.optimizer.state = [{} for _ in self.params]

        def optimizer_step(self) -> None:
            before = self.params
            super().optimizer_step()
            for parameter in before:
                parameter.grad = None  # a tensor and a graph that hold each other are never freed

        def forward(self, x: Tensor) -> Any:
            values = dict(zip(weights, self.params, strict=True))
            return torch.func.functional_call(model, values, (x,))

        def training_step(self, task: int) -> Tensor:
            return loss(self(batch.support_x[task]), batch.support_y[task])

        def get_batch(self) -> int:
            return tasks.index(self)

    class Outer(ImplicitProblem):  # type: ignore[misc]
        def training_step(self, _: object) -> Tensor:
            queries = zip(tasks, batch.query_x, batch.query_y, strict=True)
            return torch.stack([loss(task(x), y) for task, x, y in queries]).mean()

        def get_batch(self) -> None:
            return None

        def param_callback(self, parameters: list[nn.Parameter]) -> None:
            for name, parameter in zip(weights, parameters, strict=True):
                if parameter.grad is not None:
                    found[name] = parameter.grad

    settings: dict[str, Any] = {"first_order": False, "retain_graph": True}
    # It differentiates by every parameter of its module, frozen ones too; without a device it would
    # move the module to CUDA wherever that is.
    trained = nn.ParameterList(weights.values())
    place: dict[str, Any] = {"module": trained, "device": batch.device}
    adam = torch.optim.Adam(weights.values(), 1e-3)
    outer = Outer("outer", Config(**settings), optimizer=adam, **place)
    unrolled = Config(unroll_steps=workload.inner_steps, **settings)
    sgd = torch.optim.SGD(weights.values(), lr=workload.inner_lr)
    numbers = range(batch.num_tasks)
    tasks = [Task(f"task {task}", unrolled, optimizer=sgd, **place) for task in numbers]
    engine = Engine(
        problems=[outer, *tasks],
        config=EngineConfig(train_iters=workload.inner_steps),
        dependencies={"u2l": {outer: tasks}, "l2u": {task: [outer] for task in tasks}},
    )

    def gradient() -> MetaGradient:
        engine.run()
        return found

    return Prepared(engine.run, gradient)


def _parallel_metalearn(model: nn.Module, batch: TaskBatch, workload: Workload) -> Prepared:
    from metalearn.algorithms import MAML
    from metalearn.inner_optimizers import InnerSGD
    from metalearn.loss import BaseLoss
    from metalearn.model_wrappers import MAML_Model

    task_loss = LOSSES[workload.kind]

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, **_: object) -> Any:
            return self.model(x)

    class Head(nn.Module):
        def forward(self, features: Tensor, **_: object) -> Tensor:
            return features

    class OurLoss(BaseLoss):  # type: ignore[misc]
        def forward(self, out_dict: Any, targets: Tensor, **_: object) -> tuple[Tensor, Tensor]:
            loss = task_loss(out_dict["logits"], targets)
            return loss, loss.detach()

    wrapped = MAML_Model(backbone=Body(), head=Head())
    weights = wrapped.get_fast_weights()
    inner = InnerSGD(weights, inner_lr=workload.inner_lr, learn_lr=False).to(
        next(model.parameters())
    )
    for rate in inner.parameters():
        rate.data.fill_(workload.inner_lr)  # it was made in single precision
    algorithm = MAML(
        model=wrapped,
        optimizer=torch.optim.Adam(trainable(model).values(), 1e-3),
        inner_optimizer=inner,
        support_loss_fn=OurLoss(),
        inner_steps=workload.inner_steps,
        chunk_size=batch.num_tasks,
        device=batch.device,
    )

    def gradient() -> MetaGradient:
        algorithm.step(iter([tensors_of(batch)]))
        return gradients_of(model)

    return Prepared(gradient, gradient)


def _jax(model: nn.Module, batch: TaskBatch, workload: Workload) -> Prepared:
    """Write the sinusoid network and the loop out, with JAX's Adam, in one compiled function."""
    if workload.model != "mlp":
        others = f"written by hand for the sinusoid network only, not for {workload.model}"
        raise RequestError(others)
    threads = torch.get_num_threads()  # these are read when JAX is imported
    os.environ.setdefault("NPROC", str(threads))
    os.environ.setdefault("XLA_FLAGS", f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}")
    # Else it takes most of a GPU's memory from all others.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    from jax.example_libraries.optimizers import adam

    # Else float64 is cut to float32; float32 stays what it is.
    jax.config.update("jax_enable_x64", True)
    precision = "tensorfloat32" if in_tf32(batch.device) else "highest"
    jax.config.update("jax_default_matmul_precision", precision)
    device, rate = jax_device(jax, batch.device), workload.inner_lr

    def moved(tensor: Tensor) -> Any:
        return jax.device_put(tensor.detach().cpu().numpy(), device)

    weights = {name: moved(parameter) for name, parameter in model.named_parameters()}
    tensors = [moved(tensor) for tensor in tensors_of(batch)]
    layers = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]

    def loss(values: dict[str, Any], x: Any, y: Any) -> Any:
        for layer in layers:
            x = x @ values[f"{layer}.weight"].T + values[f"{layer}.bias"]
            x = x if layer == layers[-1] else jax.nn.relu(x)
        return ((x - y) ** 2).mean()

    def query_loss(values: Any, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        for _ in range(workload.inner_steps):
            gradients = jax.grad(loss)(values, support_x, support_y)
            values = jax.tree.map(lambda value, change: value - rate * change, values, gradients)
        return loss(values, query_x, query_y)

    def outer_loss(values: dict[str, Any], *tensors: Any) -> Any:
        return jax.vmap(query_loss, in_axes=(None, 0, 0, 0, 0))(values, *tensors).mean()

    begin, update, values_of = adam(1e-3)

    @jax.jit  # type: ignore[untyped-decorator]
    def train(count: Any, state: Any, *tensors: Any) -> Any:
        gradients = jax.grad(outer_loss)(values_of(state), *tensors)
        return count + 1, update(count, gradients, state)

    now: list[Any] = [jax.device_put(0, device), jax.device_put(begin(weights), device)]

    def step() -> None:
        now[:] = jax.block_until_ready(train(*now, *tensors))

    def gradient() -> MetaGradient:
        found = jax.jit(jax.grad(outer_loss))(weights, *tensors)
        exact: dict[str, Any] = {"dtype": torch.float64, "device": batch.device}
        return {name: torch.tensor(value.tolist(), **exact) for name, value in found.items()}

    return Prepared(step, gradient, torch_memory=False)


def jax_device(jax: Any, device: torch.device) -> Any:
    """Return JAX's name for a device of torch.

    Raises:
        RequestError: it is a CUDA device, and JAX has no back end for it.
    """
    if device.type == "cpu":
        return jax.devices("cpu")[0]
    try:
        return jax.devices("gpu")[device.index or 0]
    except (RuntimeError, IndexError):
        raise RequestError(
            f"JAX has no back end for {device} here: install jax[cuda13] in its place, or measure "
            "it on --device cpu"
        ) from None
