"""A traced graph in a file, node by node, for another process.

`pickle` would trace it anew, and make constants of tensors that it creates.
"""

from __future__ import annotations

import copyreg
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate


@dataclass(frozen=True)
class _Result:
    """What a node of this name gives."""

    name: str


@contextmanager
def formats_by_name() -> Iterator[None]:
    """Inside, `pickle` writes torch.contiguous_format and the like by name.

    Else it writes the first module that imports torch: a test's, or one of the user's. The bytes
    are then of this process, and Inductor's cache goes by them.
    """
    before = copyreg.dispatch_table.get(torch.memory_format)
    copyreg.pickle(torch.memory_format, lambda one: (constant, (str(one).partition(".")[2],)))
    try:
        yield
    finally:
        if before is None:
            del copyreg.dispatch_table[torch.memory_format]
        else:
            copyreg.dispatch_table[torch.memory_format] = before


def constant(name: str) -> Any:
    """The constant of torch with a name."""
    return getattr(torch, name)


def write_graph(path: Path, graph: GraphModule, **more: Any) -> None:
    """Write a graph of torch's operators, and more of plain values and tensors.

    Raises:
        RuntimeError: it calls something else, which is named.
    """
    nodes = [
        (
            node.op,
            node.name,
            _name_of(node.target) if node.op == "call_function" else node.target,
            map_aggregate(node.args, _written),
            map_aggregate(node.kwargs, _written),
        )
        for node in graph.graph.nodes
    ]
    named = (*graph.named_buffers(), *graph.named_parameters())  # such as frozen ones of a loss
    constants = {name: each.detach() for name, each in named}
    with formats_by_name():
        torch.save({"nodes": nodes, "constants": constants, **more}, path, pickle_protocol=5)


def read_graph(path: Path) -> tuple[GraphModule, dict[str, Any]]:
    """Return what `write_graph` wrote: the graph and more. The file is one of our own."""
    more = torch.load(path, weights_only=False)
    graph, found = Graph(), dict[str, Node]()

    def given(values: Any) -> Any:
        return map_aggregate(values, read)

    def read(value: Any) -> Any:
        return found[value.name] if isinstance(value, _Result) else value

    for op, name, target, args, kwargs in more.pop("nodes"):
        called = _operator(target) if op == "call_function" else target
        found[name] = graph.create_node(op, called, given(args), given(kwargs), name)
    return GraphModule(more.pop("constants"), graph), more


def _written(value: Any) -> Any:
    return _Result(value.name) if isinstance(value, Node) else value


def _name_of(target: Any) -> tuple[str, ...]:
    """The name of an operator: (namespace, name, overload), or () for taking an item."""
    if target is operator.getitem:
        return ()
    if not isinstance(target, torch._ops.OpOverload):
        raise RuntimeError(f"the step calls {target}, which is no operator of torch")
    return (*target._schema.name.split("::"), target._overloadname)


def _operator(name: tuple[str, ...]) -> Any:
    return operator.attrgetter(".".join(name))(torch.ops) if name else operator.getitem
