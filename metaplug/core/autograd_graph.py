"""The graph that autograd keeps of a tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def graph_leaves(output: Tensor) -> list[Tensor]:
    """The leaves of an output's graph."""
    found = [getattr(node, "variable", None) for node in graph_nodes(output)]
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def graph_nodes(output: Tensor, until: Iterable[Tensor] = ()) -> list[Any]:
    """The nodes of an output's graph, down to those of some tensors on the way."""
    ends = {each.grad_fn for each in until}
    seen, waiting = dict[Any, None](), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen and node not in ends:
            seen[node] = None
            waiting += [source for source, _ in node.next_functions]
    return list(seen)
