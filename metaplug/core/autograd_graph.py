"""The graph that autograd keeps of a tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad


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


def is_seen_through(tensor: Tensor) -> bool:
    """Whether more than autograd sees a tensor: a transform of torch.func, or a batch of gradients.

    So does forward mode. A Function that is applied in a backward pass has no rule for any of these
    or, of a batch of gradients (is_grads_batched), no graph.
    """
    return (
        forward_ad._current_level >= 0
        or is_functorch_wrapped_tensor(tensor)
        or is_legacy_batchedtensor(tensor)
    )
