"""A traced step compiled by Inductor: at once, or in a process beside the run.

Inductor keeps what it compiles on disk, by the graph, the processor, the threads and torch itself
(in TORCHINDUCTOR_CACHE_DIR, else a folder of the system's for temporary files). So a process beside
the run need hand over nothing, and a later run of the same step starts in seconds.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaplug.execution.graph_file import read_graph, write_graph

Function = Callable[..., Any]

_Graph = torch.fx.GraphModule
_aten = torch.ops.aten


def inductor(graph: _Graph, inputs: Sequence[Tensor]) -> Function:
    """The graph, compiled for inputs of these forms, with torch's own random numbers."""
    _rewrite(graph)
    return _compiled(graph, inputs)


def _compiled(graph: _Graph, inputs: Sequence[Tensor]) -> Function:
    with _quiet(), torch._inductor.config.patch(fallback_random=True):
        compiled: Function
        if make := getattr(torch._inductor, "standalone_compile", None):  # it caches more
            compiled = make(graph, list(inputs), dynamic_shapes="from_example_inputs")
        else:
            compiled = torch._inductor.compile(graph, list(inputs))
    return compiled


class Beside:
    """A process that compiles a graph, so that Inductor has it in its cache.

    It ends with this object, or with the run.

    Raises:
        Exception: the graph cannot be handed over.
    """

    def __init__(self, graph: _Graph, inputs: Sequence[Tensor]) -> None:
        forms = [(each.shape, each.stride(), each.dtype, each.device) for each in inputs]
        _rewrite(graph)  # by what its nodes know of their results, which is not handed over
        self._folder = tempfile.TemporaryDirectory(prefix="metaplug-compile-")
        task, said = (Path(self._folder.name) / name for name in ("task", "said"))
        write_graph(task, graph, forms=forms, threads=torch.get_num_threads())
        self._said = said
        with said.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(task)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for the run, which ends it
            )
        self._end = weakref.finalize(self, _stop, self._process, self._folder)

    def done(self) -> bool:
        """Whether the process has ended.

        Raises:
            RuntimeError: it failed; with the last line that it said.
        """
        status = self._process.poll()
        if status is None:
            return False
        lines = self._said.read_text(errors="replace").split("\n")
        self._end()
        if status:
            last = next((line for line in reversed(lines) if line.strip()), f"status {status}")
            raise RuntimeError(f"the process that compiled beside the run failed: {last.strip()}")
        return True


def _stop(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    process.kill()
    process.wait()
    folder.cleanup()


def _compile_for_another(task: Path) -> None:
    """Compile what a `Beside` has written, with the threads of its process."""
    graph, more = read_graph(task)
    if hasattr(os, "nice"):
        os.nice(10)  # the run goes first
    torch.set_num_threads(more["threads"])
    inputs = [
        torch.empty_strided(shape, stride, dtype=dtype, device=device)
        for shape, stride, dtype, device in more["forms"]
    ]
    _compiled(graph, inputs)


def _rewrite(graph: _Graph) -> None:
    """Write what autograd cannot choose in the form that suits the compiler; twice is once."""
    _widen_products(graph)
    _free_views(graph)
    graph.recompile()


def _widen_products(graph: _Graph) -> None:
    """On a CPU, write A B with more rows than columns as (Bᵀ Aᵀ)ᵀ: the same numbers, sooner.

    Such products come from differentiating a weight gradient once more.
    """
    for node in list(graph.graph.nodes):
        if node.target is not _aten.bmm.default or node.meta["val"].device.type != "cpu":
            continue
        _, rows, columns = node.meta["val"].shape
        if rows > columns:
            with graph.graph.inserting_before(node):
                transposed = [
                    graph.graph.call_function(_aten.transpose.int, (factor, 1, 2))
                    for factor in reversed(node.args)
                ]
                product = graph.graph.call_function(_aten.bmm.default, tuple(transposed))
                product.meta["val"] = node.meta["val"].mT
                node.replace_all_uses_with(
                    graph.graph.call_function(_aten.transpose.int, (product, 1, 2))
                )
            graph.graph.erase_node(node)


def _free_views(graph: _Graph) -> None:
    """Let views be copies where they must: Inductor lays out some results otherwise than torch."""
    for node in graph.graph.nodes:
        if node.target is _aten.view.default:
            node.target = _aten.reshape.default


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the compiler keeps to itself how it does what it does."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


if __name__ == "__main__":
    _compile_for_another(Path(sys.argv[1]))
