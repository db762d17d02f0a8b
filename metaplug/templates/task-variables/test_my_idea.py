"""What every plugin promises, and the equation of this one."""

import math

import torch
from metaplug import MetaLearner
from metaplug.testing import PluginConformance

from my_idea import MyIdea


class TestMyIdea(PluginConformance):
    plugin = MyIdea
    settings = {"start": 0.3}


def test_the_last_weight_is_scaled_by_what_a_task_adapts() -> None:
    plugin = MyIdea(name="mine")
    MetaLearner(torch.nn.Linear(2, 3), plugins=[plugin])  # sets it up
    given = {
        "weight": torch.ones(2, 3, 2),
        "bias": torch.ones(2, 3),
        "mine.log_scale": torch.tensor([[0.0], [math.log(3)]]),
    }
    used = plugin.transform_parameters(given)
    expected = torch.tensor([1.0, 3.0])[:, None, None].expand(2, 3, 2)
    torch.testing.assert_close(used["weight"], expected)
    assert used["bias"] is given["bias"]
