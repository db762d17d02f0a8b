"""Compiled steps: the engine's own derivation of meta-gradients, traced once for a form of batch and handed to Inductor.

There is no second implementation: `make_fx` records what the engine, `higher` and the plugins' folds do to tensors. What changes from step
to step goes in as an input: weights, the plugins' parameters and buffers, the tasks. What the trace would freeze is either part of its key
(shapes, outer weights, derivative orders) or makes a plugin untraceable, which is said, and the run goes on uncompiled.
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

from metaplug.engine import Engine, MetaGradients
from metaplug.tasks.batch import TaskBatch

MOST_TRACES = 8
"""Forms of batch, outer weights and derivative orders that one run compiles; further ones are computed uncompiled."""

Compile = Callable[[torch.fx.GraphModule, Sequence[Tensor]], Callable[..., Any]]


def inductor(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """The graph compiled by Inductor, with torch's own random numbers."""
    with torch._inductor.config.patch(fallback_random=True):
        compiled: Callable[..., Any] = torch._inductor.compile(graph, list(inputs))
    return compiled


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
    """

    def __init__(self, engine: Engine, compile_graph: Compile = inductor) -> None:
        self.engine, self.compile_graph = engine, compile_graph
        self.refusal: str | None = None
        """Why steps are not, or no longer, compiled; None while they are."""
        self._traces: dict[Any, _Trace] = {}

    def __call__(self, batch: TaskBatch, iteration: int, total: int, weights: Mapping[int, float]) -> MetaGradients:
        """The meta-gradients of a batch; uncompiled in a replay that looks for a culprit, and where compiling was refused."""
        engine = self.engine
        if self.refusal or engine.chain.check_finite:
            return engine.derive(batch, iteration, total, weights)
        tensors = [batch.support_x, batch.support_y, batch.query_x, batch.query_y]
        orders = engine.inner.orders_of(iteration, total)
        key = (tuple((tensor.shape, tensor.dtype) for tensor in tensors), tuple(weights.items()), orders)
        places = _places(engine)
        inputs = [*(holder[name].detach() for holder, name in places), *tensors]
        if key not in self._traces:
            try:
                self._traces[key] = self._trace(inputs, weights, orders, iteration, total)
            except Exception as error:
                self._refuse(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                return engine.derive(batch, iteration, total, weights)
        trace = self._traces[key]
        with torch.no_grad():
            outer_loss, losses, *found = trace.function(*inputs)
        statistics: dict[str, dict[str, Tensor]] = {}
        for (plugin, name), tensor in zip(trace.statistics, found[len(trace.gradients) :], strict=True):
            statistics.setdefault(plugin, {})[name] = tensor
        return MetaGradients(dict(zip(trace.gradients, found, strict=False)), outer_loss, losses, statistics, None)

    def _trace(self, inputs: list[Tensor], weights: Mapping[int, float], orders: tuple[int, ...], iteration: int, total: int) -> _Trace:
        if len(self._traces) >= MOST_TRACES:
            raise RuntimeError(f"batches of more than {MOST_TRACES} forms, outer weights or derivative orders came along")
        named: dict[str, Any] = {}

        def derivation(*tensors: Tensor) -> list[Tensor]:
            with _swapped(self.engine, tensors) as batch:
                found = self.engine.derive(batch, _Watched(iteration), _Watched(total), weights, orders=orders)
            named["gradients"] = tuple(found.gradients)
            named["statistics"] = tuple((plugin, name) for plugin, kept in found.statistics.items() for name in kept)
            kept = [found.statistics[plugin][name] for plugin, name in named["statistics"]]
            return [found.outer_loss, found.losses, *found.gradients.values(), *kept]

        graph = make_fx(derivation)(*inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own, on how it does what it does
            return _Trace(self.compile_graph(graph, inputs), **named)

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        warnings.warn(f"steps are not compiled, and the run goes on uncompiled: {reason}", stacklevel=2)


class _Watched(int):
    """An iteration that a trace would freeze: to compute with it is refused."""


def _refused(self: Any, *_: Any) -> Any:
    raise TypeError("it computes with the meta-iteration, which a compiled step would freeze at its first value")


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lt", "le", "gt", "ge", "float", "bool"):
    setattr(_Watched, f"__{_name}__", _refused)
    if _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
        setattr(_Watched, f"__r{_name}__", _refused)


def _places(engine: Engine) -> list[tuple[Any, str]]:
    """Where every tensor that changes from step to step stands: the model's parameters, the plugins' parameters and buffers."""
    modules = [module for plugin in engine.chain.plugins for module in plugin.modules()]
    holders: list[Any] = [holder for module in modules for holder in (module._parameters, module._buffers)]
    found = [(engine.inner.parameters, name) for name in engine.inner.parameters]
    return found + [(holder, name) for holder in holders for name, tensor in holder.items() if tensor is not None]


@contextmanager
def _swapped(engine: Engine, tensors: Sequence[Tensor]) -> Iterator[TaskBatch]:
    """Inside, the engine computes with these tensors; yields the batch that they end with."""
    places = _places(engine)
    before, meta_parameters = [holder[name] for holder, name in places], dict(engine.meta_parameters)
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
