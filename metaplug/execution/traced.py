"""Compiled steps: the engine's own derivation, traced once for a form of batch, then compiled.

There is no second implementation: `make_fx` records what the engine, `higher` and the plugins do to
tensors. What changes from step to step goes in as an input: weights, the plugins' parameters and
buffers, the tasks. What Python decides, a trace would freeze. So it is part of the trace's key
(shapes, outer weights, derivative orders, numbers that plugins keep), or the step is not traced:
that is said, and the run goes on uncompiled. The second step of every trace is compared with the
untraced one, for what nobody thought of.

`cuda_graphs` puts a recording in the place of the compiler.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from metaplug.contract.task_batch import TaskBatch
from metaplug.core.outer_loop import MetaGradients
from metaplug.errors import said_by
from metaplug.execution.engine import Engine
from metaplug.execution.python_state import NothingRead, Unknown, python_state
from metaplug.random_streams import stream

MOST_TRACES = 8
"""Traces of one run (forms of batch, outer weights, derivative orders, plugins' numbers); steps of
further ones are uncompiled."""

APART = 0.05
"""The relative difference of a traced meta-gradient from the untraced that rounding cannot explain,
not even where an inner loop amplifies it."""

Compile = Callable[[torch.fx.GraphModule, Sequence[Tensor]], Callable[..., Any]]


def inductor(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """The graph compiled by Inductor, with torch's own random numbers."""
    _widen_products(graph)
    with warnings.catch_warnings(), torch._inductor.config.patch(fallback_random=True):
        warnings.simplefilter("ignore")  # the compiler's own, on how it does what it does
        compiled: Callable[..., Any] = torch._inductor.compile(graph, list(inputs))
    return compiled


def _widen_products(graph: torch.fx.GraphModule) -> None:
    """On a CPU, write A B with more rows than columns as (Bᵀ Aᵀ)ᵀ: the same numbers, sooner.

    Such products come from differentiating a weight gradient once more. Autograd cannot choose
    their form; a graph can.
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


@dataclass
class _Trace:
    """A compiled derivation, the names of what it gives, and how often it was used."""

    function: Callable[..., Any]
    gradients: tuple[str, ...]
    statistics: tuple[tuple[str, str], ...]
    uses: int = field(default=0)


class CompiledDerivation:
    """Derives meta-gradients as `Engine.derive` does, compiled: set it as `engine.derivation`.

    Args:
        engine: whose derivation it is.
        compile_graph: from a graph and inputs to a function; default: Inductor.
        what: "compiled" or "captured", as warnings have it.
        patience: at least 0: compute this many steps of one form in a row as they are before a
            trace of it is made.

    Attributes:
        refusal: why steps are not, or no longer, compiled; None while they are.
    """

    def __init__(
        self,
        engine: Engine,
        compile_graph: Compile = inductor,
        *,
        what: str = "compiled",
        patience: int = 0,
    ) -> None:
        self.engine, self.compile_graph, self.what = engine, compile_graph, what
        self.patience = patience
        self.refusal: str | None = None
        self._traces: dict[Any, _Trace] = {}
        self._row: tuple[Any, int] = (None, 0)
        self._kept: dict[str, Any] | None = None

    def __call__(
        self, batch: TaskBatch, iteration: int, total: int, weights: Mapping[int, float]
    ) -> MetaGradients:
        """Return the meta-gradients of a batch.

        They are computed uncompiled where compiling was refused, and in a replay that looks for the
        first non-finite value.
        """
        engine = self.engine
        if self.refusal or engine.chain.watch is not None:
            return engine.derive(batch, iteration, total, weights)
        tensors = batch.tensors()
        orders = engine.inner.orders_of(iteration, total)
        numbers, kept = python_state(engine)
        self._refuse_changed(kept)
        named = batch.named_tensors().items()
        forms = tuple((name, tensor.shape, tensor.dtype) for name, tensor in named)
        key = (forms, batch.sizes, tuple(weights.items()), orders, numbers)
        if self.refusal or (key not in self._traces and self._waits(key)):
            return engine.derive(batch, iteration, total, weights)
        engine.inner.functional.begin(True)
        inputs = [*(holder[name].detach() for holder, name in _places(engine)), *tensors]
        if key not in self._traces:
            try:
                self._traces[key] = self._trace(
                    inputs, batch, weights, orders, iteration=iteration, total=total
                )
            except Exception as error:
                self.refusal = said_by(error)
            if self.refusal:  # not in the handler: the error holds what the failed trace allocated
                warn_refusal(self.what, self.refusal)
                return engine.derive(batch, iteration, total, weights)
        trace = self._traces[key]
        trace.uses += 1
        exact: MetaGradients | None = None
        if trace.uses == 2:
            devices = [engine.device] if engine.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                exact = engine.derive(batch, iteration, total, weights)
        with torch.no_grad():
            outer_loss, losses, *found = trace.function(*inputs)
        statistics: dict[str, dict[str, Tensor]] = {}
        ends = found[len(trace.gradients) :]
        for (plugin, name), tensor in zip(trace.statistics, ends, strict=True):
            statistics.setdefault(plugin, {})[name] = tensor
        gradients = dict(zip(trace.gradients, found, strict=False))
        traced = MetaGradients(gradients, outer_loss, losses, statistics, None)
        if exact is None or (apart := _apart(traced, exact)) <= APART:
            return traced
        self.refusal = (
            f"its second meta-gradient is {100 * apart:.3g} % off the untraced one, so something "
            "that it computes with changes and is no tensor of the model, a plugin or the batch: "
            "find it, and make it a buffer"
        )
        warn_refusal(self.what, self.refusal)
        return exact

    def _trace(
        self,
        inputs: list[Tensor],
        like: TaskBatch,
        weights: Mapping[int, float],
        orders: tuple[int, ...],
        *,
        iteration: int,
        total: int,
    ) -> _Trace:
        if len(self._traces) >= MOST_TRACES:
            what = "forms, outer weights, derivative orders or attributes of plugins"
            raise RuntimeError(f"batches of more than {MOST_TRACES} {what} came along")
        named: dict[str, Any] = {}
        now: Any = Unknown(iteration)
        length: Any = Unknown(total)

        def derivation(*tensors: Tensor) -> list[Tensor]:
            with _swapped(self.engine, tensors, like) as batch, NothingRead():
                found = self.engine.derive(batch, now, length, weights, orders=orders)
            named["gradients"] = tuple(found.gradients)
            named["statistics"] = tuple(
                (plugin, name) for plugin, kept in found.statistics.items() for name in kept
            )
            kept = [found.statistics[plugin][name] for plugin, name in named["statistics"]]
            return [found.outer_loss, found.losses, *found.gradients.values(), *kept]

        with stream(0, self.engine.device):  # the step must not miss what the trace draws
            graph = make_fx(derivation)(*inputs)
            return _Trace(self.compile_graph(graph, inputs), **named)

    def _refuse_changed(self, kept: dict[str, Any]) -> None:
        """Refuse what Python keeps beside numbers, where it has changed since the last step."""
        before, self._kept = self._kept, kept
        changed = [name for name in kept if before is not None and kept[name] != before.get(name)]
        if changed:
            self.refusal = (
                f"{changed[0]} changes from step to step, which a {self.what} step would freeze: "
                "make it a tensor, registered as a buffer of a plugin"
            )
            warn_refusal(self.what, self.refusal)

    def _waits(self, key: Any) -> bool:
        """Count one more step of this form; return whether it comes too early for a trace."""
        self._row = (key, self._row[1] + 1 if key == self._row[0] else 1)
        return self._row[1] <= self.patience


def _apart(traced: MetaGradients, exact: MetaGradients) -> float:
    """The relative difference of meta-gradients, or of outer losses if larger; 0 for NaN."""
    if traced.gradients.keys() != exact.gradients.keys():
        return math.inf
    gradients = [(traced.gradients[name], exact.gradients[name]) for name in exact.gradients]
    found = []
    for pairs in (gradients, [(traced.outer_loss, exact.outer_loss)]):
        apart = torch.nn.utils.get_total_norm([one - other for one, other in pairs])
        norm = torch.nn.utils.get_total_norm([other for _, other in pairs])
        found.append(float(apart / norm.clamp_min(torch.finfo(norm.dtype).tiny)))
    return max(0.0 if math.isnan(each) else each for each in found)


def _places(engine: Engine) -> list[tuple[Any, str]]:
    """Where tensors stand that may change from step to step: the model's and the plugins'."""
    modules = [module for plugin in engine.chain.plugins for module in plugin.modules()]
    holders: list[Any] = [
        holder for module in modules for holder in (module._parameters, module._buffers)
    ]
    # The clone that runs takes over the buffers of the model itself at every step.
    holders += [module._buffers for module in engine.inner.functional.model.modules()]
    inner = engine.inner
    found: list[tuple[Any, str]] = [
        (holder, name) for holder in (inner.parameters, inner.variables) for name in holder
    ]
    for holder in holders:
        found += [(holder, name) for name, tensor in holder.items() if tensor is not None]
    return found


@contextmanager
def _swapped(engine: Engine, tensors: Sequence[Tensor], like: TaskBatch) -> Iterator[TaskBatch]:
    """Inside, the engine computes with these tensors; yields the batch that they end with, in the
    form of another."""
    places = _places(engine)
    before = [holder[name] for holder, name in places]
    meta_parameters = dict(engine.meta_parameters)
    new: dict[int, Any] = {}
    try:
        for (holder, name), old, tensor in zip(places, before, tensors, strict=False):
            if id(old) not in new:  # a task parameter's start stands in two places, and is one
                new[id(old)] = tensor.detach().requires_grad_(old.requires_grad)
            holder[name] = new[id(old)]
        engine.meta_parameters.update({name: new[id(old)] for name, old in meta_parameters.items()})
        yield like.with_tensors(tensors[len(places) :])
    finally:
        for (holder, name), old in zip(places, before, strict=True):
            holder[name] = old
        engine.meta_parameters.update(meta_parameters)
