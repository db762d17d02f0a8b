"""Compiled steps: the engine's own derivation of meta-gradients, traced once for a form of batch and handed to Inductor.

What is done with a trace is exchangeable: `metaplug/execution/cuda_graphs.py` records it in a CUDA graph.

There is no second implementation: `make_fx` records what the engine, `higher` and the plugins' folds do to tensors. What changes from step
to step goes in as an input: weights, the plugins' parameters and buffers, the tasks. What the trace would freeze is either part of its key
(shapes, outer weights, derivative orders, plain attributes of plugins) or makes a plugin untraceable, which is said, and the run goes on
uncompiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from metaplug.checks.model_changes import PLAIN
from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import said_by
from metaplug.execution.engine import Engine, MetaGradients
from metaplug.random_streams import stream

MOST_TRACES = 8
"""Forms of batch, outer weights, derivative orders and attributes of plugins that one run compiles; further ones are uncompiled."""

Compile = Callable[[torch.fx.GraphModule, Sequence[Tensor]], Callable[..., Any]]


def inductor(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """The graph compiled by Inductor, with torch's own random numbers."""
    _widen_products(graph)
    with warnings.catch_warnings(), torch._inductor.config.patch(fallback_random=True):
        warnings.simplefilter("ignore")  # the compiler's own, on how it does what it does
        compiled: Callable[..., Any] = torch._inductor.compile(graph, list(inputs))
    return compiled


def _widen_products(graph: torch.fx.GraphModule) -> None:
    """On a CPU, write A B with more rows than columns as (Bᵀ Aᵀ)ᵀ: the same numbers, in less time where the columns are few.

    Such products come from differentiating a weight gradient once more: autograd has no say in their form, a graph has.
    """
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.target is not aten.bmm.default or node.meta["val"].device.type != "cpu":
            continue
        _, rows, columns = node.meta["val"].shape
        if rows > columns:
            with graph.graph.inserting_before(node):
                transposed = [
                    graph.graph.call_function(aten.transpose.int, (factor, 1, 2))
                    for factor in reversed(node.args)
                ]
                product = graph.graph.call_function(aten.bmm.default, tuple(transposed))
                node.replace_all_uses_with(
                    graph.graph.call_function(aten.transpose.int, (product, 1, 2))
                )
            graph.graph.erase_node(node)
    graph.recompile()


def warn_refusal(what: str, reason: str) -> None:
    """Say that steps are not `what` ("compiled", "captured") after all."""
    warnings.warn(f"steps are not {what}, and the run goes on un{what}: {reason}", stacklevel=3)


@dataclass(frozen=True)
class _Trace:
    """A compiled derivation, and the names of what it gives."""

    function: Callable[..., Any]
    gradients: tuple[str, ...]
    statistics: tuple[tuple[str, str], ...]


