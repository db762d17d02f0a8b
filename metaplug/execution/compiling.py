"""A traced step compiled by Inductor: at once, or in a process beside the run.

Inductor keeps what it compiles on disk, by the graph, the processor, the threads and torch itself
(in TORCHINDUCTOR_CACHE_DIR, else a folder of the system's for temporary files). So a process beside
the run need hand over nothing, and a later run of the same step starts in seconds.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaplug.execution.graph_file import formats_by_name, read_graph, write_graph
from metaplug.execution.graph_rewrites import rewrite

Function = Callable[..., Any]

_Graph = torch.fx.GraphModule
_Process = subprocess.Popen[bytes]


def inductor(graph: _Graph, inputs: Sequence[Tensor]) -> Function:
    """The graph, compiled for inputs of these forms, with torch's own random numbers."""
    rewrite(graph)
    return _compiled(graph, inputs)


def _compiled(graph: _Graph, inputs: Sequence[Tensor]) -> Function:
    on_cpu = all(each.device.type == "cpu" for each in inputs)
    # In Python the calls between a CPU's kernels take as long as those of a small model.
    config = torch._inductor.config.patch(fallback_random=True, cpp_wrapper=on_cpu)
    with _quiet(), formats_by_name(), config:
        compiled: Function
        if make := getattr(torch._inductor, "standalone_compile", None):  # it caches more
            compiled = make(graph, list(inputs), dynamic_shapes="from_example_inputs")
        else:
            compiled = torch._inductor.compile(graph, list(inputs))
    return compiled


class Beside:
    """A process that compiles a graph, so that Inductor has it in its cache.

    It ends with this object, or with the run, however that ends.

    Raises:
        Exception: the graph cannot be handed over.
    """

    def __init__(self, graph: _Graph, inputs: Sequence[Tensor]) -> None:
        forms = [(each.shape, each.stride(), each.dtype, each.device) for each in inputs]
        rewrite(graph)  # by what its nodes know of their results, which is not handed over
        folder, running = Path(tempfile.mkdtemp(prefix="metaplug-compile-")), list[_Process]()
        self._end = weakref.finalize(self, _stop, folder, running, os.getpid())
        task, self._said = folder / "task", folder / "said"
        write_graph(task, graph, forms=forms, settings=_settings())
        with self._said.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", "-m", __name__, str(task)],
                stdin=subprocess.PIPE,  # it closes with the run, however that ends
                stdout=output,
                stderr=output,
                # The run's own modules, which a folder of the run's may shadow.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                start_new_session=True,  # Ctrl-C is for the run, which ends it
            )
        running.append(self._process)

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


def _stop(folder: Path, running: Sequence[_Process], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the run, which ends before it
        return
    for process in running:
        if process.poll() is None:
            _kill(process.pid)
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
    shutil.rmtree(folder, ignore_errors=True)


def _kill(process: int) -> None:
    """End a process that leads a session, and the compilers that it started."""
    if hasattr(os, "killpg"):
        os.killpg(process, signal.SIGKILL)
    else:
        os.kill(process, signal.SIGTERM)


def _end_with_run(folder: Path) -> None:
    """Wait for the end of the run, and end this process."""
    os.read(0, 1)  # not sys.stdin, whose lock this thread would hold when Python ends
    shutil.rmtree(folder, ignore_errors=True)
    _kill(os.getpid())


def _compile_for_another(task: Path) -> None:
    """Compile what a `Beside` has written, with the settings of its process."""
    threading.Thread(target=_end_with_run, args=(task.parent,), daemon=True).start()
    graph, more = read_graph(task)
    if hasattr(os, "nice"):
        os.nice(10)  # the run goes first
    _set(more["settings"])
    inputs = [
        torch.empty_strided(shape, stride, dtype=dtype, device=device)
        for shape, stride, dtype, device in more["forms"]
    ]
    _compiled(graph, inputs)


_Settings = tuple[int, torch.dtype, dict[str, Any]]


def _settings() -> _Settings:
    """The settings of this process by which Inductor finds a graph in its cache."""
    matmul = torch.backends.cuda.matmul
    names = ["fp32_precision" if hasattr(torch.backends.cudnn, "conv") else "allow_tf32"]
    names += [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("fp16", "bf16")]
    products = {name: getattr(matmul, name) for name in names}
    return torch.get_num_threads(), torch.get_default_dtype(), products


def _set(settings: _Settings) -> None:
    threads, dtype, products = settings
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    for name, value in products.items():
        setattr(torch.backends.cuda.matmul, name, value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the compiler keeps to itself how it does what it does."""
    loggers = [logging.getLogger(f"torch.{name}") for name in ("utils.cpp_extension", "_inductor")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


if __name__ == "__main__":
    _compile_for_another(Path(sys.argv[1]))
