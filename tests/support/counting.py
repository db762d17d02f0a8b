"""Exact costs of a computation, which no clock and no other process changes."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode


def operations(compute):
    """Count the floating-point operations of products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops()


class _Saved:
    def __init__(self, tensor, count):
        self.tensor, self.count = tensor, count
        count.change(tensor.nbytes)

    def __del__(self):
        self.count.change(-self.tensor.nbytes)


class _Count:
    now = most = 0

    def change(self, size):
        self.now += size
        self.most = max(self.most, self.now)


def live_graph(compute):
    """The most bytes that autograd has saved at a time for backward passes."""
    count = _Count()
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: _Saved(tensor.detach(), count), lambda saved: saved.tensor
    )
    with hooks:
        compute()
    return count.most
