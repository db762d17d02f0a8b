"""What every plugin promises, and the equation of this one."""

import torch
from metaplug.testing import PluginConformance

from my_idea import MyIdea


class TestMyIdea(PluginConformance):
    plugin = MyIdea
    settings = {"strength": 0.3}
    off = {"strength": 0.0}


def test_a_share_of_the_mean_is_taken_out() -> None:
    weight = torch.tensor([[[1.0, 3.0], [0.0, -2.0]]])
    bias = torch.tensor([[1.0, 3.0]])
    plugin = MyIdea(strength=0.5)
    changed = plugin.transform_gradients({"weight": weight, "bias": bias})
    assert changed is not None
    assert torch.equal(changed["weight"], torch.tensor([[[0.0, 2.0], [0.5, -1.5]]]))
    assert torch.equal(changed["bias"], bias)
