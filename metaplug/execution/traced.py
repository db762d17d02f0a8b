"""Compiled steps: the engine's own derivation, traced once for a form of batch, then compiled.

There is no second implementation: `make_fx` records what the engine, `higher` and the plugins do to
tensors. What changes from step to step goes in as an input: weights, the plugins' parameters and
buffers, the tasks, the meta-iteration, the weights of the query losses. What Python decides, a
trace would freeze. So it is part of the trace's key (shapes, which query losses count, derivative
orders, numbers that plugins keep), or the step is not traced: that is said, and the steps of this
form go on uncompiled, and no others. The second step of every trace is compared with the untraced
one, for what nobody thought of; where they differ, no trace is trusted any more.

`compiling` makes a function of the graph; `cuda_graphs` puts a recording in the place of it.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from metaplug.contract.task_batch import TaskBatch
from metaplug.core.outer_loop import MetaGradients
from metaplug.errors import said_by
from metaplug.execution.compiling import Beside, Function, inductor
from metaplug.execution.engine import Engine
from metaplug.execution.python_state import NothingRead, python_state
from metaplug.execution.step_inputs import Places, Step, form_of, in_place, places_of, tensors_of
from metaplug.random_streams import stream

MOST_TRACES = 8
"""Traces of one run (forms of batch, query losses, derivative orders, plugins' numbers); steps of
further ones are uncompiled."""

APART = 0.05
"""The relative difference of a traced meta-gradient from the untraced that rounding cannot explain,
not even where an inner loop amplifies it."""

PATIENCE = 10
"""With "auto", steps of one form in a row, as they are, before a trace of it is paid for."""

LEAST = 60.0
"""With "auto", nothing is traced where less than so many seconds of the run are left."""

WORTH = 3.0
"""With "auto", what is left of the run must take so many times as long as compiling."""

SECONDS_A_NODE = 0.06
"""What compiling takes for each node of a graph: 0.04 to 0.1 on two CPU cores."""

Compile = Callable[[torch.fx.GraphModule, Sequence[Tensor]], Function]

_log = logging.getLogger(__name__)


def warn_refusal(what: str, reason: str, where: str = ", and the run goes on") -> None:
    """Say that steps are not `what` ("compiled", "captured") after all."""
    warnings.warn(f"steps are not {what}{where} un{what}: {reason}", stacklevel=3)


@dataclass
class _Trace:
    """A traced derivation, and the names of what it gives.

    Attributes:
        graph: what was traced.
        function: the graph, compiled.
        beside: the process that compiles it.
        uses: how often the function was called.
    """

    graph: torch.fx.GraphModule
    gradients: tuple[str, ...]
    statistics: tuple[tuple[str, str], ...]
    function: Function | None = None
    beside: Beside | None = None
    uses: int = 0


class CompiledDerivation:
    """Derives meta-gradients as `Engine.derive` does, compiled: set it as `engine.derivation`.

    Args:
        engine: whose derivation it is.
        compile_graph: from a graph and inputs to a function; default: Inductor.
        what: "compiled" or "captured", as warnings have it.
        patience: at least 0: compute this many steps of one form in a row as they are before a
            trace of it is made.
        auto: compile in a process beside the run, where enough of it is left to gain by that.

    Attributes:
        refusal: why steps, or those of one form, are not compiled; None while all are.
    """

    def __init__(
        self,
        engine: Engine,
        compile_graph: Compile = inductor,
        *,
        what: str = "compiled",
        patience: int = 0,
        auto: bool = False,
    ) -> None:
        self.engine, self.compile_graph, self.what = engine, compile_graph, what
        self.patience, self.auto = patience, auto
        self.refusal: str | None = None
        self._traces: dict[Any, _Trace] = {}
        self._refused: set[Any] = set()
        self._said: set[str] = set()
        self._off = False
        self._row = _Row()
        self._kept: dict[str, Any] | None = None

    def __call__(
        self, batch: TaskBatch, iteration: int, total: int, weights: Mapping[int, float]
    ) -> MetaGradients:
        """Return the meta-gradients of a batch.

        They are computed uncompiled where compiling was refused or is under way, and in a replay
        that looks for the first non-finite value.
        """
        step = Step(batch, iteration, total, weights)
        if self._off or self.engine.chain.watch is not None:
            return self.engine.derive(*step)
        numbers, kept = python_state(self.engine)
        self._stop_where_changed(kept)
        places = places_of(self.engine)
        key = self._key(step, places, numbers)
        self._row.count(key)
        if self._off or key in self._refused or not self._due(key, step):
            return self.engine.derive(*step)
        self.engine.inner.functional.begin(True)
        inputs = tensors_of(self.engine, step, places)
        reason = trace = function = None
        try:
            trace = self._traces.get(key) or self._trace(inputs, step, key)
            function = trace.function or self._compiled(trace, inputs, step)
        except Exception as error:
            reason = said_by(error)
        if (
            reason is not None
        ):  # not in the handler: the error holds what the failed trace allocated
            self._traces.pop(key, None)
            if len(self._refused) < MOST_TRACES:  # else none has a trace any more
                self._refused.add(key)
            self._refuse(reason, " in this form, and go on")
        if trace is None or function is None:
            return self.engine.derive(*step)
        return self._checked(trace, function, inputs, step)

    def _key(self, step: Step, places: Places, numbers: Any) -> Any:
        """What a trace is made for."""
        orders = self.engine.inner.orders_of(step.iteration, step.total)
        return form_of(step, places), orders, numbers

    def _due(self, key: Any, step: Step) -> bool:
        """Whether a step may be traced by now, or was."""
        if key in self._traces:
            return True
        return self._row.steps > self.patience and (not self.auto or self._left(step) > LEAST)

    def _left(self, step: Step) -> float:
        """The seconds that the rest of the run takes, if all its steps are as the last ones."""
        left: int = step.total - step.iteration
        return left * self._row.seconds

    def _trace(self, inputs: list[Tensor], like: Step, key: Any) -> _Trace:
        if len(self._traces) + len(self._refused) >= MOST_TRACES:
            what = "forms, query losses, derivative orders or attributes of plugins"
            raise RuntimeError(f"batches of more than {MOST_TRACES} {what} came along")
        engine, named = self.engine, dict[str, Any]()
        orders = engine.inner.orders_of(like.iteration, like.total)
        before = python_state(engine)

        def derivation(*tensors: Tensor) -> list[Tensor]:
            with in_place(engine, tensors, like) as step, NothingRead():
                found = engine.derive(*step, orders=orders)
                _check_unchanged(before, python_state(engine))
            named["gradients"] = tuple(found.gradients)
            named["statistics"] = tuple(
                (plugin, name) for plugin, kept in found.statistics.items() for name in kept
            )
            kept = [found.statistics[plugin][name] for plugin, name in named["statistics"]]
            told = engine.told(found, None)
            return [told, found.outer_loss, found.losses, *found.gradients.values(), *kept]

        # Without one at hand, make_fx makes a fake mode for each node: half the time of a trace.
        forms = TracingContext(FakeTensorMode(allow_fallback_kernels=True))
        # The step must not miss what the trace draws.
        with stream(0, engine.device), tracing(forms):
            graph = make_fx(derivation)(*inputs)
        self._traces[key] = trace = _Trace(graph, **named)
        return trace

    def _compiled(self, trace: _Trace, inputs: list[Tensor], step: Step) -> Function | None:
        """Return the compiled function; None where it is not there yet, or not worth it."""
        if self.auto:
            seconds = SECONDS_A_NODE * len(trace.graph.graph.nodes)
            if trace.beside is None:
                if self._left(step) < WORTH * seconds:
                    return None
                trace.beside = Beside(trace.graph, inputs)
                _log.info("steps are compiled beside the run: some %.0f seconds of work", seconds)
            if not trace.beside.done():
                return None
        with stream(0, self.engine.device):
            trace.function = self.compile_graph(trace.graph, inputs)
        if self.auto:
            _log.info("steps are compiled from iteration %d on", step.iteration + 1)
        return trace.function

    def _checked(
        self, trace: _Trace, function: Function, inputs: list[Tensor], step: Step
    ) -> MetaGradients:
        """Return what a compiled function gives; in its second use, compared with the untraced."""
        trace.uses += 1
        exact: MetaGradients | None = None
        if trace.uses == 2:
            devices = [self.engine.device] if self.engine.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                exact = self.engine.derive(*step)
        with torch.no_grad():
            told, outer_loss, losses, *found = function(*inputs)
        statistics: dict[str, dict[str, Tensor]] = {}
        ends = found[len(trace.gradients) :]
        for (plugin, name), tensor in zip(trace.statistics, ends, strict=True):
            statistics.setdefault(plugin, {})[name] = tensor
        gradients = dict(zip(trace.gradients, found, strict=False))
        traced = MetaGradients(gradients, outer_loss, losses, statistics, None, told)
        if exact is None or (apart := _apart(traced, exact)) <= APART:
            return traced
        self._off = True
        self._refuse(
            f"its second meta-gradient is {100 * apart:.3g} % off the untraced one, so something "
            "that it computes with changes and is no tensor of the model, a plugin or the batch: "
            "find it, and make it a buffer"
        )
        return exact

    def _stop_where_changed(self, kept: dict[str, Any]) -> None:
        """Stop where what Python keeps beside numbers has changed since the last step."""
        before, self._kept = self._kept, kept
        changed = [name for name in kept if before is not None and kept[name] != before.get(name)]
        if changed:
            self._off = True
            self._refuse(_changes(changed[0]))

    def _refuse(self, reason: str, where: str = ", and the run goes on") -> None:
        """Note a reason, and say it once."""
        self.refusal = reason
        if reason not in self._said:
            self._said.add(reason)
            warn_refusal(self.what, reason, where)


def _check_unchanged(before: tuple[Any, Any], after: tuple[Any, Any]) -> None:
    """Refuse a step that writes what Python keeps, so that a later one may read it."""
    (numbers, kept), (numbers_after, kept_after) = before, after
    changed = [name for name in kept_after if kept_after[name] != kept.get(name)]
    if changed or numbers_after != numbers:
        raise RuntimeError(_changes(changed[0] if changed else "a number that a plugin keeps"))


def _changes(name: str) -> str:
    return (
        f"{name} changes from step to step, which a compiled or captured step would freeze: make "
        "it a tensor, registered as a buffer of a plugin"
    )


class _Row:
    """The steps of one form in a row up to now, and the seconds that one of them takes."""

    def __init__(self) -> None:
        self.steps, self.seconds = 0, math.inf
        self._key: Any = None
        self._at = 0.0

    def count(self, key: Any) -> None:
        """Count one more step, which begins."""
        now = time.perf_counter()
        if key == self._key:
            self.steps += 1
            self.seconds = min(self.seconds, now - self._at)  # others have a validation in between
        else:
            self._key, self.steps, self.seconds = key, 1, math.inf
        self._at = now


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
