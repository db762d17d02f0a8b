"""Captured steps: a trace's launches on a CUDA device, recorded in a CUDA graph and replayed.

A replay computes where it was recorded. So inputs are copied to where the recording read them, and
outputs to new tensors, before the next replay, or that of another graph in the same pool of memory,
overwrites them: gradients and statistics may be kept. Nothing waits for the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from metaplug.errors import quoted, said_by
from metaplug.execution.compiling import inductor
from metaplug.execution.engine import Engine
from metaplug.execution.traced import Compile, CompiledDerivation, warn_refusal

WARM_UP = 3
"""Runs before a recording, as many as torch takes: what libraries set up first is not recorded."""

Function = Callable[..., Sequence[Tensor]]
Record = Callable[[Function, Sequence[Tensor]], tuple[Callable[[], None], Sequence[Tensor]]]
"""(function, inputs) → (replay, outputs): a replay reads the inputs, and writes to the outputs."""


class CudaGraphs:
    """Records functions in CUDA graphs that share one pool of memory, and never replay together."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        # The warm-up runs on it too, as libraries set themselves up by stream.
        self._stream = torch.cuda.Stream(device)

    def __call__(
        self, function: Function, inputs: Sequence[Tensor]
    ) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """Record the function for these inputs.

        A replay reads them and the function's constants, so both must live as long.

        Raises:
            RuntimeError: the function waits for the device, or does what cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            # Leaves the stream even where torch.cuda.graph cannot.
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP - 1):
                    function(*inputs)
                # A recording that is broken off leaves torch's allocator in an odd state, so a
                # wait is looked for before.
                with _waiting_refused():
                    function(*inputs)
                try:
                    # Another thread, such as a loader's, may go on using the device.
                    with torch.cuda.graph(
                        graph,
                        pool=self._pool,
                        stream=self._stream,
                        capture_error_mode="thread_local",
                    ):
                        outputs = function(*inputs)
                except RuntimeError as error:
                    # The end of a broken recording hides what broke it.
                    raise error.__context__ or error  # noqa: B904
            torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay, outputs


class Capture:
    """Captures traced steps; what a CompiledDerivation takes for `compile_graph`.

    Args:
        record: what records a function: `CudaGraphs`.
        compile_graph: what compiles the trace before; None records it as it is. A compiled step
            that cannot be captured goes on compiled.
    """

    def __init__(self, record: Record, compile_graph: Compile | None = None) -> None:
        self.record, self.compile_graph = record, compile_graph
        self.refusal: str | None = None
        """Why compiled steps are not, or no longer, captured; None while they are."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        """Return the captured graph, for inputs of these forms.

        Raises:
            RuntimeError: it cannot be captured, and is not compiled either.
        """
        static = [tensor.clone() for tensor in inputs]
        if self.compile_graph is None:
            _check(graph, inputs)
            return _Captured(graph.forward, static, self.record)
        compiled = self.compile_graph(graph, static)
        if self.refusal is None:
            try:
                _check(graph, inputs)
                return _Captured(compiled, static, self.record)
            except Exception as error:
                self.refusal = said_by(error)
            warn_refusal("captured", self.refusal)
        return compiled


class _Captured:
    """A recorded function, called as the function itself."""

    def __init__(self, function: Callable[..., Any], inputs: list[Tensor], record: Record) -> None:
        self.function, self.inputs = function, inputs
        with torch.no_grad():
            self.replay, self.outputs = record(function, inputs)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        _copy(inputs, self.inputs)
        self.replay()
        outputs = [torch.empty_like(tensor) for tensor in self.outputs]
        _copy(self.outputs, outputs)
        return outputs


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy those of one dtype together: a launch for each takes the time that a replay saves."""
    for dtype in {target.dtype for target in targets}:
        pairs = zip(sources, targets, strict=True)
        same = [(source, target) for source, target in pairs if target.dtype == dtype]
        torch._foreach_copy_([target for _, target in same], [source for source, _ in same])


def _check(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Refuse a graph that draws random numbers, or whose inputs are on several devices.

    A recording has its own way with generators, and a replay would not see another device's
    inputs change.

    Raises:
        RuntimeError: an operation draws, and is named; or an input is on another device.
    """
    if len(devices := {str(tensor.device) for tensor in inputs}) > 1:
        raise RuntimeError(
            f"what the step reads is on several devices ({quoted(sorted(devices))}): make a "
            "plugin's on context.device"
        )
    targets = {node.target for node in graph.graph.nodes}
    operations = [target for target in targets if isinstance(target, torch._ops.OpOverload)]
    seeded = torch.Tag.nondeterministic_seeded
    if drawing := sorted(str(operation) for operation in operations if seeded in operation.tags):
        raise RuntimeError(
            f"the step draws random numbers ({quoted(drawing)}), which a captured step does not: "
            "leave capture out, or the layer or plugin that draws them"
        )


@contextmanager
def _waiting_refused() -> Iterator[None]:
    """Let an operation that waits for the device raise a RuntimeError, as far as torch notices."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def capturing(
    engine: Engine, *, compiles: bool, patience: int = 0, record: Record | None = None
) -> CompiledDerivation:
    """Return the engine's derivation, captured.

    Args:
        engine: on a CUDA device.
        compiles: whether the trace is compiled before.
        patience: uncaptured steps of one form in a row before; none where a trace is made anyway.
        record: default: CUDA graphs on the engine's device.
    """
    capture = Capture(record or CudaGraphs(engine.device), inductor if compiles else None)
    what, waits = ("compiled", 0) if compiles else ("captured", patience)
    return CompiledDerivation(engine, capture, what=what, patience=waits)
