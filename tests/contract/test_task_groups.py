"""Tasks of one size are taken out of a batch, values and gradients."""

import torch

from metaplug.contract.task_groups import rows_of


def test_the_gradient_of_a_row_of_expanded_weights_is_its_own():
    """All rows have one value, and yet each task's loss moves its own row alone."""
    weights = torch.ones(1, dtype=torch.float64, requires_grad=True).expand(4, 1)
    losses = 10.0 * rows_of(weights, [1]), 20.0 * rows_of(weights, [0, 3])
    [gradient] = torch.autograd.grad(sum(each.sum() for each in losses), [weights])
    assert gradient.flatten().tolist() == [20, 10, 0, 20]
    assert rows_of(weights, [1], shared=True).stride(0) == 0
