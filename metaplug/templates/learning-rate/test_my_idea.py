"""What every plugin promises, and the equation of this one."""

from types import SimpleNamespace
from typing import Any

import torch
from metaplug.testing import PluginConformance

from my_idea import MyIdea


class TestMyIdea(PluginConformance):
    plugin = MyIdea
    settings = {"decay": 0.5}
    off = {"decay": 1.0}


def test_the_rate_falls_from_step_to_step() -> None:
    plugin = MyIdea(decay=0.5)
    for index, expected in enumerate((0.4, 0.2, 0.1)):
        step: Any = SimpleNamespace(index=index)
        rates = plugin.transform_learning_rates({"w": torch.tensor(0.4)}, step)
        assert rates is not None
        torch.testing.assert_close(rates["w"], torch.tensor(expected))
