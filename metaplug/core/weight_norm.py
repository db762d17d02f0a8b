"""Weight normalisation, w = g · v / ‖v‖, by operations whose derivatives are right to any order.

torch's own, `torch._weight_norm`, takes ‖v‖ for a constant in its second derivative where one norm
is kept for each entry of the first or the last dimension (torch 2.14).
"""

from __future__ import annotations

import torch
from torch import Tensor


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return w = g · v / ‖v‖, with the norm over all dimensions but `dim`; over all for -1.

    Args:
        v: the direction, of any shape and a floating dtype.
        g: the length, of v's dtype: 1 in all dimensions but `dim`, or of one number.
        dim: the one whose entries have a length each.

    Source: Salimans and Kingma 2016 (arXiv 1602.07868), section 2.

    Example:
        >>> weight_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0]]))
        tensor([[6., 8.]])
    """
    if dim == -1:  # as torch has it, which writes a `dim` of None so
        norm: Tensor = torch.linalg.vector_norm(v)
    else:
        rows = v.movedim(dim, 0).reshape(v.shape[dim], -1)
        form = [1] * v.dim()
        form[dim] = -1
        norm = torch.linalg.vector_norm(rows, dim=1).view(form)
    return v * (g / norm)