class CompiledDerivation:
    """Derives meta-gradients as `Engine.derive` does, compiled. Put it in the place of that method: `engine.derivation`.

    Args:
        engine: whose derivation it is.
        compile_graph: from a graph and inputs to a function; default: Inductor.
        what: "compiled" or "captured", as warnings have it.
        patience: at least 0: so many steps of one form in a row are computed as they are before a trace of it is made.
    """

    def __init__(
        self,
        engine: Engine,
        compile_graph: Compile = inductor,
        *,
        what: str = "compiled",
        patience: int = 0,
    ) -> None:
        self.engine, self.compile_graph, self.what, self.patience = (
            engine,
            compile_graph,
            what,
            patience,
        )
        self.refusal: str | None = None
        """Why steps are not, or no longer, compiled; None while they are."""
        self._traces: dict[Any, _Trace] = {}
        self._row: tuple[Any, int] = (None, 0)

    def __call__(
        self, batch: TaskBatch, iteration: int, total: int, weights: Mapping[int, float]
    ) -> MetaGradients:
        """The meta-gradients of a batch; uncompiled in a replay that looks for a culprit, and where compiling was refused."""
        engine = self.engine
        if self.refusal or engine.chain.watch is not None:
            return engine.derive(batch, iteration, total, weights)
        tensors = [batch.support_x, batch.support_y, batch.query_x, batch.query_y]
        orders = engine.inner.orders_of(iteration, total)
        # What plugins keep in plain attributes a trace would freeze, too: another value is another trace.
        plain = tuple(
            value
            for plugin in engine.chain.plugins
            for value in vars(plugin).values()
            if type(value) in PLAIN
        )
        key = (
            tuple((tensor.shape, tensor.dtype) for tensor in tensors),
            tuple(weights.items()),
            orders,
            plain,
        )
        if key not in self._traces and self._waits(key):
            return engine.derive(batch, iteration, total, weights)
        engine.inner.follow()
        places = _places(engine)
        inputs = [*(holder[name].detach() for holder, name in places), *tensors]
        if key not in self._traces:
            try:
                self._traces[key] = self._trace(inputs, weights, orders, iteration, total)
            except Exception as error:
                self.refusal = said_by(error)
            if self.refusal:  # not in the handler, where the error still holds what the failed trace has allocated
                warn_refusal(self.what, self.refusal)
                return engine.derive(batch, iteration, total, weights)
        trace = self._traces[key]
        with torch.no_grad():
            outer_loss, losses, *found = trace.function(*inputs)
        statistics: dict[str, dict[str, Tensor]] = {}
        for (plugin, name), tensor in zip(
            trace.statistics, found[len(trace.gradients) :], strict=True
        ):
            statistics.setdefault(plugin, {})[name] = tensor
        return MetaGradients(
            dict(zip(trace.gradients, found, strict=False)), outer_loss, losses, statistics, None
        )

    def _trace(
        self,
        inputs: list[Tensor],
        weights: Mapping[int, float],
        orders: tuple[int, ...],
        iteration: int,
        total: int,
    ) -> _Trace:
        if len(self._traces) >= MOST_TRACES:
            what = "forms, outer weights, derivative orders or attributes of plugins"
            raise RuntimeError(f"batches of more than {MOST_TRACES} {what} came along")
        named: dict[str, Any] = {}

        def derivation(*tensors: Tensor) -> list[Tensor]:
            with _swapped(self.engine, tensors) as batch:
                found = self.engine.derive(
                    batch, _Watched(iteration), _Watched(total), weights, orders=orders
                )
            named["gradients"] = tuple(found.gradients)
            named["statistics"] = tuple(
                (plugin, name) for plugin, kept in found.statistics.items() for name in kept
            )
            kept = [found.statistics[plugin][name] for plugin, name in named["statistics"]]
            return [found.outer_loss, found.losses, *found.gradients.values(), *kept]

        with stream(0, self.engine.device):  # what the trace draws, the step is not to miss
            graph = make_fx(derivation)(*inputs)
            return _Trace(self.compile_graph(graph, inputs), **named)

    def _waits(self, key: Any) -> bool:
        """Count one more step of this form, and say whether it comes too early for a trace."""
        self._row = (key, self._row[1] + 1 if key == self._row[0] else 1)
        return self._row[1] <= self.patience


class _Watched(int):
    """An iteration that a trace would freeze: to compute with it is refused."""


def _refused(self: Any, *_: Any) -> Any:
    raise TypeError(
        "it computes with the meta-iteration, which a compiled or captured step would freeze at its first value"
    )


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "lt",
    "le",
    "gt",
    "ge",
    "float",
    "bool",
):
    setattr(_Watched, f"__{_name}__", _refused)
    if _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
        setattr(_Watched, f"__r{_name}__", _refused)


def _places(engine: Engine) -> list[tuple[Any, str]]:
    """Where every tensor that may change from step to step stands: the model's and the plugins' parameters and buffers."""
    modules = [module for plugin in engine.chain.plugins for module in plugin.modules()]
    holders: list[Any] = [
        holder for module in modules for holder in (module._parameters, module._buffers)
    ]
    holders += [module._buffers for module in engine.inner.patched.modules()]
    found = [(engine.inner.parameters, name) for name in engine.inner.parameters]
    return found + [
        (holder, name)
        for holder in holders
        for name, tensor in holder.items()
        if tensor is not None
    ]


@contextmanager
def _swapped(engine: Engine, tensors: Sequence[Tensor]) -> Iterator[TaskBatch]:
    """Inside, the engine computes with these tensors; yields the batch that they end with."""
    places = _places(engine)
    before, meta_parameters = (
        [holder[name] for holder, name in places],
        dict(engine.meta_parameters),
    )
    try:
        new: dict[int, Tensor] = {}
        for (holder, name), old, tensor in zip(places, before, tensors, strict=False):
            holder[name] = new[id(old)] = tensor.detach().requires_grad_(old.requires_grad)
        engine.meta_parameters.update({name: new[id(old)] for name, old in meta_parameters.items()})  # type: ignore[misc]
        yield TaskBatch(*tensors[len(places) :])
    finally:
        for (holder, name), old in zip(places, before, strict=True):
            holder[name] = old
        engine.meta_parameters.update(meta_parameters)
