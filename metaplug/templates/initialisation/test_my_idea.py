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


def test_the_harder_a_task_the_weaker_its_start() -> None:
    losses = torch.tensor([0.0, 2.0])
    step: Any = SimpleNamespace(forward=lambda parameters: (losses, None))
    start = {"w": torch.ones(2, 1, 3), "b": torch.ones(2, 3)}
    made = MyIdea(strength=0.5).initialize_parameters(start, step)
    assert made is not None
    kept = 1 - 0.5 * torch.tanh(losses)
    torch.testing.assert_close(made["w"], kept[:, None, None].expand(2, 1, 3))
    torch.testing.assert_close(made["b"], kept[:, None].expand(2, 3))
