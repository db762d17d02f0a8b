"""What every plugin promises, and the equation of this one."""

from types import SimpleNamespace
from typing import Any

import torch
from metaplug.testing import PluginConformance

from my_idea import MyIdea


class TestMyIdea(PluginConformance):
    plugin = MyIdea
    settings = {"strength": 0.5}
    off = {"strength": 0.0}


def test_the_step_is_where_its_objective_is_flat() -> None:
    rate, strength = torch.tensor(0.1), 2.0
    value, gradient, start = (torch.tensor([[each]]) for each in (3.0, 4.0, 1.0))
    step: Any = SimpleNamespace(initial_parameters={"w": start, "free": start})
    plugin = MyIdea(strength=strength)
    parameters = {"w": value, "free": value}
    made = plugin.update_parameters(parameters, {"w": gradient}, {"w": rate, "free": rate}, step)
    assert made is not None
    slope = gradient + (made["w"] - value) / rate + strength * (made["w"] - start)
    torch.testing.assert_close(slope, torch.zeros(1, 1), rtol=0, atol=1e-5)
    assert made["free"] is value
