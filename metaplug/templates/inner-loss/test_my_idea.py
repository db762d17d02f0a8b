"""What every plugin promises, and the equation of this one."""

from types import SimpleNamespace
from typing import Any

import torch
from metaplug.testing import PluginConformance

from my_idea import MyIdea


class TestMyIdea(PluginConformance):
    plugin = MyIdea
    settings = {"strength": 0.3}
    off = {"strength": 0.0}


def test_every_task_pays_for_its_own_predictions() -> None:
    predictions = torch.tensor([[[1.0, 3.0]], [[0.0, 2.0]]])
    step: Any = SimpleNamespace(by_task=lambda function: function(predictions))
    plugin = MyIdea(strength=0.5)
    losses = plugin.transform_inner_losses(torch.tensor([1.0, 2.0]), step)
    assert losses is not None
    assert torch.equal(losses, torch.tensor([2.25, 2.5]))
