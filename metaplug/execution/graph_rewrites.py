"""Rewrites of a traced graph before Inductor compiles it for a CPU: the same numbers, sooner.

Autograd writes its products and sums in one form, whatever runs them. Each function here puts
another in its place, and once it has, finds nothing more to do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_Graph = fx.GraphModule

_VIEWS = frozenset(
    {
        _aten.alias.default,
        _aten.detach.default,
        _aten.expand.default,
        _aten.reshape.default,
        _aten.select.int,
        _aten.squeeze.dim,
        _aten.transpose.int,
        _aten.unsqueeze.default,
        _aten.view.default,
    }
)

GROWS = 8
"""A vector that meets what is so many times as large is computed once, not at each place."""


def rewrite(graph: _Graph) -> None:
    """Rewrite a graph in place; twice is once."""
    _part_products(graph)
    _widen_products(graph)
    _keep_vectors(graph)
    _sum_products(graph)
    _free_views(graph)
    graph.recompile()


def _part_products(graph: _Graph) -> None:
    """Write C + A B as a product and a sum, which the compiler joins with what follows.

    A library's product with a sum copies C to all places of the result first.
    """
    for node in _calls(graph, _aten.baddbmm.default):
        if node.kwargs:
            continue
        start, one, other = node.args
        with graph.graph.inserting_before(node):
            product = _call(graph, _aten.bmm.default, (one, other), node.meta["val"])
            total = _call(graph, _aten.add.Tensor, (product, start), node.meta["val"])
        _replace(graph, node, total)


def _widen_products(graph: _Graph) -> None:
    """Write A B with more rows than columns as (Bᵀ Aᵀ)ᵀ.

    Such products come from differentiating a weight gradient once more.
    """
    for node in _calls(graph, _aten.bmm.default):
        _, rows, columns = node.meta["val"].shape
        if rows <= columns:
            continue
        with graph.graph.inserting_before(node):
            factors = [
                _call(graph, _aten.transpose.int, (factor, 1, 2), factor.meta["val"].mT)
                for factor in reversed(node.args)
            ]
            turned = _call(graph, _aten.bmm.default, tuple(factors), node.meta["val"].mT)
            product = _call(graph, _aten.transpose.int, (turned, 1, 2), node.meta["val"])
        _replace(graph, node, product)


def _keep_vectors(graph: _Graph) -> None:
    """Compute a vector once where it meets a larger matrix, such as the norms of its rows.

    The compiler would compute it at each place of the matrix. A view by strides makes it keep the
    vector. Where a vector meets images, as in batch norm, what it is computed with counts for more.
    """
    for node in _calls(graph):
        value = node.meta["val"]
        if node.target in _VIEWS or node.target is _aten.as_strided.default:
            continue
        if value.dim() != 1 or value.stride() != (1,) or value.storage_offset():
            continue
        if len(value) < 2 or not _meets(node, GROWS * len(value)):
            continue
        with graph.graph.inserting_after(node):
            kept = _call(graph, _aten.as_strided.default, (node, [len(value)], [1]), value)
        node.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)


def _meets(node: fx.Node, size: int) -> bool:
    """Whether a node, or a view of it, is used with a matrix of so many numbers, or for one."""
    for user in node.users:
        if user.op != "call_function":  # as the end, which takes all results
            continue
        if user.target in _VIEWS:
            if _meets(user, size):
                return True
            continue
        values = [each.meta.get("val") for each in (user, *user.all_input_nodes)]
        matrices = [value for value in values if isinstance(value, Tensor) and value.dim() == 2]
        if any(matrix.numel() >= size for matrix in matrices):
            return True
    return False


def _sum_products(graph: _Graph) -> None:
    """Write products with a vector as sums, which the compiler joins with what is around.

    A product of a library walks over the matrix once for itself. Of two matrices that are taken as
    vectors, the sum goes row by row, as others that read them.
    """
    for node in _calls(graph, _aten.mv.default, _aten.mm.default, _aten.dot.default):
        (one, other), value = node.args, node.meta["val"]
        is_row = node.target is _aten.mm.default and len(value) == 1  # (1, n) (n, m)
        if node.target is _aten.mm.default and not is_row:
            continue
        form = _form_of_matrix(one) if value.dim() == 0 else None
        by_rows = form is not None and form == _form_of_matrix(other)
        if by_rows:
            one, other = one.args[0], other.args[0]
        with graph.graph.inserting_before(node):
            if is_row:
                one = graph.graph.call_function(_aten.transpose.int, (one, 0, 1))
            total = graph.graph.call_function(_aten.mul.Tensor, (one, other))
            axis = 0 if is_row else -1
            total = graph.graph.call_function(_aten.sum.dim_IntList, (total, [axis], is_row))
            if by_rows:
                total = graph.graph.call_function(_aten.sum.default, (total,))
        total.meta["val"] = value
        _replace(graph, node, total)


def _form_of_matrix(vector: Any) -> torch.Size | None:
    """The shape of the matrix that is seen as this vector; None for a vector of its own."""
    if vector.target not in (_aten.view.default, _aten.reshape.default):
        return None
    form: torch.Size = vector.args[0].meta["val"].shape
    return form if len(form) == 2 else None


def _free_views(graph: _Graph) -> None:
    """Let views be copies where they must: Inductor lays out some results otherwise than torch."""
    for node in graph.graph.nodes:
        if node.target is _aten.view.default:
            node.target = _aten.reshape.default


def _calls(graph: _Graph, *targets: Any) -> list[Any]:
    """The calls of these functions, or of all, that give a tensor on a CPU."""
    return [
        node
        for node in graph.graph.nodes
        if node.op == "call_function"
        and (not targets or node.target in targets)
        and isinstance(node.meta.get("val"), Tensor)
        and node.meta["val"].device.type == "cpu"
    ]


def _call(graph: _Graph, target: Any, arguments: tuple[Any, ...], value: Tensor) -> fx.Node:
    """A new node, and what is known of its result."""
    node = graph.graph.call_function(target, arguments)
    node.meta["val"] = value
    return node


def _replace(graph: _Graph, node: fx.Node, new: fx.Node) -> None:
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)
